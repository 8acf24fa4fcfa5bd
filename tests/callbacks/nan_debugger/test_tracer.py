"""Operations and tensors of all kinds, under the eyes of a tracer."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from danon_lightning.callbacks.nan_debugger.tracer import OriginTracer


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, *args):
        return self.function(*args)


def traced(function, *args):
    """Run a function as a module; what came of it, and the tracer."""
    module = Function(function)
    tracer = OriginTracer(module, list(args))
    with tracer:
        output = module(*args)
    return output, tracer


def origin_of(function, *args):
    output, tracer = traced(function, *args)
    return tracer.resolve(output)


def test_of_two_bad_values_the_one_that_reaches_the_loss_is_named():
    def function(x):
        ignored = torch.log(x - 5)
        assert ignored.isnan().all()
        return torch.sqrt(x - 3).sum()

    origin = origin_of(function, torch.ones(4))
    assert origin.name == "sqrt" and origin.exact


def test_in_place_and_views_are_followed_to_the_base():
    def function(x):
        base = x * 1
        row = base.view(2, 2)[0]
        row.sub_(5).log_()
        return base.sum()

    origin = origin_of(function, torch.ones(4))
    assert origin.op == "aten.log_.default"
    assert origin.inputs[0].maximum == -4 and origin.inputs[0].finite, "as it was before"


def test_memory_that_is_written_anew_is_forgiven():
    def function(x):
        work = torch.log(x - 5)
        work.copy_(x)
        work.div_(x - 1)
        return work.sum()

    assert origin_of(function, torch.ones(4)).name == "div_"


def test_lists_of_tensors_are_looked_at():
    def function(x):
        return torch._foreach_log([x, x - 5])[1].sum()

    origin = origin_of(function, torch.ones(4))
    assert origin.op == "aten._foreach_log.default"
    assert len(origin.inputs) == 2


def test_out_arguments_are_written_only():
    def function(x):
        out = torch.full((4,), torch.nan)
        torch.log(x, out=out)
        assert out.isfinite().all()
        torch.log(x - 2, out=out)
        return out.sum()

    origin = origin_of(function, torch.ones(4))
    assert origin.op == "aten.log.out"
    assert len(origin.inputs) == 1


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (lambda x: torch.complex(x - 1, x - 1).log().abs().sum(), "log"),
        (lambda x: torch.complex(x, x).div(0 * x).abs().sum(), "div"),
        (lambda x: (x.to_sparse() / 0).to_dense().sum(), "div"),
        (lambda x: (torch.eye(4).to_sparse_csr() @ (x / 0)[:, None]).sum(), "div"),
        (lambda x: (x * 500).to(torch.float8_e5m2).float().mul(1e30).mul(1e30).sum(), "mul"),
        (lambda x: torch.cat([x[:0], x[:0].log(), torch.log(x - 9)]).sum(), "log"),
        (lambda x: x.double().mul(1e300).float().sum(), "to_copy"),
        (lambda x: (x * float("nan")).sum(), "mul"),
        (lambda x: x.masked_fill(x > 0, torch.nan).sum(), "masked_fill"),
        (lambda x: (x + torch.tensor(float("nan"))).sum(), "lift_fresh"),
        (
            lambda x: cross_entropy(x[None].masked_fill(torch.arange(4) > 2, -torch.inf), torch.tensor([3])),
            "masked_fill",
        ),
        (lambda x: cross_entropy(x[None].where(x < 0, -torch.inf), torch.zeros(1).long()), "softmax"),
        (lambda x: -(torch.tensor([0.0, -torch.inf]) + x[:2]).amin(), "lift_fresh"),
    ],
    ids=[
        *("complex", "complex 0 / 0", "sparse", "sparse csr", "float8", "empty", "float64", "NaN as a number"),
        *("NaN as a fill", "NaN as a constant", "a label hidden", "all hidden", "a constant that reaches the loss"),
    ],
)
def test_kinds_of_tensors(made, name):
    origin = origin_of(made, torch.ones(4))
    assert name in origin.name and origin.exact


def test_integers_and_meta_tensors_are_passed_over():
    def function(x):
        assert torch.ones(3, device="meta").log().shape == (3,)
        quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
        return (torch.arange(4) // 2).float().sum() + quantized.dequantize().sum()

    output, tracer = traced(function, torch.ones(4))
    assert output.isfinite() and tracer.resolve(output) is None and tracer.origin is None


def test_inference_tensors_can_be_in_a_batch():
    with torch.inference_mode():
        x = torch.tensor([1.0, torch.nan])
    origin = origin_of(lambda x: (x * 2).sum(), x)
    assert (origin.cause, origin.leaf, origin.sample) == ("input", "batch[0]", 1)


def test_subclasses_are_seen_as_what_they_hold():
    class Named(torch.Tensor):
        pass

    origin = origin_of(lambda x: torch.log(x.as_subclass(Named) - 2).sum(), torch.ones(4))
    assert origin.name == "log"


def test_a_sharded_tensor_is_seen_by_the_part_on_this_rank():
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = DTensor.from_local(torch.ones(4), mesh, [Replicate()])
        origin = origin_of(lambda x: torch.log(x - 2).to_local().sum(), x)
    finally:
        dist.destroy_process_group()
    assert origin.name == "log" and origin.output.nan_count == 4


def test_what_has_come_from_another_rank_is_not_this_ranks_fault():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:

        def function(x):
            received = torch.empty(4)
            dist.all_gather_into_tensor(received, (x / 0 - x / 0) if x.sum() < 0 else x)
            with torch.no_grad():
                received.numpy()[:] = float("nan")  # as the other rank would have written it, unseen
            return received.sum()

        output, tracer = traced(function, torch.ones(4))
    finally:
        dist.destroy_process_group()
    assert output.isnan() and tracer.resolve(output) is None


def test_memory_that_nobody_has_written_is_named():
    def function(x):
        work = torch.empty(4)
        work.numpy()[:] = float("nan")  # what may lie in memory
        return (work + x).sum()

    origin = origin_of(function, torch.ones(4))
    assert origin.name == "add" and "nobody had written" in origin.note


def test_a_tensor_that_the_module_hides_is_named():
    module = Function(lambda x: (module.hidden * x).sum())
    module.hidden = torch.tensor([1.0, torch.nan, 1, 1])
    tracer = OriginTracer(module)
    with tracer:
        output = module(torch.ones(4))
    origin = tracer.resolve(output)
    assert (origin.cause, origin.parameter) == ("weight", "hidden")


def test_the_derivative_of_a_derivative_belongs_where_that_does():
    module = nn.Sequential(nn.Linear(4, 4), Function(lambda x: (x - x.detach()).abs().pow(1.5)))
    tracer = OriginTracer(module)
    x = torch.ones(2, 4, requires_grad=True)
    with tracer:
        (gradient,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        penalty = gradient.square().sum()
        with tracer.measuring(0, "backward", 0):
            found = dict(zip(["weight"], torch.autograd.grad(penalty, [module[0].weight]), strict=True))
    assert penalty.isfinite()
    origin = tracer.resolve(penalty, found)
    assert (origin.cause, origin.module, origin.phase) == ("backward", "1", "backward")


def test_passes_are_told_by_whoever_runs_them():
    module = Function(lambda x: torch.log(x - 2))
    tracer = OriginTracer(module)
    with tracer, tracer.measuring(2, "forward", 3):
        tracer.mark(2, "want activation", 3)
        output = module(torch.ones(4))
    origin = tracer.resolve(output)
    assert (origin.stage, origin.micro_batch) == (2, 3)


def test_the_best_guess_is_not_exact():
    _, tracer = traced(lambda x: torch.exp(x * 100) * 0 + torch.log(x - 2), torch.ones(4))
    assert tracer.origin.op in ("aten.mul.Tensor", "aten.log.default") and not tracer.origin.exact


def test_modules_that_are_made_on_the_fly_belong_to_their_caller():
    module = nn.Sequential(Function(lambda x: nn.LogSigmoid()(x / 0)))
    tracer = OriginTracer(module)
    with tracer:
        output = module(-torch.ones(4))
    assert tracer.resolve(output).module == "0"


def test_nothing_is_left_watching():
    _, tracer = traced(lambda x: torch.log(x - 2), torch.ones(4))
    before = tracer.origin
    from torch.nn.modules import module as internals

    assert not internals._global_forward_hooks and not internals._global_forward_pre_hooks
    torch.log(-torch.ones(3))
    assert tracer.origin == before


def test_a_module_that_is_left_by_force_is_not_taken_for_one_that_runs():
    class Leave(BaseException):
        pass

    def leave(x):
        raise Leave

    module = nn.Sequential(Function(lambda x: torch.sqrt(x * 0)), nn.Sequential(Function(leave)))
    tracer = OriginTracer(module)
    x = torch.ones(2, 4, requires_grad=True)
    with tracer:
        with pytest.raises(Leave), tracer.measuring(0, "forward", 0):
            module(x)
        with tracer.measuring(0, "forward", 1):
            output = module[0](x)
        with tracer.measuring(0, "backward", 1):
            found = torch.autograd.grad(output.sum(), x)
    origin = tracer.resolve(output.sum(), {"x": found[0]})
    assert (origin.cause, origin.module, origin.micro_batch) == ("backward", "0", 1)
    assert origin.forward_op == "aten.sqrt.default"


def test_attributes_that_hold_themselves_are_no_trap():
    module = Function(lambda x: torch.log(x - 2))
    module.loop = {"x": torch.ones(1)}
    module.loop["loop"] = module.loop
    tracer = OriginTracer(module, {"batch": module.loop})
    with tracer:
        output = module(torch.ones(4))
    assert tracer.resolve(output).name == "log"
