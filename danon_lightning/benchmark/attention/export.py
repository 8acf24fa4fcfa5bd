"""What the JSON file of a run holds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from danon_lightning.benchmark.attention.results import Row, StateRow, exponent_of, ratio


def to_json(
    arguments: Mapping[str, Any],
    environment: Mapping[str, Any],
    rows: Sequence[Row],
    states: Sequence[StateRow],
    fit: tuple[int, int],
) -> dict[str, Any]:
    """All there is to keep of a run, as JSON can hold it.

    Args:
        arguments: What was asked for, defaults included.
        environment: What it ran on.
        rows: The figures.
        states: Those of streaming.
        fit: Smallest and largest length for exponents.
    """
    lines = dict.fromkeys((row.contender, row.direction) for row in rows)
    return {
        "benchmark": "attention",
        "arguments": dict(arguments),
        "environment": dict(environment),
        "rows": [
            {**asdict(row), "tokens_per_second": row.tokens_per_second, "ratio": ratio(rows, row)} for row in rows
        ],
        "states": [asdict(state) for state in states],
        "exponents": [
            {"contender": name, "direction": direction, "exponent": exponent_of(rows, name, direction, fit)}
            for name, direction in lines
        ],
    }
