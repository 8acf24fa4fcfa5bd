"""What became of the runs, and what they say together."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from danon_lightning.benchmark.recall.settings import FULL
from danon_lightning.benchmark.recall.training import Point
from danon_lightning.benchmark.workers import Status

# What the runs have in common: as many steps as all, or as much time as full attention takes for its steps.
Budget = Literal["steps", "time"]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        label: The line of the tables.
        seed: Of weights and data.
        budget: Whether its steps are those of all runs, or as many as fit into the time of full attention.
        steps: Steps that were asked for.
        parameters: Parameters of the model; 0 if there is none.
        status: Whether it ended, and if not, how it failed.
        message: Why.
        detail: Where that was, if it raised.
        points: Evaluations, the last one after the last step.
    """

    label: str
    seed: int
    budget: Budget
    steps: int
    parameters: int
    status: Status
    message: str = ""
    detail: str = ""
    points: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Summary:
    """Runs of one line with all seeds.

    Attributes:
        label: The line.
        budget: What its runs have in common with others.
        runs: Runs that came to their end.
        failed: Runs that did not.
        parameters: Parameters of the model.
        steps: Steps of a run.
        seconds: Mean time of training.
        mean: Mean figure after the last step.
        deviation: Standard deviation of it over the seeds; None for a single one.
        low: Lowest figure after the last step.
        high: Highest one.
        best: Mean over the seeds of the best figure on the way: better than ``mean`` where training fell back.
    """

    label: str
    budget: Budget
    runs: int
    failed: int
    parameters: int
    steps: int
    seconds: float | None = None
    mean: float | None = None
    deviation: float | None = None
    low: float | None = None
    high: float | None = None
    best: float | None = None


def summarize(runs: Sequence[Run], label: str, budget: Budget, *, higher_is_better: bool) -> Summary | None:
    """What the runs of a line with one budget say; None if there are none.

    Full attention has the same runs for both budgets.
    """
    own_budget = "steps" if label == FULL else budget
    mine = [run for run in runs if (run.label, run.budget) == (label, own_budget)]
    if not mine:
        return None
    ended = [run.points for run in mine if run.status == "finished"]
    known = Summary(label, budget, len(ended), len(mine) - len(ended), mine[0].parameters, mine[0].steps)
    if not ended:
        return known
    last = [points[-1].figure for points in ended]
    best = max if higher_is_better else min
    return Summary(
        label,
        budget,
        known.runs,
        known.failed,
        known.parameters,
        known.steps,
        seconds=statistics.mean(points[-1].seconds for points in ended),
        mean=statistics.mean(last),
        deviation=statistics.stdev(last) if len(last) > 1 else None,
        low=min(last),
        high=max(last),
        best=statistics.mean(best(point.figure for point in points) for points in ended),
    )


def steps_in_equal_time(runs: Sequence[Run], label: str) -> int | None:
    """Steps for which a line needs the time that full attention needed for its own; None if that is not known."""
    per_step = {}
    for name in (FULL, label):
        summary = summarize(runs, name, "steps", higher_is_better=True)
        if summary is None or not summary.seconds:
            return None
        per_step[name] = summary.seconds / summary.steps
        if name == FULL:
            time = summary.seconds
    return max(1, round(time / per_step[label]))
