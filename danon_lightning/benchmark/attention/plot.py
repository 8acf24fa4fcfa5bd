"""Time, memory and state against length. Needs matplotlib: see ``danon_lightning.benchmark.plotting``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from danon_lightning.arguments import format_length
from danon_lightning.benchmark.attention.contenders import SDPA
from danon_lightning.benchmark.attention.report import DIRECTION_NAMES
from danon_lightning.benchmark.attention.results import Row, StateRow

# Contender, length, and the figure there.
_Point: TypeAlias = tuple[str, int, float | None]


def save_plot(rows: Sequence[Row], states: Sequence[StateRow], ours: Sequence[str], title: str, path: Path) -> None:
    """Draw all figures on logarithmic scales: a panel for time and one for memory of each direction, one for states.

    Args:
        rows: The figures.
        states: Those of streaming; may be empty.
        ours: Contenders that are drawn with solid lines.
        title: What they are of.
        path: A PNG file.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    directions = [direction for direction in DIRECTION_NAMES if any(row.direction == direction for row in rows)]
    panels: dict[str, list[_Point]] = {}
    for direction in directions:
        there = [row for row in rows if row.direction == direction]
        panels[f"seconds, {DIRECTION_NAMES[direction]}"] = [(r.contender, r.length, r.seconds) for r in there]
    for direction in directions:
        there = [row for row in rows if row.direction == direction]
        panels[f"peak bytes, {DIRECTION_NAMES[direction]}"] = [(r.contender, r.length, r.peak_bytes) for r in there]
    if states:
        panels["bytes of the streaming state"] = [(r.contender, r.length, r.state_bytes) for r in states]

    names = list(dict.fromkeys(name for points in panels.values() for name, _, _ in points))
    colors = {name: "black" if name == SDPA else colormaps["tab10"](i % 10) for i, name in enumerate(names)}
    columns = (len(panels) + 1) // 2
    figure = Figure(figsize=(2 + 5 * columns, 9), layout="constrained")
    figure.suptitle(title)
    legend: dict[str, Any] = {}
    for index, (label, points) in enumerate(panels.items()):
        axes = figure.add_subplot(2, columns, index + 1)
        lengths = sorted({length for _, length, _ in points})
        for name in names:
            measured = [(length, value) for contender, length, value in points if contender == name and value]
            if measured:
                style = "-" if name in ours else "--"
                legend[name] = axes.plot(*zip(*measured, strict=True), style, marker=".", color=colors[name])[0]
        axes.set(xscale="log", yscale="log" if axes.lines else "linear", title=label, xlabel="tokens")
        axes.set_xticks(lengths, [format_length(length) for length in lengths], rotation=45)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    figure.legend(list(legend.values()), list(legend), loc="outside right center", fontsize="small")
    figure.savefig(path, format="png", dpi=150)
