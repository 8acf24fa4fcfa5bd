"""The exchange beside the next forward pass, with Lightning: the same run, to the bit."""

import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from plain_module import loader, trainer_with  # noqa: E402

from danon_lightning.callbacks import CommunicationMonitor  # noqa: E402
from danon_lightning.strategies import DanonHybridStrategy, GradientCommunicator  # noqa: E402
from danon_lightning.strategies.overlap.due_step import DueStep  # noqa: E402
from danon_lightning.strategies.overlap.send_order import SendOrder  # noqa: E402
from danon_lightning.testing import RankFailedError, run_distributed  # noqa: E402

SECONDS_A_BUCKET = 0.003


class Twisted(pl.LightningModule):
    """Uses weights in many ways: tied ones, those of other modules, some twice, some outside of all modules."""

    def __init__(self, optimizer="sgd", scheduled=True):
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(20, 24)
        self.norm = nn.BatchNorm1d(24)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.twice = nn.Linear(24, 24)
        self.deep = nn.Sequential(*[nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(4)])
        self.last = nn.Linear(24, 20)
        self.scale = nn.Parameter(torch.ones(24))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
        self.double()

    def forward(self, x):
        penalty = 1e-3 * self.deep[2][0].weight.square().sum()
        x = self.norm(self.first(x))
        x = x + self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]
        x = self.deep(self.twice(torch.tanh(self.twice(x)))) * self.scale
        x = self.last(x)
        tied = nn.functional.linear(x, self.first.weight)
        return x.mean(dim=1, keepdim=True) + tied.mean(dim=1, keepdim=True), penalty

    def training_step(self, batch, batch_idx):
        x, y = batch
        prediction, penalty = self(x)
        loss = (prediction - y).square().mean() + penalty
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", (self(x)[0] - y).square().mean(), sync_dist=True)

    def layers_in_question(self):
        return self.deep.state_dict()  # of a part, which has hooks of its own

    def configure_optimizers(self):
        if self.hparams.optimizer == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        else:
            special = [self.scale, *self.norm.parameters()]
            rest = [p for p in self.parameters() if all(p is not other for other in special)]
            optimizer = torch.optim.AdamW([{"params": special, "weight_decay": 0.0}, {"params": rest}], lr=1e-2)
        if not self.hparams.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=60)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Slow:
    """Buckets take their time, and parts of steps are counted."""

    def __init__(self):
        self.parts = 0
        self.released = []

    def __enter__(self):
        self._average, self._take, self._agree = GradientCommunicator._average, DueStep.take, SendOrder.agree

        def average(communicator, bucket):
            time.sleep(SECONDS_A_BUCKET)
            self._average(communicator, bucket)

        def take(step, ids):
            self.parts += 1
            self._take(step, ids)

        def agree(order):
            self._agree(order)
            self.released.append(order.released)

        GradientCommunicator._average, DueStep.take, SendOrder.agree = average, take, agree
        return self

    def __exit__(self, *_):
        GradientCommunicator._average, DueStep.take, SendOrder.agree = self._average, self._take, self._agree


class Losses(pl.Callback):
    """Looks at nothing but losses, and says so."""

    def __init__(self):
        self.losses = []

    def reads_between_steps(self, trainer):
        return False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def fit(overlap, *, module=None, callbacks=(), ckpt_path=None, **options):
    torch.manual_seed(0)
    module, losses = module or Twisted(), Losses()
    strategy = DanonHybridStrategy(overlap_forward=overlap, bucket_cap_mb=0.002)
    trainer = trainer_with(
        strategy, ranks=2, num_sanity_val_steps=0, callbacks=[losses, *callbacks], **{"max_epochs": 2, **options}
    )
    data = loader(2, "float64", rank=trainer.global_rank, ranks=2)
    few = DataLoader(data.dataset, batch_size=8)
    trainer.fit(module, data, few, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer, module, losses.losses


def result_of(trainer, module, losses):
    state = {f"weights.{name}": tensor for name, tensor in module.state_dict().items()}
    for index, values in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"state.{index}.{name}": value for name, value in values.items()}
    return {name: value.clone() for name, value in state.items()}, losses, dict(trainer.callback_metrics)


RUNS = {
    "sgd": {"val_check_interval": 3},
    "accumulated": {"accumulate_grad_batches": 3, "max_epochs": 1},
    "averaged": {"max_epochs": 1},
    "looked at": {"max_epochs": 1},
}


class Looking(pl.Callback):
    """May look at anything, and does."""

    def __init__(self):
        self.seen = []

    def on_after_backward(self, trainer, pl_module):
        self.seen.append(float(sum(p.grad.square().sum() for p in pl_module.parameters())))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(float(sum(p.detach().square().sum() for p in pl_module.parameters())))


class Averaging(pl.callbacks.WeightAveraging):
    """Lightning's."""

    def __init__(self):
        super().__init__(avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.7))


