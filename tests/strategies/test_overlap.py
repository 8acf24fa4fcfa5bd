"""The exchange beside the next forward pass: parts, each by itself, without other ranks."""

import copy
import pickle
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, WeightAveraging
from torch import nn, optim

from danon_lightning.callbacks import CommunicationMonitor, GradientMonitor, HealthReport, PerformanceMonitor
from danon_lightning.models import FullAttentionLightning
from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.strategies.overlap.due_step import DueStep
from danon_lightning.strategies.overlap.forward import _Hook
from danon_lightning.strategies.overlap.parameter_use import first_uses, modules_to_watch
from danon_lightning.strategies.overlap.refusals import _SEPARATE, check_trainer
from danon_lightning.strategies.overlap.send_order import Departure, SendOrder
from danon_lightning.strategies.overlap.synchronization import Synchronization, readers_of

# ---- steps in parts


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64)) for _ in range(4)]


@pytest.mark.parametrize("kind", _SEPARATE)
def test_a_step_in_parts_is_the_whole_step_to_the_bit(kind):
    whole, parts = weights(), weights()
    optimizers = [kind([{"params": w[:3], "lr": 0.05}, {"params": w[3:]}], lr=0.02) for w in (whole, parts)]
    schedules = [optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in optimizers]
    for step in range(4):
        for parameters in (whole, parts):
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn(5, 3, generator=generator, dtype=torch.float64)
            parameters[1].grad = None if step == 2 else parameters[1].grad
        optimizers[0].step()
        due = DueStep(optimizers[1], optimizers[1].step, {})
        schedules[0].step()
        optimizers[1]._opt_called = True
        schedules[1].step()  # the step is still that of before
        rates = [group["lr"] for group in optimizers[1].param_groups]
        optimizers[1].zero_grad()  # as before validation
        due.take({id(parts[3])})
        assert torch.equal(parts[3], whole[3])
        due.take({id(parts[0]), id(parts[1])})
        with torch.inference_mode():
            due.take({id(parts[2])})
        assert [group["lr"] for group in optimizers[1].param_groups] == rates
        assert [len(group["params"]) for group in optimizers[1].param_groups] == [3, 1]
        assert all(parameter.grad is None for parameter in parts)
        for one, other in zip(whole, parts, strict=True):
            assert torch.equal(one, other)
    assert_same(*(optimizer.state_dict() for optimizer in optimizers))


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


# ---- the order of buckets


class Link:
    """Begins so many buckets until the backward pass ends."""

    def __init__(self, begins, peers=0):
        self.begins, self.peers = begins, peers
        self.sent = []
        self.asked = []

    def send(self, buffer, parameters, *, first, last):
        self.sent.append((int(buffer), first, last))
        return torch.futures.Future()

    @property
    def waiting(self):
        return max(0, len(self.sent) - self.begins)

    def agree_on_maximum(self, value):
        self.asked.append(value)
        return max(value, self.peers)


def send_steps(order, link, steps, buckets):
    for _ in range(steps):
        link.sent = []
        departures = [Departure(torch.tensor(index), []) for index in range(buckets)]
        for index, departure in enumerate(departures):
            order.add(departure, last=index == buckets - 1)
            assert (departure.future is None) == (index >= (order.released or buckets) and index < buckets - 1)
        assert all(departure.future is not None for departure in departures)
        assert not order.holds
        order.agree()
        order.agree()  # once a step
    return [index for index, _, _ in link.sent]


