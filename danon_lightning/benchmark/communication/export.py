"""What the JSON file of a run holds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from danon_lightning.benchmark.communication.crossovers import find_crossovers
from danon_lightning.benchmark.communication.results import Row


def to_json(arguments: Mapping[str, Any], environment: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """All there is to keep of a run, as JSON can hold it. Rates are in Mbit/s, null for unshaped.

    Args:
        arguments: What was asked for, defaults included.
        environment: What it ran on.
        rows: The figures.
    """
    return {
        "benchmark": "communication",
        "arguments": dict(arguments),
        "environment": dict(environment),
        "rows": [{**asdict(row), "ratio": row.ratio, "line_rate_share": row.line_rate_share} for row in rows],
        "crossovers": [asdict(crossover) for crossover in find_crossovers(rows)],
    }
