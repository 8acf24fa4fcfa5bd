"""Tables of the figures, and the file for ``danon-plan``."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from danon_lightning.benchmark.links.job import Check, Outcome, check_to_json
from danon_lightning.strategies.communication.cost_model import Link, Links, best_all_reduce, ring_order, slowest_link

# How far off a prediction may be.
TARGET = 0.15
LEGEND = """\
s          median exchange on the slowest rank, measured
predicted  by the cost model; the error is its share of what was measured
coding     of the prediction, what the busiest rank computes, copies and sends, hidden behind transfers or not
MB         left a node in an exchange, by the ranks' own count"""
_SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 26)


def links_table(links: Links, title: str) -> Table:
    """Latency and bandwidth of each level."""
    table = Table("level", "latency, µs", "MB/s a node", "Gbit/s a node", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    inside = "inside a node" + (" (shared memory)" if links.shared_memory else "")
    for level, link in ((inside, links.intra), ("between nodes", links.inter)):
        if link is not None:
            table.add_row(level, *_cells(link))
    return table


def pairwise_lines(links: Links) -> list[str]:
    """The links between every two nodes, and the ring that suits them; empty if they were not measured."""
    if links.pairwise is None:
        return []
    lines = ["MB/s from node (row) to node (column), each exchanging with one other:"]
    lines += ["  " + " ".join(f"{rate / 1e6:8.4g}" if rate else "       -" for rate in row) for row in links.pairwise]
    order = ring_order(links.pairwise)
    best, given = slowest_link(order, links.pairwise), slowest_link(range(links.nodes), links.pairwise)
    lines.append(
        f"ring with the fastest slowest link: {' → '.join(map(str, order))}, {best / 1e6:.4g} MB/s "
        f"(in the given order {given / 1e6:.4g} MB/s)"
    )
    return lines


def algorithm_line(links: Links) -> str:
    """Which classic all-reduce suits which size here."""
    choices = ", ".join(f"{_size(size)}: {best_all_reduce(size, links)}" for size in _SIZES)
    return f"fastest all-reduce by the α-β model: {choices}"


def check_table(checks: Sequence[Check], title: str) -> Table:
    """Predicted and measured."""
    table = Table(title=title, title_justify="left")
    table.add_column("exchange", no_wrap=True)
    for heading in ("s", "predicted", "error", "coding", "MB", "predicted"):
        table.add_column(heading, justify="right", no_wrap=True)
    for check in checks:
        colour = "" if abs(check.error) <= TARGET else "[yellow]"
        table.add_row(
            check.exchange,
            f"{check.seconds:.3f}",
            f"{check.predicted.seconds:.3f}",
            f"{colour}{check.error:+.0%}",
            f"{check.predicted.coding_seconds:.3f}",
            "-" if check.inter_node_bytes is None else f"{check.inter_node_bytes / 1e6:.4g}",
            f"{check.predicted.inter_node_bytes / 1e6:.4g}",
        )
    return table


def check_line(checks: Sequence[Check]) -> str:
    """How many predictions are near enough."""
    near = sum(abs(check.error) <= TARGET for check in checks)
    return f"{near} of {len(checks)} predictions are within {TARGET:.0%} of the median measurement"


def to_json(outcome: Outcome, arguments: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds: the links as :meth:`Links.from_json` reads them, and how they were measured."""
    assert outcome.links is not None
    return {
        **outcome.links.to_json(),
        "benchmark": "links",
        "arguments": dict(arguments),
        "environment": dict(environment),
        "probe_seconds": outcome.probe_seconds,
        "checks": [check_to_json(check) for check in outcome.checks],
    }


def _cells(link: Link) -> tuple[str, str, str]:
    rate = link.bytes_per_second
    return f"{link.latency_seconds * 1e6:.0f}", f"{rate / 1e6:.4g}", f"{rate * 8 / 1e9:.3g}"


def _size(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} kB"
