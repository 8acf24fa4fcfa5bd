"""How much memory a rank of a pipeline needs: for parameters and the state of the optimizer, and for activations.

    python benchmarks/pipeline_memory.py --json memory.json
    python benchmarks/pipeline_memory.py --only activations   # one of both

Parameters, gradients and the state of Adam are those that a rank holds after a few steps, tensor by tensor, beside what
a single process holds. "All tensors" are those that Python knows of, whoever holds them: much more than the sum of the
others would be something that should have been let go. The peak of resident memory is that of the process, above what
it was before the model was made; it includes activations, what is in flight, and code that is loaded late. glibc is
told to hand back what is freed, which it else keeps or not as it happens.

Activations are all tensors that a training step makes and that live at the same time, at their peak: what the graphs
keep, what is in flight, gradients too. Micro-batches have one size, whatever their number, and layers are narrow, so
that activations are by far the most of it.
"""

import argparse
import gc
import json
import resource
import sys
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from pipeline import quiet_trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import run_distributed

# As many layers as make equal stages of 2, 4 and 8 ranks.
LAYERS = 8
MIB = 2**20


class Stack(pl.LightningModule):
    """Layers of one size, which each rank makes its own of; Adam."""

    def __init__(self, width: int) -> None:
        """Take the width."""
        super().__init__()
        self.width = width
        self.layers: nn.ModuleList | None = None

    def configure_model(self) -> None:
        """Make the layers."""
        if self.layers is None:
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(self.width, self.width), nn.GELU()) for _ in range(LAYERS)
            )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Predict the input."""
        (x,) = batch
        y = x
        assert self.layers is not None
        for layer in self.layers:
            y = layer(y)
        return nn.functional.mse_loss(y, x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Two numbers of state for each parameter."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Held:
    """What a process holds, in bytes.

    Attributes:
        parameters: Those of the module.
        optimizer: The state of the optimizer.
        gradients: Of the parameters.
        tensors: All that are alive.
        resident: The peak of the process above what it had before there was a model.
    """

    parameters: int
    optimizer: int
    gradients: int
    tensors: int
    resident: int


def total_bytes(tensors: Iterable[Any]) -> int:
    """Of all storages; those that several tensors share count once, what has no data (another rank's) not at all."""
    storages = {}
    for tensor in tensors:
        if _has_data(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _has_data(tensor: Any) -> bool:
    # What another rank holds is of a class of its own.
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"


def _peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Inventory(pl.Callback):
    """Counts what is held at the end of the last step, when gradients are still there."""

    def __init__(self) -> None:
        """Begin with what there is before the model."""
        self.before = _peak_resident()
        gc.collect()
        self._earlier = total_bytes(gc.get_objects())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Count."""
        if trainer.global_step < trainer.max_steps:
            return
        gc.collect()
        parameters = list(pl_module.parameters())
        self.held = Held(
            total_bytes(parameters),
            total_bytes(x for state in trainer.optimizers[0].state.values() for x in state.values()),
            total_bytes(parameter.grad for parameter in parameters if _has_data(parameter)),
            total_bytes(gc.get_objects()) - self._earlier,
            _peak_resident() - self.before,
        )


class LivePeak(TorchDispatchMode):
    """Sees all tensors that operators make, and how many bytes of them live at most at the same time."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note storages that are new: those of no argument."""
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if _has_data(x)}
        for tensor in tree_leaves(result):
            if _has_data(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self._sizes:
            self._sizes[address] = size
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self._live -= self._sizes.pop(address)


class LastStep(pl.Callback):
    """Measures what the last step makes."""

    def __init__(self) -> None:
        """Start."""
        self.mode = LivePeak()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin."""
        if trainer.global_step == trainer.max_steps - 1:
            gc.collect()
            self.mode.__enter__()

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        """End: what the optimizer makes is no activation."""
        if trainer.global_step == trainer.max_steps - 1:
            self.mode.__exit__(None, None, None)


def _fit(
    width: int, callback: pl.Callback, schedule: str | None, ranks: int, micro_batches: int, samples: int, steps: int
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    strategy: Any = "auto"
    if schedule is not None:
        strategy = DanonHybridStrategy(pipeline_parallel_size=ranks, num_microbatches=micro_batches, schedule=schedule)
    trainer = quiet_trainer(strategy=strategy, devices=ranks, max_steps=steps, callbacks=[callback])
    batch = micro_batches * samples
    trainer.fit(Stack(width), DataLoader(TensorDataset(torch.randn(batch * steps, width)), batch_size=batch))


def hold(ranks: int, width: int) -> Held:
    """Runs on each rank: what it holds after three steps of Adam. One rank is a process without a pipeline."""
    inventory = Inventory()
    _fit(width, inventory, "1f1b" if ranks > 1 else None, ranks, 2 * ranks, samples=2, steps=3)
    return inventory.held


def activation_peaks(
    schedules: list[str], ranks: int, numbers: list[int], width: int, samples: int
) -> dict[str, dict[int, int]]:
    """Runs on each rank: for each schedule and number of micro-batches, the peak of what a step makes, in bytes."""
    return {
        schedule: {number: _activation_peak(schedule, ranks, number, width, samples) for number in numbers}
        for schedule in schedules
    }


def _activation_peak(schedule: str, ranks: int, micro_batches: int, width: int, samples: int) -> int:
    last = LastStep()
    _fit(width, last, schedule, ranks, micro_batches, samples, steps=3)
    return last.mode.peak


def measure_held(ranks: int, width: int) -> list[Held]:
    """What each rank holds."""
    return run_distributed(hold, ranks, ranks, width, timeout=600, env={"MALLOC_MMAP_THRESHOLD_": "65536"})


def measure_activations(
    ranks: int, numbers: list[int], width: int = 64, samples: int = 1024
) -> dict[str, dict[int, int]]:
    """The peaks on the first rank, which has the most micro-batches under way."""
    return run_distributed(activation_peaks, ranks, ["1f1b", "gpipe"], ranks, numbers, width, samples, timeout=600)[0]


def _print_held(pipelines: list[int], width: int) -> dict[int, list[dict[str, Any]]]:
    found = {ranks: measure_held(ranks, width) for ranks in [1, *pipelines]}
    [single] = found[1]
    table = Table("P", "rank", "weights, Adam", "of one", "gradients", "all tensors", "resident")
    rows: dict[int, list[dict[str, Any]]] = {}
    for ranks, every in found.items():
        rows[ranks] = []
        for rank, held in enumerate(every):
            share = (held.parameters + held.optimizer) / (single.parameters + single.optimizer)
            sizes = [held.parameters + held.optimizer, held.gradients, held.tensors, held.resident]
            first, *others = (f"{size / MIB:.1f} MiB" for size in sizes)
            table.add_row(str(ranks), str(rank), first, f"{share:.4f}", *others)
            rows[ranks].append({**asdict(held), "share": share})
    Console().print(table)
    return rows


def _print_activations(pipelines: list[int]) -> dict[int, dict[str, dict[int, int]]]:
    rows: dict[int, dict[str, dict[int, int]]] = {}
    table = Table("ranks", "micro-batches", "1f1b: peak on rank 0", "gpipe")
    for ranks in pipelines:
        numbers = [ranks * factor for factor in (1, 2, 4, 8)]
        rows[ranks] = measure_activations(ranks, numbers)
        for number in numbers:
            peaks = (f"{rows[ranks][schedule][number] / MIB:.2f} MiB" for schedule in ("1f1b", "gpipe"))
            table.add_row(str(ranks), str(number), *peaks)
    Console().print(table)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="pipelines (default: 2 4)")
    parser.add_argument("--width", type=int, default=2048, help="of layers whose parameters count (default: 2048)")
    parser.add_argument("--only", choices=["parameters", "activations"], help="one of the tables")
    parser.add_argument("--json", help="write what was measured to this file, in bytes")
    args = parser.parse_args()

    results: dict[str, Any] = {}
    if args.only != "activations":
        results["parameters"] = _print_held(args.ranks, args.width)
    if args.only != "parameters":
        results["activations"] = _print_activations(args.ranks)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