class Saving(pl.Callback):
    """Saves in mid-epoch, in a hook of which it says that nothing is looked at: what is written looks by itself."""

    def __init__(self, path):
        self.path = path
        self.weights = {}

    def reads_between_steps(self, trainer):
        return False

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step not in (5, 7):
            return
        overlap = trainer.strategy._overlap
        assert overlap is None or overlap._due is not None  # in the middle of a step
        if trainer.global_step == 7:
            trainer.save_checkpoint(self.path)
        else:
            self.weights = {name: tensor.clone() for name, tensor in pl_module.layers_in_question().items()}


def train_in_all_ways(folder):
    found = {}
    for name, options in RUNS.items():
        runs, parts = [], []
        for overlap in (False, True):
            extra = {"averaged": [Averaging()], "looked at": [Looking()]}.get(name, [])
            with Slow() as slow:
                trainer, module, losses = fit(overlap, callbacks=extra, **options)
            state, losses, metrics = result_of(trainer, module, losses)
            seen = extra[0].seen if name == "looked at" else []
            runs.append((state, losses, metrics, seen))
            parts.append(slow.parts)
            stats = trainer.strategy.communication_stats()
            if name == "sgd" and overlap:
                found["stats"] = stats, trainer.global_step, slow.released
                assert len(trainer.callbacks) == 1  # ours is gone
        found[name] = runs, parts, trainer.global_step
    runs = []
    for overlap in (False, True):
        path = f"{folder}/{overlap}.ckpt"
        saving = Saving(path)
        with Slow():
            monitor = CommunicationMonitor(4, warm_up_steps=0)
            whole = fit(overlap, module=Twisted("adamw"), callbacks=[saving, monitor])
            again = fit(overlap, module=Twisted("adamw"), ckpt_path=path)
        metrics = monitor.get_performance_metrics()
        saved = torch.load(path, weights_only=True)
        runs.append((result_of(*whole), result_of(*again), saved, saving.weights, metrics))
    found["adamw"] = runs
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_training_is_the_same_to_the_bit(tmp_path):
    by_rank = run_distributed(train_in_all_ways, 2, str(tmp_path), timeout=200)
    for found in by_rank:
        for name in RUNS:
            (ordinary, overlapped), parts, steps = found[name]
            assert_same(ordinary[0], overlapped[0])
            assert ordinary[1] == overlapped[1], name
            assert_same(ordinary[2], overlapped[2])
            assert ordinary[3] == overlapped[3], name
            assert parts[0] == 0
            if name in ("averaged", "looked at"):
                assert parts[1] == 0  # all of each step at once
            else:
                assert parts[1] > 2 * steps, name
        (ordinary, ordinary_again, saved, read, _) = found["adamw"][0]
        (overlapped, overlapped_again, saved_late, read_late, metrics) = found["adamw"][1]
        assert read
        assert_same(read, read_late)
        assert_same(ordinary[0], overlapped[0])
        assert_same(ordinary_again[0], overlapped_again[0])
        assert ordinary[1] == overlapped[1]
        assert ordinary_again[1] == overlapped_again[1]
        assert_same(saved["state_dict"], saved_late["state_dict"])
        for one, other in zip(
            saved["optimizer_states"][0]["state"].values(), saved_late["optimizer_states"][0]["state"].values(),
            strict=True,
        ):  # fmt: skip
            assert_same(one, other)
        assert saved["lr_schedulers"][0]["last_epoch"] == saved_late["lr_schedulers"][0]["last_epoch"] == 7
        assert metrics["communication_time"] > 0
        stats, steps, released = found["stats"]
        assert stats["steps"] == steps
        assert stats["exposed_seconds"] > 0
        assert stats["exposed_seconds"] + stats["hidden_seconds"] > 10 * steps * SECONDS_A_BUCKET
        assert released[0] is None
        assert released[-1] >= 1  # how many that are depends on time
    assert by_rank[0]["stats"][2] == by_rank[1]["stats"][2]
    one, other = (
        {name: value for name, value in found["sgd"][0][1][0].items() if "running" not in name} for found in by_rank
    )
    assert_same(one, other)


class Broken(Twisted):
    def training_step(self, batch, batch_idx):
        if (self.global_rank, self.global_step) == (1, 3):
            raise ZeroDivisionError("of this rank alone")
        return super().training_step(batch, batch_idx)


def fail():
    start = time.monotonic()
    try:
        with Slow():
            fit(True, module=Broken())
    except ZeroDivisionError:
        raise
    except BaseException as error:
        print("gave up after", time.monotonic() - start)
        raise RuntimeError(f"noticed: {error}") from error


def test_a_rank_that_fails_keeps_no_other_waiting():
    start = time.monotonic()
    with pytest.raises(RankFailedError, match="of this rank alone") as caught:
        run_distributed(fail, 2, timeout=60)
    assert caught.value.rank == 1
    assert time.monotonic() - start < 50
