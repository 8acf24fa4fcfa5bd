"""What PerformanceMonitor and CommunicationMonitor cost a training step on this machine's processor.

    python benchmarks/monitors_cost.py --json monitors.json
    python benchmarks/monitors_cost.py --layers 1 --width 64 --pairs 30   # small steps, to see the cost itself

One run of one process trains a stack of transformer layers. Blocks of steps with both monitors and without them take
turns, so that what else the machine does meets both alike; every second pair begins with the monitors. The ratio is
that of the two blocks of a pair, the median over all pairs. Processor time says the same without what other processes
take away. The monitors write to TensorBoard's files.
"""

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from danon_lightning.callbacks import CommunicationMonitor, PerformanceMonitor

VOCABULARY = 1000


class Tokens(Dataset[Tensor]):
    """Random tokens [length], the same each time."""

    def __init__(self, samples: int, length: int) -> None:
        """Draw them."""
        self.tokens = torch.randint(0, VOCABULARY, (64, length), generator=torch.Generator().manual_seed(0))
        self.samples = samples

    def __len__(self) -> int:
        """How many."""
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        """One sample."""
        return self.tokens[index % 64]


class Model(pl.LightningModule):
    """Transformer layers that predict each token."""

    def __init__(self, layers: int, width: int) -> None:
        """Make them."""
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, batch_first=True, dropout=0.0)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss."""
        logits = self.head(self.body(self.embedding(batch)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class TakeTurns(pl.Callback):
    """Brings the monitors in for every other block of steps, and takes the time. Must be the last callback."""

    def __init__(self, every_n_steps: int, block: int) -> None:
        """Start without them."""
        self.every_n_steps, self.block = every_n_steps, block
        self.watched: list[bool] = []
        self.seconds: list[tuple[float, float]] = []
        self._monitors: list[Any] = []
        self._begin = 0.0, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Change over at the end of a block."""
        done = trainer.global_step // self.block
        if trainer.global_step % self.block:
            return
        if done > 1:  # the first block warms up
            self.seconds.append((time.perf_counter() - self._begin[0], time.process_time() - self._begin[1]))
            self.watched.append(bool(self._monitors))
        for monitor in self._monitors:
            monitor.on_train_end(trainer, pl_module)
        # 0 1 | 1 0 | 0 1 | …
        watch = (done - 1) % 4 in (1, 2)
        self._monitors = []
        if watch:
            self._monitors = [
                monitor(self.every_n_steps, warm_up_steps=0) for monitor in (PerformanceMonitor, CommunicationMonitor)
            ]
        trainer.callbacks = [*self._monitors, self]
        for monitor in self._monitors:
            monitor.on_train_start(trainer, pl_module)
        self._begin = time.perf_counter(), time.process_time()


def measure(layers: int, width: int, batch: int, length: int, every: int, block: int, pairs: int) -> dict[str, Any]:
    """Train.

    Args:
        layers: Of the model.
        width: Of the model.
        batch: Samples.
        length: Tokens of a sample.
        every: After how many steps the monitors log.
        block: How many steps there are between changes.
        pairs: How many blocks with the monitors, and how many without.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    turns = TakeTurns(every, block)
    steps = block * (1 + 2 * pairs)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, logger=TensorBoardLogger(folder), callbacks=[turns],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        model = Model(layers, width)
        trainer.fit(model, DataLoader(Tokens(steps * batch, length), batch_size=batch))
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for index, clock in enumerate(("wall", "processor")):
        times = [seconds[index] for seconds in turns.seconds]
        ratios, extra = [], []
        for first in range(0, 2 * pairs, 2):
            with_them, without = sorted(range(first, first + 2), key=lambda at: not turns.watched[at])
            assert turns.watched[with_them] and not turns.watched[without]
            ratios.append(times[with_them] / times[without])
            extra.append((times[with_them] - times[without]) / block)
        plain = [seconds / block for seconds, watched in zip(times, turns.watched, strict=True) if not watched]
        found[clock] = {
            "step_seconds": statistics.median(plain),
            "ratios": ratios,
            "median_ratio": statistics.median(ratios),
            "extra_seconds": statistics.median(extra),
        }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="of the model (default: 8, with 26 M parameters)")
    parser.add_argument("--width", type=int, default=512, help="of the model (default: 512)")
    parser.add_argument("--batch", type=int, default=4, help="samples (default: 4)")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sample (default: 32)")
    parser.add_argument("--every", type=int, default=10, help="steps from log to log (default: 10)")
    parser.add_argument("--block", type=int, default=20, help="steps between changes (default: 20)")
    parser.add_argument("--pairs", type=int, default=8, help="of blocks with and without monitors (default: 8)")
    parser.add_argument("--json", help="write what was measured to this file")
    args = parser.parse_args()

    found = measure(args.layers, args.width, args.batch, args.length, args.every, args.block, args.pairs)
    table = Table(title=f"both monitors every {args.every} steps, {found['parameters'] / 1e6:.1f} M parameters")
    for column in ("time", "step without", "median ratio", "lowest, highest", "cost of a step"):
        table.add_column(column)
    for clock in ("wall", "processor"):
        one = found[clock]
        table.add_row(
            clock, f"{one['step_seconds'] * 1e3:.2f} ms", f"{one['median_ratio']:.4f}",
            f"{min(one['ratios']):.4f}, {max(one['ratios']):.4f}", f"{one['extra_seconds'] * 1e6:.0f} µs",
        )  # fmt: skip
    Console().print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "results": found}, file, indent=2)


if __name__ == "__main__":
    main()
