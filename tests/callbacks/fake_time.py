"""A clock that stands still unless something takes time, and a module whose parts take known times."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from danon_lightning.callbacks.performance_monitor.clocks import HostClock


class FakeTime:
    def __init__(self):
        self.seconds = 0.0

    def passes(self, seconds):
        self.seconds += seconds

    def clock(self):
        return HostClock(lambda: self.seconds)


class TimedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, time, seconds):
        ctx.time, ctx.seconds = time, seconds
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.time.passes(ctx.seconds)
        return gradient, None, None


class TimedSGD(torch.optim.SGD):
    def __init__(self, parameters, time, seconds):
        super().__init__(parameters, lr=0.1)
        self.time, self.seconds = time, seconds

    def step(self, closure=None):
        loss = super().step(closure)
        self.time.passes(self.seconds)
        return loss


class Samples(Dataset):
    """Tokens [6] of a vocabulary of 7."""

    def __init__(self, time, seconds, size=8):
        self.time, self.seconds, self.size = time, seconds, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.time.passes(self.seconds)
        return torch.full((6,), index % 7), torch.tensor(float(index))


class Timed(pl.LightningModule):
    """A batch of 2 takes 2 s to fetch (unless told otherwise), 1 s to move, 4 s forward, 8 s backward; a step 16 s."""

    def __init__(self, time, *, fetching=1.0):
        super().__init__()
        self.time, self.fetching = time, fetching
        self.weight = torch.nn.Parameter(torch.ones(6))

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.time.passes(1.0)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def loss(self, batch):
        tokens, targets = batch
        self.time.passes(4.0)
        weight = TimedBackward.apply(self.weight, self.time, 8.0)
        return ((tokens * weight).sum(1) - targets).square().mean() * 1e-4

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.time.passes(1000.0)

    def configure_optimizers(self):
        return TimedSGD(self.parameters(), self.time, 16.0)

    def train_dataloader(self):
        return DataLoader(Samples(self.time, self.fetching), batch_size=2)

    def val_dataloader(self):
        return DataLoader(Samples(self.time, 100.0, 2), batch_size=2)


class Manual(Timed):
    """The same by manual optimization."""

    def __init__(self, time, **options):
        super().__init__(time, **options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Slow(pl.Callback):
    """Another callback, that takes its time after each batch."""

    def __init__(self, time, seconds):
        self.time, self.seconds = time, seconds

    def on_train_batch_end(self, *args):
        self.time.passes(self.seconds)


class Kept(pl.loggers.logger.DummyLogger):
    """Remembers what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.metrics = {}

    def log_metrics(self, metrics, step=None):
        self.metrics.setdefault(step, {}).update(metrics)

    def of(self, prefix):
        """step → tag without prefix → value"""
        found = {
            step: {tag.removeprefix(prefix): value for tag, value in values.items() if tag.startswith(prefix)}
            for step, values in self.metrics.items()
        }
        return {step: values for step, values in found.items() if values}


def fit(module, callbacks, *, folder=None, logger=None, **options):
    """Returns the logger."""
    kept = logger or Kept()
    defaults = {"accelerator": "cpu", "max_epochs": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = pl.Trainer(
        logger=kept, callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, num_sanity_val_steps=0, **{**defaults, **options},
    )  # fmt: skip
    trainer.fit(module)
    assert "start" not in vars(trainer.profiler)
    return kept
