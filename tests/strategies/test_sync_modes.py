"""Replicas that synchronise late, or in periods: what they do is what a simulation of them in one process does."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "pipeline")]
from lightning_modules import Tied  # noqa: E402
from lightning_modules import loader as token_loader  # noqa: E402
from plain_module import PlainModule, loader, trainer_with  # noqa: E402

from danon_lightning.strategies import AsyncSync, DanonHybridStrategy, ErrorFeedback, PeriodicSync  # noqa: E402
from danon_lightning.testing import run_distributed  # noqa: E402

PERIOD = PeriodicSync(every_n_steps=4, outer_learning_rate=0.8, outer_momentum=0.7)
COMPENSATED = AsyncSync(compensation=0.5)


class Scheduled(PlainModule):
    """With a schedule, in double precision, and with running statistics."""

    def __init__(self):
        super().__init__("float64")
        self.layers.insert(0, nn.BatchNorm1d(20, dtype=torch.float64))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class StagedTied(Tied):
    """Embedding and head on different stages share their weight."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]


def simulated(make, batches, mode, epochs, clip=None):
    """Two replicas in one process; ``batches[r]`` are those of one epoch of replica r. Returns weights and buffers."""
    torch.manual_seed(0)
    replicas = [make()]
    replicas.append(copy.deepcopy(replicas[0]))
    optimizers, schedules = zip(*[(o[0], s[0]) for o, s in (r.configure_optimizers() for r in replicas)], strict=True)
    parameters = [[p for p in replica.parameters() if p.requires_grad] for replica in replicas]
    outer = [p.detach().clone() for p in parameters[0]]
    velocity = [torch.zeros_like(p) for p in outer]
    late, weights, in_round = None, None, 0

    def end_round():
        for index, anchor in enumerate(outer):
            mean = sum(anchor - own[index].detach() for own in parameters) / 2
            velocity[index].mul_(mode.outer_momentum).add_(mean)
            anchor.sub_(mode.outer_learning_rate * (mean + mode.outer_momentum * velocity[index]))
            for own in parameters:
                own[index].data.copy_(anchor)
        for buffers in zip(*(replica.buffers() for replica in replicas), strict=True):
            if buffers[0].is_floating_point():
                mean = sum(buffers) / 2
                for buffer in buffers:
                    buffer.copy_(mean)

    for _ in range(epochs):
        for pair in zip(*batches, strict=True):
            for replica, batch, optimizer in zip(replicas, pair, optimizers, strict=True):
                optimizer.zero_grad()
                loss = replica.training_step(batch, 0)
                loss.backward()
            if isinstance(mode, AsyncSync):
                mean = [sum(p.grad for p in column) / 2 for column in zip(*parameters, strict=True)]
                now = [p.detach().clone() for p in parameters[0]]
                for own in parameters:
                    for index, parameter in enumerate(own):
                        parameter.grad = None if late is None else late[index].clone()
                        if late is not None and mode.compensation:
                            g = late[index]
                            step = mode.compensation * g * g / g.square().mean().sqrt() * (now[index] - weights[index])
                            parameter.grad += step
                late, weights = mean, now
            for own, optimizer in zip(parameters, optimizers, strict=True):
                if clip:
                    nn.utils.clip_grad_norm_(own, clip)
                optimizer.step()
            in_round += 1
            if isinstance(mode, PeriodicSync) and in_round == mode.every_n_steps:
                end_round()
                in_round = 0
        for schedule in schedules:
            schedule.step()
    if isinstance(mode, PeriodicSync) and in_round:
        end_round()
    return replicas[0].state_dict()


def fit(folder, mode, *, ckpt_path=None, resumed_as=None, module=None, strategy=None, **options):
    torch.manual_seed(0)
    module = module or Scheduled()
    strategy = DanonHybridStrategy(sync_mode=mode, **(strategy or {}))
    trainer = trainer_with(strategy, ranks=2, folder=folder, **{"max_epochs": 3, **options})
    batches = loader(4, "float64", rank=trainer.global_rank, ranks=2)
    trainer.fit(module, batches, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer, module


class Note(pl.Callback):
    """Saves after the first epoch, in mid-period, and notes how old things are."""

    def __init__(self, path=None):
        self.path, self.local, self.staleness = path, None, []

    def on_train_batch_end(self, trainer, *args):
        self.staleness.append(trainer.strategy.parameter_staleness())

    def on_train_epoch_end(self, trainer, pl_module):
        if self.path is not None and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)
            self.local = copy.deepcopy(pl_module.state_dict())


