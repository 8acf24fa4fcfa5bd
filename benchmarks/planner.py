"""What danon-plan predicts, beside what is measured: step time and memory of eight layouts of two models.

    python benchmarks/planner.py --json planner.json
    python benchmarks/planner.py --models narrow --layouts 0 3 --steps 4   # a part of it

Four ranks run on two emulated hosts of two (root on Linux; on loopback elsewhere, where links are not shaped). Layers
wait instead of computing, so that few processors can stand for four ranks, but their weights, gradients and activations
are real, and so is what is sent. Links are measured on the same hosts first, as danon-bench links does. The plans are
made by this process from the model alone.

Memory is that of tensors: parameters, state of the optimizer, gradients where they live in buckets from step to step,
and the peak of what a step makes. What compression remembers is not among it, so of compressions there is int8 alone,
which remembers nothing.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from pipeline import quiet_trainer
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from danon_lightning.planner import Cluster, Layout, measure
from danon_lightning.planner.live_memory import LiveBytes
from danon_lightning.planner.prediction import Predictor, format_bytes
from danon_lightning.planner.profiling import shares
from danon_lightning.planner.report import format_seconds
from danon_lightning.strategies import DanonHybridStrategy, Mesh
from danon_lightning.strategies.communication.cost_model import Links, probe_links
from danon_lightning.testing import EmulatedHosts, run_distributed

NODES, RANKS = 2, 2
LAYERS, BATCH = 8, 32
# Features of a sample, numbers of a layer's weight, and seconds that the forward pass of a layer waits for a sample.
MODELS = {"narrow": (256, 1 << 18, 0.003), "wide": (4096, 1 << 20, 0.005)}
LAYOUTS = [
    Layout(4),
    Layout(4, compression="int8"),
    Layout(4, sharding=True),
    Layout(2, 2, 4, "1f1b"),
    Layout(2, 2, 8, "1f1b", across_nodes=True),
    Layout(2, 2, 8, "1f1b", checkpointing=True),
    Layout(2, 2, 8, "interleaved_1f1b", stages_per_rank=2, compression="int8"),
    Layout(1, 4, 8, "gpipe"),
]
SIDE = 256
# Memory is touched for the first time, and stages find out what they hold.
WARM_UP = 3


class _Wait(torch.autograd.Function):
    """A layer that takes its time, twice as long for gradients, and uses its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.seconds = 2 * seconds * len(x)
        time.sleep(seconds * len(x))
        return x + weight[0, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _, weight = ctx.saved_tensors
        time.sleep(ctx.seconds)
        return gradients[0].clone(), torch.full_like(weight, 1e-3), None


class WaitingLayer(nn.Module):
    """Waits instead of multiplying."""

    def __init__(self, numel: int, seconds: float) -> None:
        """Take the size of the weight, and the time of a sample."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIDE, numel // SIDE))  # a matrix: vectors are not compressed
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Add a number of the weight."""
        return _Wait.apply(x, self.weight, self.seconds)


class Stack(pl.LightningModule):
    """Layers of one size."""

    def __init__(self, name: str) -> None:
        """Take one of the models."""
        super().__init__()
        _, numel, seconds = MODELS[name]
        self.entrance = nn.Parameter(torch.zeros(1))
        self.layers = nn.ModuleList(WaitingLayer(numel, seconds) for _ in range(LAYERS))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Predict the input."""
        (x,) = batch
        y = x + self.entrance
        for layer in self.layers:
            y = layer(y)
        return nn.functional.mse_loss(y, x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With one number of state a weight."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Measured(pl.Callback):
    """Takes the time of steps, and in a last one, which does not count, looks at memory."""

    def __init__(self) -> None:
        """Start."""
        self.seconds: list[float] = []
        self.memory = 0.0
        self._mode: Any = nullcontext()
        self._before = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin together with other ranks."""
        if trainer.global_step == trainer.max_steps - 1:
            held = [p for p in trainer.lightning_module.parameters() if type(p) is nn.Parameter]
            state = [x for one in trainer.optimizers for s in one.state.values() for x in s.values()]
            self._before = float(sum(x.nbytes for x in [*held, *state] if isinstance(x, Tensor)))
            self._mode = LiveBytes()
            self._mode.__enter__()
        dist.barrier()
        self._start = time.perf_counter()

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        """What passes make, there is by now."""
        if isinstance(self._mode, LiveBytes):
            self._mode.__exit__(None, None, None)
            self.memory = self._before + self._mode.peak
            if trainer.strategy.mesh.pipeline_parallel_size == 1:  # type: ignore[attr-defined]
                grads = [p.grad for p in trainer.lightning_module.parameters() if p.grad is not None]
                self.memory += sum(gradient.nbytes for gradient in grads)  # the buckets of DistributedDataParallel

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop when the slowest rank has come."""
        dist.barrier()
        if not isinstance(self._mode, LiveBytes):
            self.seconds.append(time.perf_counter() - self._start)


def train(model: str, arguments: dict[str, Any], data: int, steps: int) -> tuple[float, float]:
    """Runs on each rank: the median step in seconds, and the bytes of this rank."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    measured = Measured()
    total = WARM_UP + steps + 1
    trainer = quiet_trainer(
        strategy=DanonHybridStrategy(**arguments), devices=RANKS, num_nodes=NODES, max_steps=total, callbacks=[measured]
    )
    samples = torch.randn(BATCH * total, MODELS[model][0])
    trainer.fit(Stack(model), DataLoader(TensorDataset(samples), batch_size=BATCH // data))
    return statistics.median(measured.seconds[WARM_UP:]), measured.memory


def probe() -> dict[str, Any]:
    """Runs on each rank: what its links can do."""
    torch.set_num_threads(1)
    links = probe_links(Mesh.from_world(dist.get_world_size(), NODES, dist.get_rank()))
    assert links is not None, "the links could not be measured"
    return links.to_json()


def error(predicted: float, measured: float) -> str:
    """Of a prediction, in per cent of what was measured."""
    return f"{predicted / measured - 1:+.0%}"


def main() -> None:
    """Predict, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="which")
    parser.add_argument("--layouts", nargs="+", type=int, default=list(range(len(LAYOUTS))), help="by number, from 0")
    parser.add_argument("--mbit", type=float, default=1000, help="rate of each host's link (default: 1000)")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each (default: 8)")
    parser.add_argument("--json", help="write what was found to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)

    unavailable = EmulatedHosts.unavailable_reason()
    if unavailable is not None:
        print(f"no emulated hosts ({unavailable}): all ranks on the loopback of this machine, unshaped")
    found = []
    with nullcontext() if unavailable else EmulatedHosts(NODES, rate_mbit=args.mbit) as hosts:
        options: dict[str, Any] = {"timeout": 600, "hosts": hosts, "ranks_per_node": RANKS}
        links = Links.from_json(run_distributed(probe, NODES * RANKS, **options)[0])
        for name in args.models:
            profile = measure(Stack(name), [torch.randn(BATCH, MODELS[name][0])], shares(BATCH, NODES * RANKS))
            predictor = Predictor(profile, Cluster(links), BATCH)
            rows = []
            for number in args.layouts:
                plan = predictor.predict(LAYOUTS[number])
                ranks = run_distributed(train, 4, name, plan.arguments(), plan.layout.data, args.steps, **options)
                seconds, memory = max(one for one, _ in ranks), max(one for _, one in ranks)
                rows.append((plan, seconds, memory))
                print(
                    f"{name}, {plan.layout}: {format_seconds(plan.step_seconds)} predicted, {format_seconds(seconds)} "
                    f"measured; {format_bytes(plan.memory.total)} predicted, {format_bytes(memory)} measured",
                    flush=True,
                )
            found.append((name, rows))
    report = []
    for name, rows in found:
        right = ("predicted", "measured", "error", "memory predicted", "measured", "error")
        table = Table("layout", *(Column(one, justify="right") for one in right), title=f"{name}, a step")
        for plan, seconds, memory in sorted(rows, key=lambda row: row[0].step_seconds):
            table.add_row(
                str(plan.layout), format_seconds(plan.step_seconds), format_seconds(seconds),
                error(plan.step_seconds, seconds), format_bytes(plan.memory.total), format_bytes(memory),
                error(plan.memory.total, memory),
            )  # fmt: skip
            report.append({
                "model": name, "plan": plan.to_json(), "measured_seconds": seconds, "measured_memory": memory,
            })  # fmt: skip
        Console().print(table)
        by_prediction = [one for one, *_ in sorted(rows, key=lambda row: row[0].step_seconds)]
        best = min(rows, key=lambda row: row[1])[0]
        print(
            f"the layout that was measured as the fastest is number {by_prediction.index(best) + 1} of the prediction"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "links": links.to_json(), "results": report}, file, indent=2)


if __name__ == "__main__":
    main()
