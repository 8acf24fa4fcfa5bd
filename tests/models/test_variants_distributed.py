"""Every variant over several ranks: as pipeline stages, and in Lightning's own DDP."""

import os

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from danon_lightning import models
from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import run_distributed

SMALL = {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "max_sequence_length": 64}
PARTS = {
    "msra": {"block_size": 4, "compression_factor": 2},
    "dala": {"block_size": 4, "memory_size": 6},
    "ucsa": {"block_size": 4, "local_window_size": 4, "global_tokens": 2},
}
VARIANTS = {
    "MSRALightning": PARTS["msra"],
    "DALALightning": PARTS["dala"],
    "UCSALightning": PARTS["ucsa"],
    "InfiniteLightning": {"local_window": 8, "sliding_window": 16, "compression_ratio": 0.5},
    "SuperHybridLightning": {"components": "msra+dala,ucsa", "settings": PARTS},
}


class Losses(pl.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def train(strategy_of, length, precision):
    """Train each variant a few steps and return the losses of each step."""
    ranks, found = int(os.environ.get("WORLD_SIZE", 1)), {}
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (8, length + 1), generator=generator)
    for name, settings in VARIANTS.items():
        torch.manual_seed(0)
        module = getattr(models, name)({**SMALL, **settings}, {"learning_rate": 1e-2, "warmup_steps": 1})
        losses = Losses()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy=strategy_of(ranks),
            precision=precision,
            max_epochs=2,
            logger=False,
            callbacks=[losses],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, DataLoader(tokens, batch_size=4))
        found[name] = losses.values
    return found


def in_stages(ranks):
    return DanonHybridStrategy(pipeline_parallel_size=ranks, num_microbatches=2) if ranks > 1 else "auto"


def in_ddp(ranks):
    return "ddp" if ranks > 1 else "auto"


@pytest.mark.filterwarnings("ignore:num_levels is fixed")
def test_stages_train_as_one_process():
    expected = train(in_stages, 40, "64-true")
    for found in run_distributed(train, 2, in_stages, 40, "64-true", timeout=250):
        for name, losses in expected.items():
            assert found[name] == pytest.approx(losses, rel=1e-10), name
            assert losses[-1] < losses[0], name


@pytest.mark.slow
def test_short_sequences_leave_no_parameter_without_a_gradient_in_ddp():
    expected = train(in_ddp, 3, "64-true")
    for found in run_distributed(train, 2, in_ddp, 3, "64-true", timeout=250):
        for name, losses in expected.items():
            assert found[name] == pytest.approx(losses, rel=1e-10), name
