"""What GradientMonitor costs, and how close its noise scale comes to a known truth.

    OMP_NUM_THREADS=1 python benchmarks/gradient_monitor.py                 # ten minutes
    python benchmarks/gradient_monitor.py --rounds 4 --json monitor.json

The cost: a transformer of 26 million parameters is trained with AdamW on the CPU, in one run. Steps take turns: one
without the callback, one that it does not log, one that it logs, with everything it measures by default (local
gradients too, for each step has two micro-batches) and TensorBoard as logger. From these times follows what logging
every tenth step costs, against all steps that are not logged. The heat map and its plot, made every 500 steps, are
timed by themselves and added.

The noise scale: the gradients of samples are G + ε with known G and known covariance of ε.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from danon_lightning.callbacks import GradientMonitor

WIDTH, LAYERS, VOCABULARY = 512, 8, 1024
MICRO_BATCHES, LENGTH = 2, 128
EVERY, DRAW_EVERY = 10, 500
KINDS = ("without", "not logged", "logged")
WARM_UP = 2  # rounds
NEVER = 1 << 60


class Transformer(pl.LightningModule):
    """Predicts the next of random tokens."""

    def __init__(self) -> None:
        """Make it."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        (tokens,) = batch
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1] - 1)
        hidden = self.body(self.embedding(tokens[:, :-1]), mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class InTurns(pl.Callback):
    """Passes hooks on to a monitor in two of three steps, and takes the time of each."""

    def __init__(self, monitor: GradientMonitor) -> None:
        """Start."""
        self.monitor = monitor
        self.wall: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.kind = KINDS[0]

    def on_fit_start(self, *args: Any) -> None:
        """As always."""
        self.monitor.on_fit_start(*args)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock with the first micro-batch."""
        if batch_idx % MICRO_BATCHES == 0:
            self.kind = KINDS[trainer.global_step % len(KINDS)]
            self.monitor.every_n_steps = 1 if self.kind == "logged" else NEVER
            if self.kind == "without":
                self.monitor._remove()
            elif not self.monitor._handles:
                self.monitor.on_train_start(trainer, module)
            self.started = time.perf_counter(), time.process_time()
        if self.kind != "without":
            self.monitor.on_train_batch_start(trainer, module, batch, batch_idx)

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Pass it on."""
        if self.kind != "without":
            self.monitor.on_before_optimizer_step(*args)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock with the last micro-batch."""
        if self.kind != "without":
            self.monitor.on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if (batch_idx + 1) % MICRO_BATCHES == 0:
            wall, cpu = self.started
            self.wall[self.kind].append(time.perf_counter() - wall)
            self.cpu[self.kind].append(time.process_time() - cpu)


def cost(rounds: int, samples: int) -> dict[str, Any]:
    """Train, and compare."""
    torch.manual_seed(0)
    module = Transformer()
    steps = len(KINDS) * (rounds + WARM_UP)
    tokens = torch.randint(0, VOCABULARY, (steps * MICRO_BATCHES * samples, LENGTH + 1))
    turns = InTurns(GradientMonitor(draw_every_n_steps=NEVER))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, accumulate_grad_batches=MICRO_BATCHES,
            gradient_clip_val=1.0, callbacks=[turns], logger=TensorBoardLogger(folder), enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(tokens), samples))
        start = time.perf_counter()
        turns.monitor._draw(trainer, steps)
        drawing = time.perf_counter() - start
        trainer.logger.experiment.close()  # a thread of its own writes
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "tokens a step": MICRO_BATCHES * samples * LENGTH,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "seconds to draw": drawing,
    }
    for clock, times in (("wall", turns.wall), ("cpu", turns.cpu)):
        kept = {kind: times[kind][WARM_UP:] for kind in KINDS}
        # Whatever else the machine does adds to times, so the fastest step says most on a busy one.
        for name, of in (("median", statistics.median), ("fastest", min)):
            seconds = {kind: of(kept[kind]) for kind in KINDS}
            # With a callback that does nothing but count, steps take no longer: what differs is chance.
            ordinary = of(kept["without"] + kept["not logged"])
            ratio = (EVERY - 1 + seconds["logged"] / ordinary) / EVERY
            result[f"{clock}, {name}"] = {
                "seconds": seconds,
                "logged": seconds["logged"] / ordinary,
                "every tenth": ratio,
                "every tenth, with pictures": ratio + drawing / DRAW_EVERY / ordinary,
            }
    result["all"] = {"wall": turns.wall, "cpu": turns.cpu}
    return result


class Vector(pl.LightningModule):
    """The gradient is the mean of the batch."""

    def __init__(self, size: int) -> None:
        """Make it."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Linear in the weights."""
        return (batch[0] @ self.weight).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any will do."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def noise(truth: float, size: int = 2000, samples: int = 8, steps: int = 400) -> float:
    """The noise scale that the callback finds, in samples."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(size, generator=generator)
    deviation = float((truth * signal.square().sum() / size).sqrt())
    data = signal + deviation * torch.randn(steps * MICRO_BATCHES * samples, size, generator=generator)
    monitor = GradientMonitor(1, noise_decay=0.995, heat_map=False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=MICRO_BATCHES, callbacks=[monitor],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Vector(size), DataLoader(TensorDataset(data), samples))
    found = monitor.noise.in_samples
    assert found is not None
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of three steps each (20)")
    parser.add_argument("--samples", type=int, default=2, help="in a micro-batch (2)")
    parser.add_argument("--truths", type=float, nargs="*", default=[4.0, 40.0, 400.0], help="noise scales, in samples")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    if args.rounds < 1 or args.samples < 1:
        sys.exit("--rounds and --samples must be at least 1")
    results: dict[str, Any] = {"noise": {truth: noise(truth) for truth in args.truths}}
    results["cost"] = cost(args.rounds, args.samples)

    console = Console()
    table = Table("noise scale put in, samples", "found", "error")
    for truth, found in results["noise"].items():
        table.add_row(f"{truth:g}", f"{found:.4g}", f"{found / truth - 1:+.1%}")
    if results["noise"]:
        console.print(table)
    measured = results["cost"]
    console.print(
        f"{measured['parameters'] / 1e6:.1f} M parameters, {measured['tokens a step']} tokens a step, "
        f"{measured['threads']} thread(s), {measured['rounds']} rounds"
    )
    table = Table("clock", *(f"{kind}, s" for kind in KINDS), "logged", "every 10th", "with pictures")
    for clock in ("wall, median", "wall, fastest", "cpu, median", "cpu, fastest"):
        row = measured[clock]
        table.add_row(
            clock,
            *(f"{row['seconds'][kind]:.3f}" for kind in KINDS),
            f"{row['logged'] - 1:+.1%}",
            f"{row['every tenth'] - 1:+.2%}",
            f"{row['every tenth, with pictures'] - 1:+.2%}",
        )
    console.print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
