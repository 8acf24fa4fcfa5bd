"""What torch does not promise and this package relies on. If one of these fails, torch has changed."""

import inspect

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import schedules
from torch.utils.checkpoint import checkpoint

from danon_lightning.strategies.pipeline import torch_internals as internals
from danon_lightning.strategies.pipeline.absent import Absent

aten = torch.ops.aten


def test_paths_of_leaves_are_written_as_recordings_expect():
    tree = ((1, [2]), {"mask": (3,), "none": None})
    assert internals.flatten_with_paths(tree) == {"[0][0]": 1, "[0][1][0]": 2, "[1]['mask'][0]": 3, "[1]['none']": None}


def test_a_wrapper_has_no_storage_and_says_that_it_is_on_its_device():
    made = Absent(torch.empty_strided((2, 3), (1, 2), device="meta"), torch.device("cpu"), requires_grad=True)
    assert (made.shape, made.stride(), made.device.type, made.is_leaf) == ((2, 3), (1, 2), "cpu", True)
    internals.mark_as_parameter(made)
    assert isinstance(made, nn.Parameter)


def test_operators_say_what_they_write_return_and_draw():
    x, y = torch.ones(2), torch.ones(2)
    assert internals.written_arguments(aten.add_.Tensor, (x, y), {}) == [x]
    assert internals.written_arguments(aten.add.out, (x, x), {"out": y})[0] is y
    assert internals.written_arguments(aten.add.Tensor, (x, y), {}) == []
    assert internals.returns_written_arguments(aten.add_.Tensor)
    assert not internals.returns_written_arguments(aten.view.default)
    assert not internals.returns_written_arguments(aten.native_batch_norm.default)
    assert internals.draws_random_numbers(aten.bernoulli.default)
    assert internals.draws_random_numbers(aten.native_dropout.default)
    assert not internals.draws_random_numbers(aten.add.Tensor)


def test_calls_are_replaced_with_hooks_and_put_back():
    module, hooked = nn.Linear(2, 2), []
    module.register_forward_hook(lambda module, args, output: hooked.append(output))
    calls = []

    def replace(index, original):
        def call(x):
            calls.append(index)
            return original(x)

        return call

    x = torch.ones(1, 2)
    before = dict(module.__dict__)
    with internals.calls_replaced([nn.Linear(2, 2), module], replace):
        module(x)
        assert (calls, len(hooked)) == ([1], 1)
        result = internals.call_with_forward(module, lambda x: x * 5, x)
    assert torch.equal(result, x * 5) and hooked[1] is result
    assert module.__dict__ == before
    module(x)
    assert calls == [1]


def test_a_compiled_module_is_replaced_as_well():
    module = nn.Linear(2, 2)
    module.compile(backend="eager")
    compiled = module._compiled_call_impl
    with internals.calls_replaced([module], lambda index, original: lambda x: original is compiled):
        assert module(torch.ones(1, 2)) is True
    assert module._compiled_call_impl is compiled


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_call_inside_of_a_checkpoint_is_recognized(reentrant):
    found = []

    def function(x):
        found.append((internals.in_reentrant_checkpoint(), internals.enclosing_checkpoint()))
        return x * 2

    checkpoint(function, torch.ones(2, requires_grad=True), use_reentrant=reentrant)
    checkpoint(function, torch.ones(2, requires_grad=True), use_reentrant=reentrant)
    function(torch.ones(2))

    (in_first, first), (_, second), outside = found
    assert in_first is reentrant and outside == (False, None)
    assert first is not None and second is not None and first is not second


def test_places_are_those_of_the_module():
    module = nn.BatchNorm1d(2)
    module.weight, module.inner = None, nn.Linear(2, 2, bias=False)
    places = [(name, key) for name, _, key in internals.parameter_places(module)]
    assert places == [("weight", "weight"), ("bias", "bias"), ("inner.weight", "weight"), ("inner.bias", "bias")]
    name, dictionary, key = next(internals.buffer_places(module))
    dictionary[key] = torch.full((2,), 3.0)
    assert module.running_mean[0] == 3 and name == "running_mean"
    assert internals.tensor_dictionaries(module) == (module._parameters, module._buffers)
    with internals.without_torch_function():
        assert Absent.like(torch.ones(2)).requires_grad is False


def test_schedules_begin_transfers_and_wait_for_them_in_two_functions():
    """Which are replaced while a step is measured; test_timeline.py sees whether all schedules use them."""
    assert list(inspect.signature(schedules._batch_p2p).parameters) == ["p2p_ops", "desc"]
    assert list(inspect.signature(schedules._wait_batch_p2p).parameters) == ["work"]
    for schedule in (schedules.Schedule1F1B, schedules.ScheduleGPipe):
        assert "_wait_batch_p2p" in schedule._step_microbatches.__code__.co_names
