"""Pipelines on a cluster with slow links, beside replicas of the whole model, and the arithmetic that tells which wins.

    python benchmarks/pipeline_cluster.py                     # as root on Linux: two emulated hosts with two ranks each
    python benchmarks/pipeline_cluster.py --mbit 100

The model has many parameters for its activations: the gradients of a step are larger than what passes between layers.
Beside the measured times stands what each node sends in a step, by arithmetic and by the counter of its interface, and
how long that takes at the rate of the link.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from pipeline import LAYERS, WIDTH, Stack, StepTimes, quiet_trainer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import EmulatedHosts, run_distributed

BATCH, MICRO_BATCHES, NODES, RANKS = 512, 4, 2, 2
GRADIENTS = 4 * LAYERS * (WIDTH * WIDTH + WIDTH)
ACTIVATIONS = 4 * BATCH * WIDTH
# What a node sends in a step, in bytes.
SENT = {
    # gloo's ring over 4 ranks: each sends 2·3/4 of the gradients to the next one, which for one of two is remote.
    "4 replicas, ddp": 2 * 3 / 4 * GRADIENTS,
    # Summed inside the node; each node then sends half of the sums, and half of the means.
    "4 replicas, danon_hybrid": GRADIENTS,
    # Two groups of replicas, one for each half of the model.
    "2 stages inside nodes × 2 replicas": GRADIENTS,
    # The batch goes to the other node between two layers, and its gradients come back.
    "2 stages across nodes × 2 replicas": ACTIVATIONS,
}


def make_strategy(name: str) -> Any:
    """The strategy of a row."""
    if name.startswith("4 replicas, "):
        return name.removeprefix("4 replicas, ")
    placement: Any = "inside_nodes" if "inside" in name else "across_nodes"
    return DanonHybridStrategy(
        pipeline_parallel_size=2, num_microbatches=MICRO_BATCHES, pipeline_placement=placement, hierarchical="auto"
    )


def train(name: str, steps: int) -> tuple[float, float]:
    """Runs on each rank: the median of the step times without the first three (s); bytes its node has sent a step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    times, counter = StepTimes(), SentBytes()
    strategy = make_strategy(name)
    callbacks = [times, counter]
    trainer = quiet_trainer(strategy=strategy, devices=RANKS, num_nodes=NODES, max_steps=steps, callbacks=callbacks)
    replicas = 4 if name.startswith("4 replicas") else 2
    samples = TensorDataset(torch.randn(BATCH * steps, WIDTH))
    trainer.fit(Stack(), DataLoader(samples, batch_size=BATCH // replicas))
    return statistics.median(times.seconds[3:]), statistics.median(counter.sent[3:])


class SentBytes(pl.Callback):
    """What the interface of this host sends from step to step."""

    def __init__(self) -> None:
        """Start without any."""
        self.sent: list[int] = []
        [self._file] = (
            path / "statistics" / "tx_bytes" for path in Path("/sys/class/net").iterdir() if path.name != "lo"
        )

    def on_train_batch_start(self, *args: Any) -> None:
        """Read the counter."""
        self._before = int(self._file.read_text())

    def on_train_batch_end(self, *args: Any) -> None:
        """Read it again."""
        self.sent.append(int(self._file.read_text()) - self._before)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=1000, help="rate of each link in Mbit/s (default: 1000)")
    parser.add_argument("--steps", type=int, default=15, help="training steps of each (default: 15)")
    parser.add_argument("--only", default="", help="the layouts whose name contains this")
    parser.add_argument("--json", type=Path, help="write the numbers into this file")
    args = parser.parse_args()

    rate = args.mbit * 1e6 / 8
    rows: dict[str, dict[str, float]] = {}
    for name, sent in SENT.items():
        if args.only not in name:
            continue
        with EmulatedHosts(NODES, rate_mbit=args.mbit) as hosts:
            found = run_distributed(train, NODES * RANKS, name, args.steps, hosts=hosts, timeout=600)
        seconds, counted = (max(column) for column in zip(*found, strict=True))
        rows[name] = {"seconds": seconds, "sent": sent, "counted": counted, "at_link_rate": sent / rate}
    base = rows.get("4 replicas, ddp", {}).get("seconds")
    columns = "layout", "a node sends (MB)", "as counted", "at the link's rate (s)", "step (s)", "ddp ÷ this"
    table = Table(*columns, title=f"2 × 2 ranks at {args.mbit:g} Mbit/s, {GRADIENTS / 4e6:.1f} M parameters")
    for name, row in rows.items():
        sizes = f"{row['sent'] / 1e6:.2f}", f"{row['counted'] / 1e6:.2f}"
        ratio = f"{base / row['seconds']:.2f}" if base else ""
        table.add_row(name, *sizes, f"{row['at_link_rate']:.3f}", f"{row['seconds']:.3f}", ratio)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"mbit": args.mbit, "results": rows}, indent=2))


if __name__ == "__main__":
    main()
