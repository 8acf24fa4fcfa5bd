"""Says what a run is about to do, and afterwards what it has done and where that lies."""

import os
import shlex
import shutil
import sys
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from typing_extensions import override


@runtime_checkable
class Describable(Protocol):
    """A module, data module or strategy that has something to say of itself."""

    def describe(self) -> dict[str, str]:
        """Short facts, ready to be shown: ``{"mesh": "1 node × 2 ranks", …}``."""
        ...


class RunSummary(pl.Callback):
    """Prints a table when ``fit`` starts and another when it ends. Rank 0 only.

    The first shows the LightningModule, the data, the strategy, the number of steps and where logs go; whatever has a
    method ``describe()`` adds its own lines. The second shows how the monitored metric moved from the first validation
    to the last, the checkpoints, and the command that opens the logs.

    Args:
        metric: Logged metric to follow from validation to validation; None for none.
        console: Where to print; None for the standard output.
    """

    def __init__(self, metric: str | None = None, *, console: Console | None = None) -> None:
        """See the class."""
        self.metric = metric
        self._console = console or Console()
        self._history: list[tuple[int, float]] = []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what is about to happen."""
        self._history.clear()
        log_dir, steps = _log_dir(trainer), _steps(trainer)  # both are collective operations
        if not trainer.is_global_zero:
            return
        parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        rows = {"model": f"{type(pl_module).__name__}, {parameters:,} parameters to train"}
        for part in (pl_module, getattr(trainer, "datamodule", None), trainer.strategy):
            if isinstance(part, Describable):
                rows |= part.describe()
        rows["strategy"] = f"{type(trainer.strategy).__name__} on {trainer.world_size} × {_device(trainer)}"
        rows["steps"] = steps
        if trainer.ckpt_path:
            rows["resumes from"] = str(trainer.ckpt_path)
        rows["logs"] = _path(log_dir) if log_dir else "none"
        self._print("This run", rows)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the metric."""
        if self.metric in trainer.callback_metrics and not trainer.sanity_checking:
            self._history.append((trainer.global_step, float(trainer.callback_metrics[self.metric])))

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what has happened. In ``on_fit_end`` the last checkpoint has been written."""
        log_dir = _log_dir(trainer)
        if not trainer.is_global_zero:
            return
        rows = {"steps": f"{trainer.global_step:,}"}
        if self._history:
            (first_step, first), (last_step, last) = self._history[0], self._history[-1]
            rows[str(self.metric)] = f"{first:.3f} at step {first_step} → {last:.3f} at step {last_step}"
        for callback in trainer.checkpoint_callbacks:
            rows |= _checkpoints(callback)
        if log_dir:
            rows["logs"] = _path(log_dir)
        if log_dir and any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            rows["next"] = f"{_tensorboard()} --logdir {shlex.quote(_path(log_dir))}"
        self._print("Finished", rows)

    def _print(self, title: str, rows: dict[str, str]) -> None:
        table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in rows.items():
            table.add_row(key, value)
        self._console.print(table)


def _log_dir(trainer: pl.Trainer) -> str | None:
    log_dir = trainer.log_dir
    return log_dir if trainer.loggers else None  # without a logger it is the folder of checkpoints


def _device(trainer: pl.Trainer) -> str:
    return trainer.strategy.root_device.type


def _steps(trainer: pl.Trainer) -> str:
    total = trainer.estimated_stepping_batches
    every = f", {trainer.accumulate_grad_batches} batches each" if trainer.accumulate_grad_batches > 1 else ""
    return ("until stopped" if total == float("inf") else f"{int(total):,}") + every


def _checkpoints(callback: Checkpoint) -> dict[str, str]:
    paths = {"best checkpoint": "best_model_path", "last checkpoint": "last_model_path"}
    found = {name: getattr(callback, attribute, "") for name, attribute in paths.items()}
    return {name: _path(path) for name, path in found.items() if path}


def _tensorboard() -> str:
    """How the command is called from here: in full where it lies in an environment that is not activated."""
    beside_python = os.path.join(os.path.dirname(sys.executable), "tensorboard")
    if shutil.which("tensorboard") or not os.path.exists(beside_python):
        return "tensorboard"
    return shlex.quote(_path(beside_python))


def _path(path: str) -> str:
    """As one would type it here: relative where that is shorter."""
    if "://" in path:
        return path
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) and not relative.startswith("..") else path
