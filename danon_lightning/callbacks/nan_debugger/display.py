"""Where reports and warnings go: the terminal, loggers, a file of events, a picture."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from danon_lightning.callbacks import logs
from danon_lightning.callbacks.nan_debugger.events import EventLog
from danon_lightning.callbacks.nan_debugger.history import History
from danon_lightning.callbacks.nan_debugger.plot import draw_history, save_plot
from danon_lightning.callbacks.nan_debugger.report import Report


class Display:
    """Shows what was found. Nothing here ends a run: what cannot be written is warned of once.

    Args:
        log_path: File of events; other ranks than the first append ``.rank<n>``. None for none.
        plot_path: PNG file of norms; None for none.
        console: Where reports are printed.
    """

    def __init__(self, log_path: str | Path | None, plot_path: str | Path | None, console: Console) -> None:
        """See the class."""
        self.log_path, self.plot_path = log_path, plot_path
        self._console = console
        self.writing = logs.Guarded("NaNDebugger")
        self._events = EventLog(None, self.writing)
        self._all_alike = True

    def begin(self, trainer: pl.Trainer, all_alike: bool) -> None:
        """Get ready for a ``fit``.

        Args:
            trainer: Whose.
            all_alike: Whether all ranks see the same, so that it is enough if the first one says it.
        """
        self._all_alike = all_alike
        path = None if self.log_path is None else Path(self.log_path)
        if path is not None and not trainer.is_global_zero:
            path = path.with_name(f"{path.name}.rank{trainer.global_rank}")
        self._is_first = trainer.is_global_zero
        self._events = EventLog(path, self.writing)

    _is_first = True

    def event(self, event: str, *, own: bool = False, **facts: Any) -> None:
        """Note an event in the file.

        Args:
            event: What has happened.
            own: Whether only this rank knows.
            **facts: About it.
        """
        if self._is_first or own or not self._all_alike:
            self._events.write(event, **facts)

    def warn(self, text: str, *, own: bool = False) -> None:
        """Warn, once for all ranks if all know the same."""
        text = f"NaNDebugger: {text}"
        if self._all_alike and not own:
            rank_zero_warn(text, stacklevel=4)
        else:
            warnings.warn(text, stacklevel=3)

    def report(self, trainer: pl.Trainer, report: Report, skipped: int, *, ends: bool) -> None:
        """Show what was found.

        Args:
            trainer: Whose loggers.
            report: What was found, by all ranks.
            skipped: How many steps were skipped so far.
            ends: Whether training ends with an error, which shows it.
        """
        if not self._is_first:
            return
        self._events.write("not_finite", **report.to_dict())
        with self.writing:
            if not ends:
                title = f"NaNDebugger · step {report.step}"
                self._console.print(Panel(Text(report.text()), title=title, border_style="red"))
        with self.writing:
            step = logs.current_step(trainer)
            logs.text(trainer, "nan_debugger/report", f"```\n{report.text()}\n```", step)
            logs.scalars(trainer, {"nan_debugger/skipped_steps": float(skipped)}, step)

    def plot(self, trainer: pl.Trainer, history: History, bad_steps: Sequence[int]) -> None:
        """Draw the norms of the last steps, if that is wanted."""
        if self.plot_path is None or not self._is_first or not history.steps:
            return
        with self.writing:
            save_plot(history, self.plot_path, bad_steps)
        with self.writing:
            logs.figure(trainer, "nan_debugger/norms", draw_history(history, bad_steps), logs.current_step(trainer))
