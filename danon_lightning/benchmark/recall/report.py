"""Tables of the figures."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from danon_lightning.benchmark.recall.model import Matched
from danon_lightning.benchmark.recall.results import Budget, Run, Summary, summarize
from danon_lightning.benchmark.recall.settings import FULL, Task

FIGURES: dict[Task, str] = {"mqar": "accuracy", "text": "bits/byte"}
HIGHER_IS_BETTER: dict[Task, bool] = {"mqar": True, "text": False}

_BUDGETS: tuple[Budget, ...] = ("steps", "time")

LEGEND = """\
parameters  of the whole model, the width of its MLP adjusted to come to those of full attention
mean ± sd   after the last step, over the seeds, each evaluated on the same data
worst       of the seeds
on the way  best evaluation of each seed, mean: what is better than the last has fallen back
s           time of training a run, without evaluations
equal time  trained again, for as many steps (schedule included) as fit into the time of full attention"""


def parameter_lines(models: dict[str, Matched]) -> list[str]:
    """How the parameters were made equal."""
    width = max(map(len, models), default=0)
    return [
        f"{label:{width}}  {model.parameters:,} parameters ({model.deviation:+.2%}), MLP of {model.config.mlp_size}"
        for label, model in models.items()
    ]


def result_tables(runs: Sequence[Run], task: Task) -> list[RenderableType]:
    """All lines, at equal steps and, if there are such runs, at equal time.

    Args:
        runs: All runs.
        task: What the figures are.
    """
    tables: list[RenderableType] = []
    for budget in _BUDGETS:
        if not any(run.budget == budget for run in runs):
            continue
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for heading in ("parameters", "steps", FIGURES[task], "worst", "on the way", "s"):
            table.add_column(heading, justify="right", no_wrap=True)
        for label in dict.fromkeys(run.label for run in runs):
            summary = summarize(runs, label, budget, higher_is_better=HIGHER_IS_BETTER[task])
            if summary is not None:
                table.add_row(label, *_cells(summary, HIGHER_IS_BETTER[task]))
        tables.append(Group(Text(f"equal {budget}", style="italic"), table))
    return tables


def notes(runs: Iterable[Run]) -> list[str]:
    """Why runs failed (rich markup)."""
    lines = [
        f"[red]{run.label}[/], seed {run.seed}, {run.steps} steps: {run.status}: {escape(run.message)}"
        for run in runs
        if run.status != "finished"
    ]
    if any(run.label == FULL for run in runs) and not any(run.budget == "time" for run in runs):
        lines.append("Equal steps are not equal time: see the seconds, or train again without --no-equal-time.")
    return lines


def summary_line(runs: Sequence[Run], files: Sequence[Path]) -> str:
    """One line: how many runs there were, and where the figures were written."""
    ended = sum(run.status == "finished" for run in runs)
    failed = f", {len(runs) - ended} failed" if ended < len(runs) else ""
    written = f"; written: {', '.join(map(str, files))}" if files else ""
    return f"runs: {ended} finished{failed}{written}"


def _cells(summary: Summary, higher_is_better: bool) -> list[str]:
    figure = "-"
    if summary.mean is not None:
        figure = f"{summary.mean:.3f}" + ("" if summary.deviation is None else f" ± {summary.deviation:.3f}")
    return [
        f"{summary.parameters:,}",
        f"{summary.steps:,}",
        f"{figure} [red]({summary.failed} failed)[/]" if summary.failed else figure,
        _number(summary.low if higher_is_better else summary.high),
        _number(summary.best),
        "-" if summary.seconds is None else f"{summary.seconds:.3g}",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
