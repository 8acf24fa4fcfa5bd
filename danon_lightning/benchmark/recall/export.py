"""What the JSON file of a run holds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from danon_lightning.benchmark.recall.model import Matched
from danon_lightning.benchmark.recall.report import HIGHER_IS_BETTER
from danon_lightning.benchmark.recall.results import Budget, Run, summarize
from danon_lightning.benchmark.recall.settings import Task

_BUDGETS: tuple[Budget, ...] = ("steps", "time")


def to_json(
    arguments: Mapping[str, Any],
    environment: Mapping[str, Any],
    models: Mapping[str, Matched],
    runs: Sequence[Run],
    task: Task,
) -> dict[str, Any]:
    """All there is to keep of a run, as JSON can hold it.

    Args:
        arguments: What was asked for, defaults included.
        environment: What it ran on.
        models: The models, by line of the tables.
        runs: All runs.
        task: What the figures are.
    """
    labels = dict.fromkeys(run.label for run in runs)
    higher = HIGHER_IS_BETTER[task]
    summaries = [summarize(runs, label, budget, higher_is_better=higher) for budget in _BUDGETS for label in labels]
    return {
        "benchmark": "recall",
        "arguments": dict(arguments),
        "environment": dict(environment),
        "models": {
            label: {
                "config_class": type(matched.config).__name__,
                "config": asdict(matched.config),
                "parameters": matched.parameters,
                "deviation": matched.deviation,
            }
            for label, matched in models.items()
        },
        "summaries": [asdict(summary) for summary in summaries if summary is not None],
        "runs": [asdict(run) for run in runs],
    }
