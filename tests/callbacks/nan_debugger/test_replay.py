"""The fault zoo: what is wrong is named, and what is not raises no alarm."""

import dataclasses
import json
import random

import fault_zoo
import lightning.pytorch as pl
import numpy
import pytest
import torch
from fault_zoo import BENIGN, FAULTS, Benign, Fault
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torchmetrics import MeanMetric

from danon_lightning.callbacks.nan_debugger.origin import Origin
from danon_lightning.callbacks.nan_debugger.random_state import RandomState, random_state, set_random_state
from danon_lightning.callbacks.nan_debugger.replay import Replay, replay_step


def run(fault: Fault) -> Replay:
    """Run the micro-batches of a fault once, and then replay the one that has failed."""
    torch.manual_seed(1)
    model = fault.make()
    for index, batch in enumerate(fault.batches()):
        rng = random_state()
        with fault.context():
            loss = model.training_step(batch, index)
        loss.backward()
        gradients = [one.grad for one in model.parameters() if one.grad is not None]
        if not all(bool(one.isfinite().all()) for one in [loss, *gradients]):
            return replay_step(model, batch, index, rng=rng, context=fault.context, micro_batch=index)
    raise AssertionError("nothing went wrong")


def right(fault: Fault, replay: Replay) -> bool:
    """Whether all that is known about a fault was found."""
    origin = replay.origin
    if origin is None or not origin.exact:
        return False
    found = (origin.cause, origin.module, origin.phase, origin.micro_batch)
    if found != (fault.cause, fault.module, fault.phase, fault.micro_batch):
        return False
    subject = origin.leaf if fault.cause == "input" else origin.parameter
    return subject == fault.subject if fault.subject else fault.op in origin.name


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named(fault):
    replay = run(fault)
    assert right(fault, replay), replay
    assert replay.origin.sample == fault.sample or fault.sample is None
    assert "fault_zoo.py" in replay.origin.location


@pytest.mark.parametrize("benign", BENIGN, ids=lambda benign: benign.name)
def test_no_false_alarm(benign: Benign):
    torch.manual_seed(1)
    replay = replay_step(benign.make(), benign.batch(), 0, loss_scale=benign.loss_scale)
    assert replay.origin is None, replay.origin
    assert replay.complete
    assert replay.finite != replay.scale_only


