"""The figure against steps. Needs matplotlib: see ``danon_lightning.benchmark.plotting``."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from danon_lightning.benchmark.recall.report import FIGURES
from danon_lightning.benchmark.recall.results import Run
from danon_lightning.benchmark.recall.settings import FULL, Task


def save_plot(runs: Sequence[Run], task: Task, title: str, path: Path) -> None:
    """Draw the runs with equal steps: a line for the mean over the seeds, and the range of all of them behind it.

    Args:
        runs: All runs.
        task: What the figures are.
        title: What they are of.
        path: A PNG file.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    labels = list(dict.fromkeys(run.label for run in runs))
    for index, label in enumerate(labels):
        curves = [r.points for r in runs if (r.label, r.budget, r.status) == (label, "steps", "finished")]
        if curves:
            # Before the first step nothing is known, which would only stretch the scale.
            steps = [point.step for point in curves[0]][1:]
            figures = [[point.figure for point in points] for points in zip(*curves, strict=True)][1:]
            color = "black" if label == FULL else colormaps["tab10"](index % 10)
            axes.fill_between(steps, list(map(min, figures)), list(map(max, figures)), color=color, alpha=0.12)
            axes.plot(steps, list(map(statistics.mean, figures)), marker=".", color=color, label=label)
    axes.set(title=title, xlabel="steps", ylabel=f"{FIGURES[task]}, mean and range over the seeds")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=150)
