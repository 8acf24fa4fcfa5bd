"""Tables of the figures."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from danon_lightning.arguments import format_length
from danon_lightning.benchmark.attention.contenders import SDPA
from danon_lightning.benchmark.attention.results import Direction, Row, StateRow, exponent_of, ratio

DIRECTION_NAMES: dict[Direction, str] = {"forward": "forward", "both": "forward and backward"}

LEGEND = """\
× faster  time of torch's full causal attention (sdpa) at this length in this run, divided by this one
exponent  e in time ~ n^e, by least squares over the lengths of --fit
tokens/s  at the median run
memory    most that a run holds beyond its inputs and parameters, its output included
state     what the streaming form keeps after so many tokens
-         left out (why is said below); x: failed"""


def time_tables(rows: Sequence[Row], direction: Direction, fit: tuple[int, int], title: str) -> list[RenderableType]:
    """Ratios with exponents, tokens a second, and memory of one direction.

    Args:
        rows: The figures, of other directions too.
        direction: Which one.
        fit: Smallest and largest length for exponents.
        title: What the figures are of.
    """
    there = [row for row in rows if row.direction == direction]
    what = f"{title}, {DIRECTION_NAMES[direction]}"

    def compared(row: Row) -> str:
        return _seconds(row.seconds) if row.contender == SDPA else _factor(ratio(rows, row))

    exponents = {row.contender: _exponent(exponent_of(rows, row.contender, direction, fit)) for row in there}
    low, high = map(format_length, fit)
    return [
        _table(
            f"× faster than sdpa: {what}",
            there,
            compared,
            last=(f"exponent {low}..{high}", exponents),
            names={SDPA: "sdpa, s"},
        ),
        _table(f"thousand tokens/s: {what}", there, lambda row: _thousands(row.tokens_per_second)),
        _table(f"peak memory, MB: {what}", there, lambda row: _megabytes(row.peak_bytes)),
    ]


def state_tables(rows: Sequence[StateRow], cache_bytes: int, title: str) -> list[RenderableType]:
    """Size of the streaming state, and memory while streaming.

    Args:
        rows: The figures.
        cache_bytes: Bytes a token in the cache of full attention.
        title: What the figures are of.
    """
    cache = ["full (formula)", *(_kilobytes(cache_bytes * length) for length in sorted({row.length for row in rows}))]
    return [
        _table(f"streaming state, kB: {title}", rows, lambda row: _kilobytes(row.state_bytes), bottom=cache),
        _table(f"peak memory while streaming, MB: {title}", rows, lambda row: _megabytes(row.peak_bytes)),
    ]


def notes(rows: Iterable[Row | StateRow]) -> list[str]:
    """Why cells were not measured, the same reasons together (rich markup)."""
    reasons: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        if row.status != "finished":
            reasons.setdefault((row.contender, row.status, row.message), []).append(row.length)
    lines = []
    for (contender, status, message), lengths in reasons.items():
        color = "yellow" if status == "left out" else "red"
        at = ", ".join(map(format_length, lengths))
        lines.append(f"[{color}]{contender}[/] at {at}: {status}: {escape(message)}")
    return lines


def summary(rows: Sequence[Row | StateRow], files: Sequence[Path]) -> str:
    """One line: what became of the cells, and where the figures were written."""
    statuses = Counter(row.status for row in rows)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    written = f"; written: {', '.join(map(str, files))}" if files else ""
    return f"cells: {counts}{written}"


def _table(
    title: str,
    rows: Sequence[Row] | Sequence[StateRow],
    cell: Callable[..., str],
    *,
    last: tuple[str, dict[str, str]] | None = None,
    names: dict[str, str] | None = None,
    bottom: Sequence[str] = (),
) -> RenderableType:
    """A line a contender that was tried, a column a length, and perhaps one more column and one more line."""
    lengths = sorted({row.length for row in rows})
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for length in lengths:
        table.add_column(format_length(length), justify="right", no_wrap=True)
    if last is not None:
        table.add_column(last[0], justify="right", no_wrap=True)
    cells = {(row.contender, row.length): row for row in rows}
    for contender in dict.fromkeys(row.contender for row in rows if row.status != "left out"):
        line = [(names or {}).get(contender, contender)]
        for length in lengths:
            row = cells.get((contender, length))
            failed = row is not None and row.status not in ("finished", "left out")
            line.append("[red]x[/]" if failed else "-" if row is None or row.status == "left out" else cell(row))
        table.add_row(*line, *([last[1].get(contender, "-")] if last is not None else []))
    if bottom:
        table.add_row(*bottom)
    # Not the table's own title, which would be wrapped to its width.
    return Group(Text(title, style="italic"), table)


def _factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 20 else f"{value:.0f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 1 else f"{value:.1f}"


def _exponent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _thousands(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e3:.3g}" if value < 1e6 else f"{value / 1e3:.0f}"


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f}" if value < 1e8 else f"{value / 1e6:.0f}"


def _kilobytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e3:.0f}"
