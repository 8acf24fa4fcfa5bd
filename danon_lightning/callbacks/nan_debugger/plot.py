"""The norms of the last steps as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from danon_lightning.callbacks.nan_debugger.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_history(history: History, bad_steps: Sequence[int] = (), *, most: int = 12) -> "Figure":
    """Draw norms of gradients against steps, with a logarithmic scale.

    Above, all gradients together; below, the parameters with the largest norms in the last finite step, and those with
    the smallest. Steps that were not finite are red lines. Needs matplotlib.

    Args:
        history: The last steps.
        bad_steps: Steps that were not finite.
        most: How many parameters are drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = np.array(history.steps)
    above.plot(steps, history.total_norms, color="#4477aa")
    above.set_ylabel("norm of all gradients")
    norms = history.norms()
    for column in _chosen(norms, most):
        below.plot(steps, norms[:, column], linewidth=1, label=history.names[column])
    below.set_ylabel("norm by parameter")
    below.set_xlabel("optimizer step")
    for axes, values in ((above, np.array(history.total_norms)), (below, norms)):
        if np.any(values > 0):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        for step in bad_steps:
            if steps.size and steps[0] <= step <= steps[-1] + 1:
                axes.axvline(step, color="#cc3311", linewidth=1)
    if norms.shape[1]:
        below.legend(fontsize=7, ncols=2, frameon=False)
    return figure


def save_plot(history: History, path: str | Path, bad_steps: Sequence[int] = ()) -> None:
    """Write :func:`draw_history` to a PNG file, whose folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_history(history, bad_steps).savefig(path, dpi=120)


def _chosen(norms: np.ndarray, most: int) -> list[int]:
    known = np.isfinite(norms).any(1)
    if not norms.shape[1] or not known.any():
        return []
    last = norms[np.flatnonzero(known)[-1]]
    order = [int(i) for i in np.argsort(-np.nan_to_num(last, nan=-1.0))]
    return order if len(order) <= most else [*order[: most // 2], *order[-(most - most // 2) :]]
