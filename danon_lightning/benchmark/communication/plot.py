"""Step time against bandwidth. Needs matplotlib: see ``danon_lightning.benchmark.plotting``."""

from collections.abc import Sequence
from pathlib import Path

from danon_lightning.benchmark.communication.crossovers import Crossover, find_crossovers
from danon_lightning.benchmark.communication.results import Row, measured_rates
from danon_lightning.benchmark.communication.variants import ALONE, DENSE, FLAT, VARIANTS
from danon_lightning.benchmark.network import format_rate

# Where unshaped, which has no rate, is put: so many times the highest rate.
_UNSHAPED_FACTOR = 5.0
_ONLY_UNSHAPED_MBIT = 1000.0
# The references and the lower bound stand out from the rest.
_COLORS = {FLAT: "black", DENSE: "black", ALONE: "grey"}
# Where a variant is exactly as fast as this reference.
_MARKERS = {FLAT: "o", DENSE: "D"}


def save_plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw step time against bandwidth, both logarithmic: a line for each variant, and a mark where two cross.

    Args:
        rows: The figures.
        title: What they are of.
        path: A PNG file.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    rates = measured_rates(rows)
    shaped = [rate for rate in rates if rate is not None]
    unshaped = shaped[-1] * _UNSHAPED_FACTOR if shaped else _ONLY_UNSHAPED_MBIT
    positions = {rate: unshaped if rate is None else rate for rate in rates}
    seconds = {(row.variant, row.mbit): row.seconds for row in rows if row.seconds is not None}

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.add_subplot()
    crossovers = find_crossovers(rows)
    for index, variant in enumerate(dict.fromkeys(row.variant for row in rows)):
        measured = [rate for rate in rates if (variant, rate) in seconds]
        axes.plot(
            [positions[rate] for rate in measured],
            [seconds[variant, rate] for rate in measured],
            marker=".",
            color=_COLORS.get(variant) or colormaps["tab20"](index),
            linestyle="-" if VARIANTS[variant].ours else "--",
            label=_label(variant, crossovers) if measured else f"{variant} (failed)",
        )
    for reference, marker in _MARKERS.items():
        found = [(c.mbit, c.seconds) for c in crossovers if c.reference == reference and c.mbit and c.seconds]
        if found:
            label = f"as fast as {reference}"
            axes.scatter(*zip(*found, strict=True), marker=marker, facecolors="none", edgecolors="black", label=label)
    axes.set(xscale="log", yscale="log" if seconds else "linear", title=title, ylabel="seconds a step")
    axes.set_xlabel("rate of each host's link (unshaped has none: its place is arbitrary)")
    axes.set_xticks(list(positions.values()), [format_rate(rate) for rate in rates])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, format="png", dpi=150)


def _label(variant: str, crossovers: Sequence[Crossover]) -> str:
    """For the legend, which has room for the rates: ``int8, as flat at 3.4 Gbit/s``."""
    places = [f"as {c.reference} at {format_rate(c.mbit)}" for c in crossovers if c.variant == variant and c.mbit]
    return ", ".join([variant, *places])
