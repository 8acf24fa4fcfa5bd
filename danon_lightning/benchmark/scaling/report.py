"""Tables of the figures, and the JSON file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from danon_lightning.benchmark.network import format_rate
from danon_lightning.benchmark.scaling.results import Projection, Row
from danon_lightning.strategies.communication.cost_model import Links

# How far off a prediction may be.
TARGET = 0.15
# Where the probe finds less than this share of a link's rate, it is the machine that limits the exchange.
_FULL_SHARE = 0.85

LEGEND = """\
step      median on the slowest rank, in ms: waiting in place of computing, and what of the exchange is not hidden
speed-up  throughput of all hosts, as a multiple of one host's without an exchange
exposed   share of the step from the last gradient to the last mean
pred.     the same by the cost model; the error is that of its step, as a share of the measured one"""


def rate_table(rows: Sequence[Row], title: str) -> Table:
    """The measured figures at one rate, predictions beside them.

    Args:
        rows: Of one rate; a failed one shows that it failed.
        title: What the figures are of, rate included.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("exchange", no_wrap=True)
    for heading in ("hosts", "step", "pred.", "error", "speed-up", "pred.", "exposed"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = ""
    for row in rows:
        if last and row.exchange != last:
            table.add_section()
        last, measured, predicted = row.exchange, row.measured, row.predicted
        if measured is None:
            table.add_row(row.exchange, str(row.hosts), "[red]failed[/]", *["-"] * 5)
            continue
        colour = "" if row.error is None or abs(row.error) <= TARGET else "[yellow]"
        table.add_row(
            row.exchange,
            str(row.hosts),
            f"{1e3 * measured.seconds / row.dilation:.1f}",
            "-" if predicted is None else f"{1e3 * predicted.seconds / row.dilation:.1f}",
            "-" if row.error is None else f"{colour}{row.error:+.1%}",
            f"{row.speedup:.2f}",
            "-" if row.predicted_speedup is None else f"{row.predicted_speedup:.2f}",
            f"{row.exposed:.1%}",
        )
    return table


def projection_table(projections: Sequence[Projection], title: str) -> Table:
    """What larger clusters are projected to do, at one rate."""
    table = Table(title=f"PROJECTED, not measured: {title}", title_justify="left")
    table.add_column("exchange", no_wrap=True)
    for heading in ("hosts", "step", "speed-up", "efficiency", "exposed", "MB sent"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = ""
    for one in projections:
        if last and one.exchange != last:
            table.add_section()
        last = one.exchange
        table.add_row(
            one.exchange,
            f"{one.hosts:,}",
            f"{1e3 * one.predicted.seconds / one.dilation:.1f}",
            f"{one.speedup:,.1f}",
            f"{one.speedup / one.hosts:.1%}",
            f"{one.exposed:.1%}",
            f"{one.predicted.inter_node_bytes / 1e6:.4g}",
        )
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """Lines to follow the tables of one rate (rich markup): what limits the link, and what went wrong."""
    lines = []
    for hosts in dict.fromkeys(row.hosts for row in rows):
        there = [row for row in rows if row.hosts == hosts]
        failed = [row for row in there if row.status == "failed"]
        if failed:
            lines.append(f"[red]{hosts} hosts[/]: {escape(failed[0].message)}")
            continue
        rate, found = there[0].mbit, there[0].link_mbit
        if found is None:
            lines.append(f"[yellow]{hosts} hosts[/]: the links could not be measured, so nothing is predicted")
        elif rate is not None and found < _FULL_SHARE * rate:
            lines.append(
                f"[yellow]{hosts} hosts[/]: {format_rate(found)} of payload come through of {format_rate(rate)}: "
                "the processors that all hosts share are the limit, not the link"
            )
    return lines


def summary(rows: Sequence[Row], files: Sequence[Path]) -> str:
    """One line: the best speed-up at each rate, how good predictions are, and where it was written."""
    parts = []
    for mbit in dict.fromkeys(row.mbit for row in rows):
        there = [row for row in rows if row.mbit == mbit and row.measured]
        if there:
            most = max(row.hosts for row in there)
            best = max((row for row in there if row.hosts == most), key=lambda row: row.speedup or 0.0)
            parts.append(
                f"{format_rate(mbit)}: {best.exchange} {best.speedup:.2f} × on {most} hosts, {best.exposed:.1%} exposed"
            )
    errors = [row.error for row in rows if row.error is not None]
    if errors:
        near = sum(abs(error) <= TARGET for error in errors)
        parts.append(f"{near} of {len(errors)} predictions are within {TARGET:.0%}")
    statuses = Counter(row.status for row in rows)
    parts.append(", ".join(f"{statuses[status]} {status}" for status in ("finished", "failed") if statuses[status]))
    if files:
        parts.append(f"written: {', '.join(map(str, files))}")
    return "; ".join(parts)


def to_json(
    arguments: Mapping[str, Any],
    environment: Mapping[str, Any],
    rows: Sequence[Row],
    projections: Sequence[Projection],
    links: Mapping[float | None, Sequence[Links]],
) -> dict[str, Any]:
    """All there is to keep of a run, as JSON can hold it. Rates are in Mbit/s, null for unshaped.

    Args:
        arguments: What was asked for, defaults included.
        environment: What it ran on.
        rows: What was measured.
        projections: What was not. Seconds of both, and of links, are dilated where a dilation stands beside them.
        links: By rate: the links as probed, an entry for each number of hosts.
    """
    return {
        "benchmark": "scaling",
        "arguments": dict(arguments),
        "environment": dict(environment),
        "measured": [
            {
                **asdict(row),
                "speedup": row.speedup,
                "exposed": row.exposed,
                "predicted_speedup": row.predicted_speedup,
                "error": row.error,
            }
            for row in rows
        ],
        "projected": [{**asdict(one), "speedup": one.speedup, "exposed": one.exposed} for one in projections],
        "links": [{"mbit": mbit, **one.to_json()} for mbit, probed in links.items() for one in probed],
    }
