"""Speed-up and exposed communication by number of hosts.

Needs matplotlib: see ``danon_lightning.benchmark.plotting``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from danon_lightning.benchmark.network import format_rate
from danon_lightning.benchmark.scaling.results import Projection, Row


def save_plot(rows: Sequence[Row], projections: Sequence[Projection], title: str, path: Path) -> None:
    """Draw a column of two charts for each rate: filled marks are measured, crosses predicted, hollow ones projected.

    Args:
        rows: What was measured.
        projections: What was not.
        title: What the figures are of.
        path: A PNG file.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rates = list(dict.fromkeys(row.mbit for row in rows))
    exchanges = list(dict.fromkeys(row.exchange for row in rows))
    colors = {name: "black" if name == "ddp" else colormaps["tab10"](i) for i, name in enumerate(exchanges)}
    figure = Figure(figsize=(5 * max(1, len(rates)) + 2, 9), layout="constrained")
    charts = figure.subplots(2, max(1, len(rates)), squeeze=False, sharex=True, sharey="row")
    for (upper, lower), mbit in zip(charts.T, rates, strict=True):
        measured = [row for row in rows if row.mbit == mbit and row.measured]
        projected = [one for one in projections if one.mbit == mbit]
        counts = sorted({1, *(row.hosts for row in measured), *(one.hosts for one in projected)})
        upper.plot(counts, counts, color="grey", linestyle="--", linewidth=1)
        for name in exchanges:
            mine = [row for row in measured if row.exchange == name]
            theirs = [one for one in projected if one.exchange == name]
            _draw(upper, lower, mine, theirs, colors[name])
        upper.set_title(format_rate(mbit))
        upper.set_xscale("log", base=2)
        upper.set_yscale("log", base=2)
        upper.xaxis.set_major_formatter("{x:g}")
        upper.yaxis.set_major_formatter("{x:g}")
        lower.set(xlabel="hosts", ylim=(0, 1))
        lower.yaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
        for chart in (upper, lower):
            chart.grid(alpha=0.3)
    charts[0][0].set_ylabel("speed-up over one host")
    charts[1][0].set_ylabel("exposed communication, share of a step")
    handles = [Line2D([], [], color=colors[name], label=name) for name in exchanges]
    styles = [("o", "black", "measured"), ("x", "black", "predicted"), ("o", "none", "projected, not measured")]
    handles += [
        Line2D([], [], color="black", marker=marker, markerfacecolor=fill, linestyle="", label=label)
        for marker, fill, label in styles
    ]
    handles.append(Line2D([], [], color="grey", linestyle="--", label="as many times as hosts"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=150)


def _draw(upper: Any, lower: Any, measured: Sequence[Row], projected: Sequence[Projection], color: Any) -> None:
    """One exchange's marks at one rate."""
    hosts = [row.hosts for row in measured]
    upper.plot(hosts, [row.speedup for row in measured], marker="o", color=color)
    lower.plot(hosts, [row.exposed for row in measured], marker="o", color=color)
    predicted = [(row, row.predicted) for row in measured if row.predicted]
    hosts = [row.hosts for row, _ in predicted]
    crosses = {"marker": "x", "color": color, "linestyle": "", "markersize": 9}
    upper.plot(hosts, [row.predicted_speedup for row, _ in predicted], **crosses)
    lower.plot(hosts, [one.exposed_seconds / one.seconds for _, one in predicted], **crosses)
    hosts = [one.hosts for one in projected]
    hollow = {"marker": "o", "markerfacecolor": "none", "color": color, "linestyle": ":"}
    upper.plot(hosts, [one.speedup for one in projected], **hollow)
    lower.plot(hosts, [one.exposed for one in projected], **hollow)