class Stateful(pl.LightningModule):
    """Changes all that a step may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.layer = nn.Linear(4, 1)
        self.metric = MeanMetric()
        self.seen, self.count, self.cache = [], 0, torch.zeros(4)

    def training_step(self, batch, batch_idx):
        self.count += 1
        self.seen.append(batch_idx)
        self.later = 1
        self.cache += 1
        batch["x"] += 1
        with torch.no_grad():
            self.layer.bias.add_(1)
        self.layer.weight.requires_grad_(True)
        loss = self.layer(self.norm(batch["x"])).square().mean() + torch.rand(()) + random.random()
        self.metric.update(loss.detach())
        self.log("loss", loss)
        self.eval()
        return {"loss": loss}


def everything(module):
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return state | {
        "cache": module.cache.clone(),
        "metric": (module.metric.mean_value.clone(), module.metric._update_count),
        "other": (module.count, list(module.seen), module.training, hasattr(module, "later")),
        "random": (torch.rand(3), random.random(), numpy.random.rand()),
        "gradients": [None if one.grad is None else one.grad.clone() for one in module.parameters()],
    }


def test_nothing_remains_of_a_replay():
    module = Stateful()
    module.layer.weight.grad = torch.ones(1, 4)
    batch = {"x": torch.randn(8, 4)}
    before_batch, rng = batch["x"].clone(), random_state()
    before = everything(module)
    set_random_state(rng)
    replay = replay_step(module, batch, 3)
    assert replay.complete and replay.finite and not replay.note
    assert set(replay.gradient_norms) == {"norm.weight", "norm.bias", "layer.weight", "layer.bias"}
    torch.testing.assert_close(everything(module), before, rtol=0, atol=0)
    assert torch.equal(batch["x"], before_batch)


def test_a_replay_draws_what_the_step_has_drawn():
    module, batch = Stateful(), {"x": torch.randn(8, 4)}
    rng = random_state()
    first = replay_step(module, batch, 3, rng=rng)
    torch.rand(7)
    again = replay_step(module, batch, 3, rng=RandomState.from_dict(rng.to_dict()))
    assert again.loss == first.loss and again.gradient_norms == first.gradient_norms


def test_gradients_are_those_of_backward_and_hooks_of_replicas_stay_silent():
    model, batch = fault_zoo.Model(nn.Identity()), fault_zoo.batch()
    calls = []
    for parameter in model.parameters():
        node = parameter.view_as(parameter).grad_fn.next_functions[0][0]  # as DistributedDataParallel does
        node.register_hook(lambda *args: calls.append(args))
        parameter.keep = node
    replay = replay_step(model, batch, 0, loss_scale=8.0)
    assert not calls
    model.training_step(batch, 0).backward()
    assert calls
    expected = {name: float(one.grad.norm()) for name, one in model.named_parameters()}
    assert replay.gradient_norms == pytest.approx(expected)


class Adversarial(fault_zoo.Model):
    """Optimizes by hand, in two turns; the second goes wrong."""

    def __init__(self, bad: bool = True) -> None:
        super().__init__(nn.Linear(16, 16))
        self.automatic_optimization = False
        self.bad = bad

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for index, optimizer in enumerate((first, second)):
            self.toggle_optimizer(optimizer)
            loss = super().training_step(batch, batch_idx)
            if index and self.bad:
                loss = loss + torch.log(self.head.weight.sum() * 0 - 1)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.lr_schedulers()

    def configure_optimizers(self):
        return torch.optim.SGD(self.stem.parameters(), 0.1), torch.optim.SGD(self.head.parameters(), 0.1)


class Replaying(pl.Callback):
    """Replays each batch before it is trained on."""

    def __init__(self) -> None:
        self.replays = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        before = {name: one.clone() for name, one in pl_module.state_dict().items()}
        context = trainer.precision_plugin.train_step_context
        self.replays.append(replay_step(pl_module, batch, batch_idx, context=context))
        torch.testing.assert_close(pl_module.state_dict(), before, rtol=0, atol=0)
        assert trainer.global_step or not trainer.callback_metrics
        if self.replays[-1].origin is not None:
            trainer.should_stop = True
            return -1
        return None


def fit(module, batches, **options):
    callback = Replaying()
    trainer = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, **options},
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer, callback.replays


def test_manual_optimization_is_replayed_without_its_updates():
    _, (replay,) = fit(Adversarial(), [fault_zoo.batch()])
    assert (replay.origin.name, replay.origin.module, replay.origin.exact) == ("log", "", False)
    assert "manual" in replay.note
    trainer, replays = fit(Adversarial(bad=False), [fault_zoo.batch()] * 2)
    assert trainer.global_step == 4 and all(one.finite and one.complete for one in replays)


def test_within_a_trainer_nothing_is_logged(tmp_path):
    class Logging(fault_zoo.Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log_dict({"loss": loss, "again": loss})
            self.logger.experiment.add_scalar("x", 1.0)
            self.print("said")
            return loss

    logger = TensorBoardLogger(tmp_path)
    written = []
    logger.experiment.add_scalar = lambda *args, **kwargs: written.append(args)
    trainer, replays = fit(
        Logging(nn.Identity()), [fault_zoo.batch()] * 2, logger=logger, precision="bf16-mixed", log_every_n_steps=100
    )
    assert len(replays) == 4 and all(one.finite and one.complete for one in replays), replays
    assert trainer.loggers == [logger]
    assert [args[0] for args in written].count("x") == 4, "once a step, for real"


def test_a_step_that_breaks_off_gives_a_guess_and_says_so():
    class Breaking(fault_zoo.Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if not loss.isfinite():
                raise RuntimeError("diverged")
            return loss

    replay = replay_step(Breaking(fault_zoo.Calls(lambda x: torch.log(x - 2))), fault_zoo.batch(), 0)
    assert not replay.complete and "diverged" in replay.note
    assert (replay.origin.name, replay.origin.module, replay.origin.exact) == ("log", "tried", False)
    assert "diverged" in replay.origin.note


def test_compiled_modules_are_replayed_as_they_were_written():
    model = fault_zoo.Model(fault_zoo.Calls(lambda x: torch.log(x - 2)))
    model.tried.compile(backend="eager")
    replay = replay_step(model, fault_zoo.batch(), 0)
    assert (replay.origin.name, replay.origin.module) == ("log", "tried")
    assert "compile" in replay.note


def test_a_step_without_a_loss_or_without_parameters_is_no_error():
    model = fault_zoo.Model(nn.Identity())
    model.training_step = lambda batch, batch_idx: None
    assert replay_step(model, fault_zoo.batch(), 0).complete
    model.training_step = lambda batch, batch_idx: torch.ones(())
    assert "no parameter" in replay_step(model, fault_zoo.batch(), 0).note


def test_an_origin_survives_json():
    for fault in FAULTS[:2]:
        origin = run(fault).origin
        assert Origin.from_dict(json.loads(json.dumps(origin.to_dict()))) == origin
    with pytest.raises(ValueError, match="cause must be one of"):
        Origin.from_dict({"cause": "magic"})
    other = dataclasses.replace(origin, op="aten.exp.default", inputs=())
    assert [one.partition(":")[0] for one in origin.differences(other)] == ["op", "inputs"]


def test_at_least_thirteen_of_fourteen_are_named_exactly():
    """What :func:`test_a_fault_is_named` asks for one by one holds for more than the share that is promised."""
    named = [fault for fault in FAULTS if right(fault, run(fault))]
    assert len(named) / len(FAULTS) >= 13 / 14 and len(FAULTS) >= 14
