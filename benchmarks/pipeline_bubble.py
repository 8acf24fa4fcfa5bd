"""How much of a training step the ranks of a pipeline are idle, as measured, beside what the schedule makes inevitable.

    python benchmarks/pipeline_bubble.py --json bubble.json
    python benchmarks/pipeline_bubble.py --waiting-ranks 4 --compute-ranks --schedules 1f1b   # a part of it

All ranks run on this machine, with one thread each. Few of them can compute at the same time, but any number can wait:
so there is a model of wide linear layers, for as many ranks as there are processors, and one whose layers wait instead
of computing, for more ranks. What waits for the gradient of a weight is a part of the graph of its own, as the gradient
of a weight is, so that schedules which put it off find it.

Idle is what is left of ranks × time, from the start of the first pass to the end of the last one over all ranks, when
all forward and backward passes are taken off. With P ranks and M micro-batches, 1f1b cannot go below
(P − 1) / (M + P − 1), whatever the layers.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from pipeline import quiet_trainer
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.strategies.pipeline.timeline import COMPUTE
from danon_lightning.testing import run_distributed

SCHEDULES = ["1f1b", "gpipe", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv"]
COMPARED = ["1f1b", "interleaved_zero_bubble", "zbv"]
# So that a rank can have two stages.
LAYERS_PER_RANK = 2
# Of layers that compute there are more, so that transfers are short beside them, and the passes long: what disturbs a
# short one for a moment weighs much more, and each rank waits for the other's disturbances as well.
COMPUTING_LAYERS_PER_RANK, WIDTH, SAMPLES = 12, 2048, 256
# The first steps are slower than all others.
WARM_UP = 2


class Pass(Protocol):
    """What counts of a pass."""

    kind: str
    start: float
    end: float


def idle_share(ranks: Sequence[Sequence[Pass]]) -> float:
    """Of ranks × time.

    Args:
        ranks: What each has done in a step.
    """
    passes = [one for passes in ranks for one in passes if one.kind in COMPUTE]
    span = max(one.end for one in passes) - min(one.start for one in passes)
    return 1 - sum(one.end - one.start for one in passes) / (len(ranks) * span)


def least_idle(ranks: int, micro_batches: int) -> float:
    """The idle share of 1f1b and gpipe if all passes take equally long and nothing else takes any time."""
    return (ranks - 1) / (micro_batches + ranks - 1)


class _Wait(torch.autograd.Function):
    """Hands on what it gets, later."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(ctx.seconds)
        return gradients[0], None, None


class WaitingLayer(nn.Module):
    """Takes a time for its result, and as long for the gradient of its input, and for that of its weight."""

    def __init__(self, seconds: float) -> None:
        """Take the time."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Add the weight."""
        return _Wait.apply(x, self.seconds, self.seconds) + _Wait.apply(self.weight, 0.0, self.seconds)


class Stack(pl.LightningModule):
    """Layers of one kind."""

    def __init__(self, layers: int, seconds: float | None) -> None:
        """Make them: such as wait for some seconds, or for None such as compute."""
        super().__init__()
        # As after an embedding: the first layer, too, has to compute the gradient of its input.
        self.entrance = nn.Parameter(torch.zeros(1))
        self.layers = nn.ModuleList(
            nn.Linear(WIDTH, WIDTH) if seconds is None else WaitingLayer(seconds) for _ in range(layers)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Predict the input."""
        (x,) = batch
        y = x + self.entrance
        for layer in self.layers:
            y = layer(y)
        return nn.functional.mse_loss(y, x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, which costs next to nothing."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class IdleShares(pl.Callback):
    """Measures every step."""

    def __init__(self) -> None:
        """Start without any."""
        self.shares: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Have the step measured."""
        trainer.strategy.measure_pipeline()  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """See what was measured."""
        self.shares.append(idle_share(trainer.strategy.pipeline_timeline()))  # type: ignore[attr-defined]


def train(schedule: str, ranks: int, micro_batches: int, seconds: float | None, steps: int) -> list[float]:
    """Runs on each rank: the idle shares of the steps after the first ones.

    Args:
        schedule: Which.
        ranks: Those of the pipeline.
        micro_batches: Those of a step.
        seconds: How long the forward pass of a micro-batch through all layers of a rank waits; None for layers that
            compute.
        steps: How many are measured.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shares = IdleShares()
    of_rank = COMPUTING_LAYERS_PER_RANK if seconds is None else LAYERS_PER_RANK
    layers = of_rank * ranks
    of_stage = of_rank if schedule in ("1f1b", "gpipe") else of_rank // 2
    strategy = DanonHybridStrategy(
        pipeline_parallel_size=ranks,
        num_microbatches=micro_batches,
        schedule=schedule,
        stage_cut=range(of_stage, layers, of_stage),
    )
    trainer = quiet_trainer(strategy=strategy, devices=ranks, max_steps=WARM_UP + steps, callbacks=[shares])
    model = Stack(layers, None if seconds is None else seconds / LAYERS_PER_RANK)
    # Those who wait send little: there is no network to share between them.
    samples, width = (micro_batches * SAMPLES, WIDTH) if seconds is None else (micro_batches, 1)
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(samples * (WARM_UP + steps), width)), batch_size=samples))
    return shares.shares[WARM_UP:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute-ranks", type=int, nargs="*", default=[2], help="with layers that compute")
    parser.add_argument("--waiting-ranks", type=int, nargs="*", default=[2, 4, 8], help="with layers that wait")
    parser.add_argument("--micro-batches", type=int, help="of a step (default: twice the ranks, 8 at least)")
    parser.add_argument("--milliseconds", type=float, default=100, help="of waiting in a forward pass (default: 100)")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each (default: 4)")
    parser.add_argument("--schedules", nargs="*", choices=SCHEDULES, default=COMPARED, help="which")
    parser.add_argument("--json", help="write what was measured to this file")
    args = parser.parse_args()

    columns = "layers", "P", "M", Column("schedule", no_wrap=True), "idle", "least, most", "ideal", "idle / ideal"
    table = Table(*columns, title="idle: the median step; ideal: (P − 1) / (M + P − 1)")
    rows = []
    settings = [("compute", ranks, None) for ranks in args.compute_ranks]
    settings += [("wait", ranks, args.milliseconds / 1e3) for ranks in args.waiting_ranks]
    for layers, ranks, seconds in settings:
        micro_batches = args.micro_batches or max(8, 2 * ranks)
        for schedule in args.schedules:
            print(f"{ranks} ranks, layers that {layers}: {schedule}", flush=True)
            arguments = schedule, ranks, micro_batches, seconds, args.steps
            shares = run_distributed(train, ranks, *arguments, timeout=600)[0]
            median, ideal = statistics.median(shares), least_idle(ranks, micro_batches)
            table.add_row(
                layers, str(ranks), str(micro_batches), schedule, f"{median:.1%}",
                f"{min(shares):.1%}, {max(shares):.1%}", f"{ideal:.1%}", f"{median / ideal:.2f}",
            )  # fmt: skip
            row = {"layers": layers, "ranks": ranks, "micro_batches": micro_batches, "schedule": schedule}
            rows.append({**row, "idle": shares, "median": median, "ideal": ideal})
    Console().print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "results": rows}, file, indent=2)


if __name__ == "__main__":
    main()
