"""Trains all that is asked for, several runs at the same time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from danon_lightning.benchmark.recall.model import Matched
from danon_lightning.benchmark.recall.mqar import MQAR
from danon_lightning.benchmark.recall.results import Budget, Run, steps_in_equal_time
from danon_lightning.benchmark.recall.settings import FULL, Sizes
from danon_lightning.benchmark.recall.training import Point, TrainPlan, train
from danon_lightning.benchmark.registered import modules_to_import
from danon_lightning.benchmark.workers import Outcome, run_isolated


@dataclass(frozen=True)
class Setting:
    """What all runs have in common.

    Attributes:
        task: The recall task; None for text.
        sizes: Sizes of a run.
        seeds: Seeds; each line is trained once with each.
        jobs: Runs at the same time.
        device: "cpu" or "cuda".
    """

    task: MQAR | None
    sizes: Sizes
    seeds: Sequence[int]
    jobs: int
    device: str


def train_all(
    models: dict[str, Matched],
    setting: Setting,
    budget: Budget,
    earlier: Sequence[Run],
    *,
    show: Callable[[str, str, int], None],
    keep: Callable[[Run], None],
) -> list[Run]:
    """Train every model with every seed.

    Args:
        models: What to train, by line of the tables.
        setting: What all runs have in common.
        budget: "steps" for the steps of the setting, "time" for as many as fit into the time of full attention, which
            is not trained again.
        earlier: Runs with equal steps, where ``budget`` is "time".
        show: Is told a run, how far it has come, and how many have ended.
        keep: Is given each run as it ends.
    """
    plans = []
    for label, matched in models.items():
        steps = setting.sizes.steps if budget == "steps" else steps_in_equal_time(earlier, label)
        if steps is None or (budget == "time" and label == FULL):
            continue
        sizes = replace(setting.sizes, steps=steps)
        plans += [
            TrainPlan(label, matched.config, setting.task, sizes, seed, setting.device, modules_to_import())
            for seed in setting.seeds
        ]
    runs: dict[int, Run] = {}

    def told(index: int, point: Any) -> None:
        assert isinstance(point, Point)
        plan = plans[index]
        subject = f"{plan.label}, seed {plan.seed}"
        show(subject, f"step {point.step} of {plan.sizes.steps}: {point.figure:.3f}", len(runs))

    def done(index: int, outcome: Outcome[list[Point]]) -> None:
        plan = plans[index]
        runs[index] = Run(
            plan.label,
            plan.seed,
            budget,
            plan.sizes.steps,
            models[plan.label].parameters,
            outcome.status,
            outcome.message,
            outcome.detail,
            tuple(outcome.value or ()),
        )
        keep(runs[index])

    run_isolated(train, plans, jobs=setting.jobs, told=told, done=done)
    return [runs[index] for index in range(len(plans))]
