"""Says in the end what was odd, what was slow, and what to try."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from danon_lightning.callbacks import logs
from danon_lightning.callbacks.health.course import Course
from danon_lightning.callbacks.health.finding import Finding, ReportsFindings
from danon_lightning.callbacks.health.gathering import gather, merge

__all__ = ["HealthReport", "as_markdown"]

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


class HealthReport(pl.Callback):
    """Gathers what all callbacks have found, and prints it as a table when ``fit`` ends.

    Every callback with a method ``findings()`` (:class:`~danon_lightning.callbacks.ReportsFindings`) is asked, the
    monitors of this package and those of others. Without any of them it tells whether the loss fell, was NaN or
    infinite, how long a batch took, the share of validation, and a learning rate that was zero for long. Findings of
    all ranks are put together at the end of ``fit``, in JSON; after an exception nothing is sent, and rank 0 tells what
    it has found itself.

    Keys logged:
        ``health`` (text): the table as Markdown.

    Args:
        path: A Markdown file to write it to as well; its folder is made. ``None``: none.
        console: Where to print; ``None`` for the standard output.
    """

    def __init__(self, path: str | Path | None = None, *, console: Console | None = None) -> None:
        """See the class."""
        self.path = path
        self._console = console or Console()
        self._course = Course()
        self._reported = False
        self._writing = logs.Guarded("HealthReport")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to count."""
        self._course, self._reported = Course(), False

    def reads_between_steps(self, trainer: pl.Trainer) -> bool:
        """Never looks at weights or gradients between the backward pass and the next forward pass."""
        return False

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and remember the loss."""
        self._course.finish_batch(trainer, outputs)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time validation."""
        self._course.start_validation()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time validation."""
        self._course.finish_validation()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather from all ranks, and report."""
        found = self._collect(trainer)
        if self._reported:
            return
        self._report(trainer, merge(gather(found, trainer.strategy.root_device)))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Report what this rank has found: other ranks may be anywhere."""
        if trainer.state.fn != "fit" or self._reported:
            return
        interrupted = isinstance(exception, (KeyboardInterrupt, SystemExit))
        what = f"ended by {type(exception).__name__}" + (f": {_one_line(exception)}" if str(exception) else "")
        ended = Finding("note" if interrupted else "error", "this run", what)
        found = [(finding, "") for finding in [ended, *self._collect(trainer)]]
        if trainer.world_size > 1:
            found = [(finding, "rank 0") for finding, _ in found]
        order = list(_STYLES)
        self._report(trainer, sorted(found, key=lambda one: order.index(one[0].severity)))

    def _collect(self, trainer: pl.Trainer) -> list[Finding]:
        """Ask all callbacks. No error of theirs may keep this rank from what all ranks do next."""
        found: list[Finding] = []
        try:
            found += self._course.findings()
        except Exception as error:  # for instance a device that is lost
            found.append(_silent("HealthReport", error))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback is self or not isinstance(callback, ReportsFindings):
                continue
            try:
                found += [_checked(finding) for finding in callback.findings()]
            except Exception as error:  # somebody else's callback
                found.append(_silent(type(callback).__name__, error))
        return found

    def _report(self, trainer: pl.Trainer, found: Sequence[tuple[Finding, str]]) -> None:
        self._reported = True
        if not trainer.is_global_zero:
            return
        with self._writing:
            self._console.print(_as_table(found))
        with self._writing:
            logs.text(trainer, "health", as_markdown(found), logs.current_step(trainer))
        if self.path is not None:
            with self._writing:
                os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
                Path(self.path).write_text(f"# Health of the run\n\n{as_markdown(found)}\n", encoding="utf-8")


def as_markdown(found: Sequence[tuple[Finding, str]]) -> str:
    """Findings as a table in Markdown.

    Args:
        found: Each with the ranks that have it, or an empty string.
    """
    ranked = any(ranks for _, ranks in found)
    head = ["", "what", "found", "what to try", *(["where"] if ranked else [])]
    rows = [head, ["---"] * len(head)]
    for finding, ranks in found:
        rows.append([finding.severity, finding.subject, finding.text, finding.advice, *([ranks] if ranked else [])])
    return "\n".join("| " + " | ".join(_cell(text) for text in row) + " |" for row in rows)


def _cell(text: str) -> str:
    """Text as it is, in a cell of a table: names such as ``model.layers_0`` must not become emphasis or tags."""
    for character in "\\`*_<|[":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _as_table(found: Sequence[tuple[Finding, str]]) -> Table:
    table = Table(title="Health", title_justify="left", title_style="bold")
    ranked = any(ranks for _, ranks in found)
    for name in ("", "what", "found", "what to try", *(("where",) if ranked else ())):
        table.add_column(name, overflow="fold", no_wrap=name == "")
    for finding, ranks in found:
        style = _STYLES[finding.severity]
        cells = [finding.severity, finding.subject, finding.text, finding.advice, *((ranks,) if ranked else ())]
        table.add_row(*(Text(cell, style=style if index == 0 else "") for index, cell in enumerate(cells)))
    return table


def _checked(finding: Any) -> Finding:
    """Refuse what is no finding here, not when it has travelled."""
    texts = [getattr(finding, name, None) for name in ("subject", "text", "advice")]
    if (
        not isinstance(finding, Finding)
        or finding.severity not in _STYLES
        or not all(isinstance(t, str) for t in texts)
    ):
        raise TypeError(f"{finding!r} is no Finding of texts with severity 'note', 'warning' or 'error'")
    return finding


def _silent(name: str, error: Exception) -> Finding:
    return Finding("note", name, f"it could not tell its findings ({type(error).__name__}: {error})")


def _one_line(exception: BaseException) -> str:
    text = " ".join(str(exception).split())
    return text if len(text) <= 200 else text[:199] + "…"
