"""How long a training step of a pipeline takes in each schedule, beside one process, and what its ranks do meanwhile.

    python benchmarks/pipeline.py                                   # all schedules, two ranks
    python benchmarks/pipeline.py --only 1f1b --plot timeline.png   # the picture of a step

The model is a stack of wide layers, so that computing takes most of the time. All ranks run on this machine, with one
thread each: with fewer processors than ranks they take turns, and nothing can be gained. The picture is that of the
last step of the first schedule.
"""

import argparse
import statistics
import time
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from danon_lightning.callbacks import PipelineTimeline
from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import run_distributed

WIDTH, LAYERS, BATCH = 1024, 8, 2048
SCHEDULES = ["1f1b", "gpipe", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv"]


class Stack(pl.LightningModule):
    """Layers of one size."""

    def __init__(self) -> None:
        """Make them."""
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)])

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Predict the input."""
        (x,) = batch
        y = x
        for layer in self.layers:
            y = layer(y)
        return nn.functional.mse_loss(y, x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, which costs next to nothing."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class StepTimes(pl.Callback):
    """How long steps take."""

    def __init__(self) -> None:
        """Start without any."""
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._start)


def quiet_trainer(**options: Any) -> pl.Trainer:
    """A Trainer on the CPU that does nothing but train."""
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **options,
    )  # fmt: skip


def train(schedule: str | None, ranks: int, micro_batches: int, steps: int, plot: str | None) -> float:
    """Runs on each rank: the median of the step times without the first three, in seconds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    times = StepTimes()
    callbacks: list[pl.Callback] = [times]
    strategy: Any = "auto"
    if schedule is not None:
        strategy = DanonHybridStrategy(
            pipeline_parallel_size=ranks, num_microbatches=micro_batches, schedule=schedule
        )  # fmt: skip
        if plot is not None:
            callbacks.append(PipelineTimeline(every_n_steps=steps, path=plot))
    trainer = quiet_trainer(strategy=strategy, devices=ranks, max_steps=steps, callbacks=callbacks)
    trainer.fit(Stack(), DataLoader(TensorDataset(torch.randn(BATCH * steps, WIDTH)), batch_size=BATCH))
    return statistics.median(times.seconds[3:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the pipeline (default: 2)")
    parser.add_argument("--micro-batches", type=int, default=8, help="micro-batches of a batch (default: 8)")
    parser.add_argument("--steps", type=int, default=10, help="training steps of each (default: 10)")
    parser.add_argument("--only", nargs="*", choices=SCHEDULES, default=SCHEDULES, help="which schedules")
    parser.add_argument("--plot", help="draw a step of the first one into this PNG file")
    args = parser.parse_args()

    one = run_distributed(train, 1, None, 1, 1, args.steps, None, timeout=600)[0]
    table = Table("schedule", "seconds a step", f"of one process ({one:.3f} s)", "idle at least")
    for number, schedule in enumerate(args.only):
        plot = args.plot if number == 0 else None
        seconds = run_distributed(train, args.ranks, schedule, args.ranks, args.micro_batches, args.steps, plot)[0]
        idle = (args.ranks - 1) / (args.micro_batches + args.ranks - 1)
        known = f"{idle:.0%}" if schedule in ("1f1b", "gpipe") else ""
        table.add_row(schedule, f"{seconds:.3f}", f"{seconds / one:.2f}", known)
    Console().print(table)


if __name__ == "__main__":
    main()