class Disturbed(Scheduled):
    """On rank 1 one loss is infinite."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if (self.global_rank, self.global_step) == (1, 5) else loss


class ScaledLoss(MixedPrecision):
    """Mixed precision with all its scaling, but without lower precision."""

    def __init__(self, scale):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000))

    def forward_context(self):
        return nullcontext()


def synchronise_otherwise(folder):
    folder, found = Path(folder), {}
    for name, mode in (("async", "async"), ("compensated", COMPENSATED), ("periodic", PERIOD)):
        note = Note()
        trainer, module = fit(folder, mode, callbacks=[note], gradient_clip_val=0.5)
        found[name] = module.state_dict(), note.staleness

    # Checkpoints in mid-epoch and mid-period.
    residual = {"compression": "int4", "error_feedback": True}
    for name, mode, kept, coded in (
        ("async", COMPENSATED, "mean", {"compression": "int8"}),
        ("async residual", "async", "per_rank", residual),
        ("exact", PERIOD, "per_rank", {"compression": "int8"}),
        ("mean", PERIOD, "mean", {"compression": "int8"}),
    ):
        options = {"strategy": {"residual_checkpoint": kept, **coded}}
        note = Note(folder / f"{name}.ckpt")
        _, whole = fit(folder, mode, callbacks=[note], **options)
        _, resumed = fit(folder, mode, ckpt_path=note.path, **options)
        found[f"{name} resumed"] = whole.state_dict(), resumed.state_dict(), note.local

    for name, plugins in (("unscaled", []), ("scaled", [ScaledLoss(2.0**10)])):
        trainer, module = fit(folder, "async", plugins=plugins)
        found[name] = module.state_dict(), None
    found["scale"] = trainer.precision_plugin.scaler.get_scale()
    _, module = fit(folder, PERIOD)
    found["dense"] = module.state_dict(), None
    trainer, module = fit(folder, PERIOD, strategy={"compression": "int8"})
    found["int8"] = module.state_dict(), trainer.strategy.communication_stats()
    for name, options in (("dropped", {}), ("dropped int8", {"compression": "int8"})):
        trainer, module = fit(folder, PERIOD, module=Disturbed(), strategy=options)
        found[name] = module.state_dict(), None
    trainer, module = fit(folder, "async", module=Disturbed(), strategy={"compression": "int8"})
    found["skipped"] = module.state_dict(), trainer.strategy.communication_stats()
    return found


def close(state, expected, tolerance=1e-10):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=tolerance, atol=tolerance, msg=name)


def distance(one, other):
    """Between weights."""
    names = [name for name, _ in Scheduled().named_parameters()]
    return float(torch.cat([(one[name] - other[name]).flatten() for name in names]).norm())


def test_replicas_do_what_a_simulation_does_and_resume(tmp_path):
    results = run_distributed(synchronise_otherwise, 2, str(tmp_path), timeout=250)
    batches = [list(loader(4, "float64", rank=rank, ranks=2)) for rank in range(2)]
    for name, mode in (("async", AsyncSync()), ("compensated", COMPENSATED), ("periodic", PERIOD)):
        expected = simulated(Scheduled, batches, mode, 3, clip=0.5)
        for rank, result in enumerate(results):
            state, staleness = result[name]
            if name != "periodic" and rank:  # running statistics are rank 0's, as everywhere with DDP
                continue
            close({k: v for k, v in state.items() if "num_batches" not in k},
                  {k: v for k, v in expected.items() if "num_batches" not in k})  # fmt: skip
            assert staleness == ([1.0] * 18 if name != "periodic" else [float(n % 4) for n in range(1, 19)])

    for result in results:
        for name in ("async resumed", "async residual resumed", "exact resumed"):
            whole, resumed, _ = result[name]
            close(resumed, whole, 0)
        whole, resumed, _ = result["mean resumed"]
        assert 0 < distance(resumed, whole) < 0.3 * distance(whole, Scheduled().state_dict())
    # Checkpoints hold the mean of what the replicas have found, and their weights differ then.
    saved = torch.load(tmp_path / "mean.ckpt", weights_only=True)["state_dict"]
    locals_ = [result["mean resumed"][2] for result in results]
    for name, _ in Scheduled().named_parameters():
        assert not torch.equal(locals_[0][name], locals_[1][name])
        torch.testing.assert_close(saved[name], (locals_[0][name] + locals_[1][name]) / 2)

    (state, stats), (fit_dense, _) = results[0]["int8"], results[0]["dense"]
    assert stats["steps"] == 5  # of 18 steps: four whole periods, and the rest
    assert distance(state, fit_dense) < 0.1 * distance(fit_dense, Scheduled().state_dict())
    # A scaler skips the first step, in which nothing has arrived, and lowers its scale.
    close(results[0]["scaled"][0], results[0]["unscaled"][0], 0)
    assert results[0]["scale"] == 2.0**9
    for name in ("dropped", "dropped int8", "skipped"):
        states = [result[name][0] for result in results]
        for key in states[0]:
            assert torch.isfinite(states[0][key]).all(), (name, key)
            if "layers.0" not in key:
                assert torch.equal(states[0][key], states[1][key]), (name, key)
    assert results[0]["skipped"][1]["skipped_steps"] == 1


def synchronise_stages(folder):
    found = {}
    for name, mode in (("async", COMPENSATED), ("periodic", PERIOD)):
        note = Note(Path(folder) / f"{name}.ckpt")
        for resume in (False, True):
            strategy = DanonHybridStrategy(
                pipeline_parallel_size=2, num_microbatches=2, sync_mode=mode, residual_checkpoint="per_rank"
            )
            options = {"precision": "64-true", "max_epochs": 2, "gradient_clip_val": 0.5}
            trainer = trainer_with(strategy, ranks=4, folder=folder, callbacks=[] if resume else [note], **options)
            torch.manual_seed(0)
            module = StagedTied()
            batches = token_loader(2, strategy.mesh.data_parallel_rank)
            path = note.path if resume else None
            trainer.fit(module, batches, ckpt_path=path, weights_only=True if path else None)
            state = {key: value for key, value in module.state_dict().items() if type(value) is torch.Tensor}
            found[name, resume] = state
    return found


def test_stages_synchronise_over_their_replicas(tmp_path):
    results = run_distributed(synchronise_stages, 4, str(tmp_path), timeout=250)
    batches = [list(token_loader(2, rank)) for rank in range(2)]

    def make():
        module = StagedTied().double()
        module.log = module.log_dict = lambda *args, **kwargs: None
        return module

    for name, mode in (("async", COMPENSATED), ("periodic", PERIOD)):
        expected = simulated(make, batches, mode, 2, clip=0.5)
        for result in results:
            for key, value in result[name, False].items():
                if "accuracy" not in key:
                    torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-10, msg=f"{name} {key}")
                    assert torch.equal(value, result[name, True][key]), f"{name} {key}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_mode": "later"}, "sync_mode='later' must be"),
        ({"sync_mode": "periodic", "optimizer_sharding": True}, "optimizer_sharding=True cannot be used with"),
        ({"sync_mode": "async", "find_unused_parameters": True}, "find_unused_parameters=True cannot"),
        (
            {"sync_mode": "async", "compression": "topk", "error_feedback": ErrorFeedback(momentum=0.9)},
            r"ErrorFeedback\(momentum=0.9\) cannot be used",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DanonHybridStrategy(**options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AsyncSync(compensation=-1),
        lambda: PeriodicSync(every_n_steps=0),
        lambda: PeriodicSync(outer_learning_rate=0.0),
        lambda: PeriodicSync(outer_momentum=1.0),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
