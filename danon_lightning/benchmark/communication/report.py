"""Tables of the figures."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from danon_lightning.benchmark.communication.crossovers import REFERENCES, compared_variants, where_faster
from danon_lightning.benchmark.communication.results import Row, measured_rates
from danon_lightning.benchmark.communication.variants import ALONE, VARIANTS
from danon_lightning.benchmark.network import format_rate

LEGEND = """\
s/step   median step on the slowest rank, with all that is not exchange
ratio    step time of "flat" in the same job, divided by this one
MB sent  left a host in a step, by the count of its network interface
formula  should leave a host by the algorithm (without headers)
counted  left a host by this package's own statistics
link     share of the link's rate that was used over the whole step"""


def rate_table(rows: Sequence[Row], title: str) -> Table:
    """The figures at one rate.

    Args:
        rows: Of one rate; a failed one shows how it failed.
        title: What the figures are of, rate included.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("exchange", no_wrap=True)
    for heading in ("s/step", "ratio", "MB sent", "formula", "counted", "link"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.variant != ALONE or row.status != "finished":
            seconds = f"{row.seconds:.3f}" if row.seconds is not None else f"[red]{row.status}[/]"
            table.add_row(
                row.variant,
                seconds,
                "-" if row.ratio is None else f"{row.ratio:.2f}",
                _megabytes(row.egress_bytes),
                _megabytes(row.formula_bytes),
                _megabytes(row.payload_bytes),
                "-" if row.line_rate_share is None else f"{row.line_rate_share:.0%}",
            )
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """Lines to follow the table: the time without any exchange, and why rows were not measured (rich markup)."""
    lines = [f"Without any exchange a step takes {r.seconds:.3f} s." for r in rows if r.variant == ALONE and r.seconds]
    return lines + [f"[red]{row.variant}[/]: {escape(row.message)}" for row in rows if row.status != "finished"]


def crossover_table(rows: Sequence[Row]) -> Table:
    """From which rate on each variant pays, against each reference that was measured."""
    references = [name for name in REFERENCES if any(row.variant == name and row.seconds for row in rows)]
    table = Table("exchange", *(f"faster than {name}" for name in references), title="Where it pays")
    table.title_justify = "left"
    variants = dict.fromkeys(name for reference in references for name in compared_variants(rows, reference))
    for variant in variants:
        cells = [where_faster(rows, variant, reference) if variant != reference else "" for reference in references]
        table.add_row(variant, *cells)
    return table


def summary(rows: Sequence[Row], files: Sequence[Path]) -> str:
    """One line: the fastest at each rate, what failed, and where it was written."""
    parts = []
    for mbit in measured_rates(rows):
        there = [row for row in rows if row.mbit == mbit and row.variant != ALONE and row.seconds]
        if there:
            best = min(there, key=lambda row: row.seconds or 0.0)
            ratio = "" if best.ratio is None else f" ({best.ratio:.1f} × flat)"
            parts.append(f"{format_rate(mbit)}: {best.variant}{ratio}")
    statuses = Counter(row.status for row in rows)
    counts = ", ".join(f"{statuses[status]} {status}" for status in ("finished", "crashed", "hung") if statuses[status])
    written = f"; written: {', '.join(map(str, files))}" if files else ""
    return f"fastest at {', '.join(parts)}; {counts}{written}" if parts else f"nothing was measured; {counts}{written}"


def any_of_ours_failed(rows: Sequence[Row]) -> bool:
    """Whether a variant of this package was not measured. That others hang or crash is a result."""
    return any(VARIANTS[row.variant].ours and row.status != "finished" for row in rows)


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.4g}"
