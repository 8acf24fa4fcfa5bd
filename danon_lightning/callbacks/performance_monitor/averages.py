"""Means of what is known."""

from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    """Of those that are known; NaN if none is.

    Args:
        values: NaN for unknown.
    """
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")
