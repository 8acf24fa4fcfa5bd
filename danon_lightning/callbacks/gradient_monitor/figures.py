"""Pictures of a whole run: one in place of a chart for each layer."""

from typing import TYPE_CHECKING

import numpy as np

from danon_lightning.callbacks.gradient_monitor.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN_NAMES = 40


def heat_map(history: History) -> "Figure":
    """Norms of gradients before clipping: layers downwards in the order of the model, steps to the right.

    Blank is where there was no gradient, or a zero one; what is not finite is red.

    Args:
        history: The run.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    norms = history.norms()
    rows = len(history.layers)
    broken = np.isinf(norms)
    with np.errstate(divide="ignore"):
        shown = np.ma.masked_invalid(np.log10(norms))
    figure = Figure(figsize=(10, 1.5 + min(10.0, 0.22 * rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis")
    if broken.any():
        overlay = np.zeros((*broken.shape, 4))
        overlay[broken] = colormaps["Reds"](0.8)
        axes.imshow(overlay, aspect="auto", interpolation="nearest")
    every = max(1, -(-rows // _SHOWN_NAMES))
    axes.set_yticks(range(0, rows, every), history.layers[::every], fontsize=7)
    columns = range(0, len(history.moments), max(1, len(history.moments) // 8))
    axes.set_xticks(list(columns), [str(history.moments[column].step) for column in columns])
    axes.set_xlabel("step")
    axes.set_title("gradient norm by layer")
    figure.colorbar(image, ax=axes, label="log₁₀ of the norm")
    return figure


def norm_plot(history: History, layers: int = 5) -> "Figure":
    """Norms over steps on a logarithmic scale: of all, before and after clipping, and of the largest layers.

    Args:
        history: The run.
        layers: How many layers.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    steps = [moment.step for moment in history.moments]
    axes.plot(steps, [_positive(moment.norm) for moment in history.moments], color="black", label="all")
    clipped = [np.nan if moment.clipped is None else _positive(moment.clipped) for moment in history.moments]
    if any(a != b for a, b in zip(clipped, (moment.norm for moment in history.moments), strict=True)):
        axes.plot(steps, clipped, color="black", linestyle="--", label="all, clipped")
    norms = history.norms()
    with np.errstate(invalid="ignore"):
        median = np.array([np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else -1.0 for row in norms])
    for index in np.argsort(-median)[:layers]:
        if median[index] > 0:
            axes.plot(steps, [_positive(value) for value in norms[index]], linewidth=1, label=history.layers[index])
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("gradient norm")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _positive(value: float) -> float:
    """What a logarithmic scale can show; else a gap."""
    return float(value) if np.isfinite(value) and value > 0 else float("nan")
