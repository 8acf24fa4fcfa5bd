"""Small LightningModules that go wrong at a step, for tests of the debugger."""

import io

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from danon_lightning.callbacks import NaNDebugger

FEATURES, SAMPLES = 6, 4


class Log(nn.Module):
    """Takes the logarithm of its absolute input; of its argument, where that is told to be negative."""

    def forward(self, x, negative=False):
        return torch.log(-x.abs() - 1 if negative else x.abs() + 1)


class Faulty(pl.LightningModule):
    """Two linear layers with a fault between them.

    Args:
        fault: "forward", "backward", "weight", "dropout" or "".
        at: Indices of the batches at which it happens.
        rank: On which rank; None for all.
    """

    def __init__(self, fault="", at=(2,), rank=None, optimizer="sgd", manual=False, lr=0.1, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.log_layer = nn.Linear(FEATURES, width), Log()
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 1)
        self.fault, self.at, self.bad_rank, self.lr = fault, at, rank, lr
        self.optimizer_name, self.automatic_optimization = optimizer, not manual

    def is_bad(self, batch_idx, fault):
        return self.fault == fault and batch_idx in self.at and self.bad_rank in (None, self.global_rank)

    def loss_of(self, batch, batch_idx):
        hidden = self.first(batch["x"])
        hidden = self.log_layer(hidden, negative=self.is_bad(batch_idx, "forward"))
        if self.is_bad(batch_idx, "backward"):
            hidden = hidden + (hidden * 0).clamp_min(0).sqrt()
        hidden = self.norm(hidden)
        loss = (self.last(hidden) - batch["y"]).square().mean()
        if self.is_bad(batch_idx, "dropout") and self.training:
            kept = nn.functional.dropout(torch.ones(64), 0.5)
            loss = loss + torch.log(kept[:1]).sum() * 0  # −inf · 0 in every second case
        if self.is_bad(batch_idx, "large"):
            loss = loss + 7e4 * self.last.bias.sum()
        if self.is_bad(batch_idx, "detached"):
            loss = loss + torch.full((), float("nan"))
        return loss

    def training_step(self, batch, batch_idx):
        loss = self.loss_of(batch, batch_idx)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.loss_of(batch, batch_idx)
        self.log("val/loss", loss)
        return loss

    def configure_optimizers(self):
        if self.optimizer_name == "adam":
            return torch.optim.Adam(self.parameters(), lr=self.lr)
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def batches(count=6, rank=0, change=None):
    """Batches that differ by rank; ``change(index, batch)`` may spoil them."""
    generator = torch.Generator().manual_seed(rank)
    made = []
    for index in range(count):
        batch = {
            "x": torch.randn(SAMPLES, FEATURES, generator=generator),
            "y": torch.randn(SAMPLES, 1, generator=generator),
        }
        if change is not None:
            change(index, batch)
        made.append(batch)
    return DataLoader(made, batch_size=None)


def debugger(policy="raise", **options):
    """A debugger whose console can be read: ``it.printed()``."""
    text = io.StringIO()
    made = NaNDebugger(policy, console=Console(file=text, width=160), **options)
    made.printed = text.getvalue
    return made


def trainer(*callbacks, **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
