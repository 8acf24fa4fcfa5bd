"""At which bandwidth one variant becomes faster than another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from danon_lightning.benchmark.communication.results import Row, measured_rates
from danon_lightning.benchmark.communication.variants import ALONE, DENSE, FLAT
from danon_lightning.benchmark.network import format_rate

# What the others are held against: what one has without this package, and without compression.
REFERENCES = (FLAT, DENSE)


@dataclass(frozen=True)
class Crossover:
    """A rate at which a variant and a reference take equally long.

    Between two measured rates, step times are taken as straight lines on logarithmic scales. Between the highest rate
    and unshaped, which has no rate, nothing is interpolated.

    Attributes:
        variant: Name of the variant.
        reference: Name of the reference.
        faster: On which side of the crossover the variant is the faster one.
        mbit: Where the lines cross, in Mbit/s; None if only known to be above ``low_mbit``.
        seconds: Step time there; None likewise.
        low_mbit: The next measured rate below.
        high_mbit: The next measured rate above; None for unshaped.
    """

    variant: str
    reference: str
    faster: Literal["below", "above"]
    mbit: float | None
    seconds: float | None
    low_mbit: float
    high_mbit: float | None


def find_crossovers(rows: Sequence[Row]) -> list[Crossover]:
    """All crossovers of all variants with each of :data:`REFERENCES`, in the order of the rows."""
    found = []
    for reference in REFERENCES:
        for variant in compared_variants(rows, reference):
            for low, high in pairwise(_points(rows, variant, reference)):
                if (low.gap < 0) != (high.gap < 0):
                    found.append(_crossover(variant, reference, low, high))
    return found


def where_faster(rows: Sequence[Row], variant: str, reference: str) -> str:
    """In words, at which rates the variant was faster than the reference; "-" if they were not measured together."""
    points = _points(rows, variant, reference)
    if not points:
        return "-"
    crossovers = [c for c in find_crossovers(rows) if (c.variant, c.reference) == (variant, reference)]
    if not crossovers:
        return "everywhere" if points[0].gap < 0 else "nowhere"
    return " and ".join(_describe(crossover) for crossover in crossovers)


def compared_variants(rows: Sequence[Row], reference: str) -> list[str]:
    """Names of the variants that can be held against a reference, in the order of the rows."""
    names = dict.fromkeys(row.variant for row in rows)
    return [name for name in names if name not in (ALONE, FLAT, reference)]


@dataclass(frozen=True)
class _Point:
    mbit: float | None
    gap: float  # logarithm of the variant's time over the reference's
    seconds: float  # the reference's


def _points(rows: Sequence[Row], variant: str, reference: str) -> list[_Point]:
    """By rising rate, where both were measured."""
    seconds = {(row.variant, row.mbit): row.seconds for row in rows}
    points = []
    for mbit in measured_rates(rows):
        mine, other = seconds.get((variant, mbit)), seconds.get((reference, mbit))
        if mine and other:
            points.append(_Point(mbit, math.log(mine / other), other))
    return points


def _crossover(variant: str, reference: str, low: _Point, high: _Point) -> Crossover:
    assert low.mbit is not None  # unshaped is the last point
    mbit = seconds = None
    if high.mbit is not None:
        share = low.gap / (low.gap - high.gap)
        mbit = low.mbit * (high.mbit / low.mbit) ** share
        seconds = low.seconds * (high.seconds / low.seconds) ** share
    faster: Literal["below", "above"] = "below" if low.gap < 0 else "above"
    return Crossover(variant, reference, faster, mbit, seconds, low.mbit, high.mbit)


def _describe(crossover: Crossover) -> str:
    if crossover.mbit is not None:
        return f"{crossover.faster} {format_rate(crossover.mbit)}"
    if crossover.faster == "below":
        return f"up to {format_rate(crossover.low_mbit)}, not unshaped"
    return "unshaped"