def test_what_cannot_leave_in_time_leaves_in_the_order_of_the_forward_pass():
    link = Link(begins=2)
    order = SendOrder(link)
    assert send_steps(order, link, 4, 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert order.released == 3
    assert send_steps(order, link, 2, 8) == [0, 1, 2, 7, 6, 5, 4, 3]
    assert [first for _, first, _ in link.sent] == [True] + 7 * [False]
    assert [last for _, _, last in link.sent] == 7 * [False] + [True]
    assert send_steps(order, link, 20, 8) == [0, 1, 2, 7, 6, 5, 4, 3]
    assert link.asked == [3, 3, 3]


def test_a_faster_link_is_found_out_and_the_slowest_rank_does_not_keep_others_idle():
    link = Link(begins=2)
    order = SendOrder(link)
    send_steps(order, link, 10, 8)
    assert order.released == 3
    link.begins = 8
    assert send_steps(order, link, 60, 8) == list(range(8))
    behind = Link(begins=1, peers=5)
    order = SendOrder(behind)
    assert send_steps(order, behind, 5, 8) == [0, 1, 2, 3, 4, 7, 6, 5]


def test_one_bucket_and_no_reordering():
    for order_options in ({}, {"reorders": False}):
        link = Link(begins=0)
        order = SendOrder(link, **order_options)
        assert send_steps(order, link, 12, 1) == [0]
        assert link.sent == [(0, True, True)]
    assert link.asked == []
    assert send_steps(order, link, 12, 4) == [0, 1, 2, 3]


# ---- which module needs what


class Awkward(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.ahead = nn.Linear(8, 8)
        self.unused = nn.Linear(2, 2)
        self.free = nn.Parameter(torch.ones(8))
        self.listed = nn.ParameterList([nn.Parameter(torch.ones(8))])

    def forward(self, ids):
        penalty = self.ahead.weight.square().sum()
        x = self.embedding(ids)
        x = self.norm(self.attention(x, x, x, need_weights=False)[0])
        x = self.ahead(x) * self.free + self.listed[0]
        return (x @ self.embedding.weight.T).sum() + penalty


def named_uses(model, *inputs):
    with first_uses(modules_to_watch(model), model.parameters()) as found:
        model(*inputs)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = {module: name for name, module in model.named_modules()}
    return {modules[module]: {names[one] for one in ids} for module, ids in found.items()}


def test_a_parameter_belongs_to_the_module_that_uses_it_first():
    uses = named_uses(Awkward(), torch.arange(7))
    assert uses == {
        "embedding": {"embedding.weight"},
        "attention": {
            "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight",
            "attention.out_proj.bias",
        },
        "norm": {"norm.weight", "norm.bias"},
        "ahead": {"ahead.bias"},  # its weight was read before, outside of all of them
    }  # fmt: skip


def test_what_is_compiled_is_waited_for_in_front_of_it_as_a_whole():
    def block():
        return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    wrapped, in_place = torch.compile(block(), backend="eager"), block()
    in_place.compile(backend="eager")
    model = nn.Sequential(wrapped, nn.Sequential(in_place, nn.Linear(3, 3)))
    names = {module: name for name, module in model.named_modules()}
    assert [names[module] for module in modules_to_watch(model)] == ["0", "1", "1.1"]
    uses = named_uses(model, torch.ones(2, 3))
    assert {name: len(found) for name, found in uses.items()} == {"0": 4, "1": 4, "1.1": 2}
    waited = []
    handle = wrapped.register_forward_pre_hook(lambda module, _: waited.append(module))
    model(torch.ones(2, 3))
    assert waited == [wrapped]
    handle.remove()


def test_copies_of_a_module_wait_for_nothing():
    module, waited = nn.Linear(2, 2), []
    module.register_forward_pre_hook(_Hook(waited.append))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other(torch.ones(1, 2))
    assert waited == []
    module(torch.ones(1, 2))
    assert waited == [module]


# ---- who looks


class Looks(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pass


class LooksNow(Looks):
    looks = True

    def reads_between_steps(self, trainer):
        return self.looks


class OwnStep(pl.LightningModule):
    def optimizer_step(self, *args):
        super().optimizer_step(*args)


def readers(*callbacks, module=None):
    trainer = SimpleNamespace(callbacks=list(callbacks))
    return readers_of(trainer, module or pl.LightningModule(), None)


def test_steps_are_finished_early_where_somebody_may_look():
    progress = pl.callbacks.TQDMProgressBar()
    assert readers(pl.Callback(), progress, ModelCheckpoint(), Synchronization(None)) != []
    assert readers(pl.Callback(), progress, ModelCheckpoint()) == []
    assert readers(Looks(), progress) == [("Looks.on_train_batch_end", False)]
    assert readers(WeightAveraging()) == [("WeightAveraging.on_train_batch_end", False)]
    assert readers(LambdaCallback(on_after_backward=print)) == [("LambdaCallback.on_after_backward", False)]
    assert readers(module=OwnStep()) == [("OwnStep.optimizer_step", False)]
    one = LooksNow()
    assert readers(one) == [("LooksNow.on_train_batch_end", True)]
    one.looks = False
    assert readers(one) == []


def test_own_callbacks_and_modules_do_not_look_at_each_step():
    module = FullAttentionLightning({"hidden_size": 8, "num_layers": 1, "num_heads": 1, "max_sequence_length": 8})
    trainer = pl.Trainer(max_steps=7, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    own = [CommunicationMonitor(5), PerformanceMonitor(5), HealthReport(), GradientMonitor(5)]
    trainer.callbacks = own
    assert readers_of(trainer, module, None) == []


# ---- what it does not go with


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "int8"},
        {"compression": "auto"},
        {"sync_mode": "async"},
        {"optimizer_sharding": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"pipeline_parallel_size": 2},
    ],
)
def test_arguments_that_do_not_go_together_are_refused(options):
    [name] = options
    with pytest.raises(ValueError, match=f"overlap_forward=True cannot be used with this {name}.*Set {name}="):
        DanonHybridStrategy(overlap_forward=True, **options)


class Custom(optim.SGD):
    pass


class Declared(optim.SGD):
    steps_parameters_separately = True


@pytest.mark.parametrize(
    ("options", "trainer_options", "message"),
    [
        ({"kind": optim.LBFGS}, {}, "does not know LBFGS"),
        ({"kind": Custom}, {}, "does not know Custom.*steps_parameters_separately"),
        ({"kind": Declared}, {}, None),
        ({"kind": optim.AdamW}, {}, None),
        ({"kind": optim.AdamW, "count": 2}, {}, "takes one optimizer, there are 2"),
        ({"kind": optim.SGD}, {"gradient_clip_val": 0.5}, "gradient_clip_val=0.5"),
        ({"kind": optim.SGD}, {"automatic": False}, "automatic_optimization=True"),
        ({"kind": optim.SGD, "scales_loss": True}, {}, "gradient scaler"),
    ],
)
def test_ways_of_training_that_need_all_gradients_at_once_are_refused(options, trainer_options, message):
    kind = options["kind"]
    optimizers = [kind([nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(options.get("count", 1))]
    trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(automatic_optimization=trainer_options.get("automatic", True)),
        gradient_clip_val=trainer_options.get("gradient_clip_val"),
        precision="16-mixed",
    )
    if message is None:
        check_trainer(trainer, optimizers, scales_loss=False)
        return
    with pytest.raises(ValueError, match=message):
        check_trainer(trainer, optimizers, scales_loss=options.get("scales_loss", False))
