"""What the NaN debugger costs while all is well, in a Trainer.

    python benchmarks/nan_check.py --json nan_check.json

A language model of 26 million parameters is trained by a Lightning Trainer with the callback, which is asleep in every
second step: so steps with it and steps without take turns in one run. All that the callback does in a step (keeping the
batch, the generators' state and the loss; norms, the read, limits, history, copies of buffers) is also timed by
itself, since it is less than what steps differ by. CPU time, all threads together. Reads from the device are counted as
operations that take a value to the host.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from nan_faults import Transformer
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from danon_lightning.callbacks import NaNDebugger
from danon_lightning.callbacks.nan_debugger import check

HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step")


class Model(pl.LightningModule):
    """Predicts the tokens themselves."""

    def __init__(self, layers: int) -> None:
        """Take the number of layers."""
        super().__init__()
        self.model = Transformer(layers)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss."""
        return self.model(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent, so that the optimizer takes little of a step."""
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class EverySecondStep(NaNDebugger):
    """The debugger, awake in every second step; takes the time of its hooks."""

    def __init__(self, **options: Any) -> None:
        """Take what the debugger takes."""
        super().__init__(**options)
        self.awake: list[float] = []
        self.asleep: list[float] = []
        self.own: list[float] = []
        self._began = self._spent = 0.0

    def _is_awake(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step % 2 == 1

    def _timed(self, trainer: pl.Trainer, hook: Callable[..., None], *args: Any) -> None:
        if self._is_awake(trainer):
            start = time.process_time()
            hook(trainer, *args)
            self._spent += time.process_time() - start

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin to take the time."""
        self._began, self._spent = time.process_time(), 0.0
        self._number = trainer.global_step
        self._timed(trainer, super().on_train_batch_start, *args)

    def on_before_backward(self, trainer: pl.Trainer, *args: Any) -> None:
        """Wake up or not."""
        self._timed(trainer, super().on_before_backward, *args)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        """Wake up or not."""
        self._timed(trainer, super().on_before_optimizer_step, *args)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note the step."""
        took = time.process_time() - self._began
        if self._number < 2:  # the first ones warm up
            return
        if self._number % 2 == 1:
            self.awake.append(took)
            self.own.append(self._spent)
        else:
            self.asleep.append(took)


def measure(pairs: int, layers: int, samples: int, length: int) -> dict[str, Any]:
    """Train, and compare.

    Args:
        pairs: Of steps, one with and one without.
        layers: Of the model.
        samples: In a batch.
        length: Of a sample, in tokens.
    """
    torch.manual_seed(0)
    reads = [0]
    read = check._read

    def counted(tensors: Any) -> Any:
        reads[0] += 1
        return read(tensors)

    check._read = counted
    watching = EverySecondStep()
    steps = 2 * pairs + 2
    data = DataLoader(torch.randint(0, 7000, (steps * samples, length)), batch_size=samples)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[watching],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Model(layers)
    try:
        trainer.fit(module, data)
    finally:
        check._read = read
    plain, own = statistics.median(watching.asleep), statistics.median(watching.own)
    return {
        "parameters": sum(one.numel() for one in module.parameters()),
        "tokens_a_step": samples * length,
        "threads": torch.get_num_threads(),
        "pairs": pairs,
        "step_seconds": plain,
        "step_with_seconds": statistics.median(watching.awake),
        "ratio": statistics.median(one / other for one, other in zip(watching.awake, watching.asleep, strict=True)),
        "own_seconds": own,
        "own_share": own / plain,
        "reads_a_step": (reads[0] - 1) / (pairs + 1),  # one before the first step
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="steps with, and as many without")
    parser.add_argument("--layers", type=int, default=6, help="of the model; six are 26 million parameters")
    parser.add_argument("--samples", type=int, default=16, help="in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sample")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    found = measure(options.pairs, options.layers, options.samples, options.length)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2)
    console = Console()
    console.print(
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['tokens_a_step']} tokens a step, "
        f"{found['threads']} thread(s), CPU time, {found['pairs']} pairs of steps"
    )
    console.print(f"a step without: {found['step_seconds']:.3f} s; with: {found['step_with_seconds']:.3f} s")
    console.print(f"ratio of neighbouring steps: {found['ratio'] - 1:+.1%} (median)")
    console.print(
        f"the callback itself: {found['own_seconds'] * 1e3:.2f} ms, {found['own_share']:.2%} of a step, "
        f"{found['reads_a_step']:g} read(s) from the device"
    )


if __name__ == "__main__":
    main()
