"""The figures of a run, and what follows from them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from danon_lightning.benchmark.attention.contenders import SDPA

Direction = Literal["forward", "both"]
Status = Literal["finished", "crashed", "killed", "too slow", "left out"]


@dataclass(frozen=True)
class Row:
    """What became of one contender at one length in one direction.

    Attributes:
        contender: Its name.
        length: Tokens n.
        direction: "forward", or "both" for forward and backward.
        status: Whether it was measured, and if not, how it failed or that it was not tried.
        message: Why it was not measured.
        detail: Where that was, if it raised.
        seconds: Median run: time of the processor on CPU, of the clock on CUDA.
        best_seconds: Shortest run.
        runs: Number of runs.
        peak_bytes: Most memory beyond inputs and parameters.
        input_bytes: Size of the inputs.
    """

    contender: str
    length: int
    direction: Direction
    status: Status
    message: str = ""
    detail: str = ""
    seconds: float | None = None
    best_seconds: float | None = None
    runs: int = 0
    peak_bytes: int | None = None
    input_bytes: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second."""
        return self.length / self.seconds if self.seconds else None


@dataclass(frozen=True)
class StateRow:
    """The streaming state of one contender after some tokens.

    Attributes:
        contender: Its name.
        length: Tokens seen.
        status: Whether it was measured, and if not, how it failed or that it was not tried.
        message: Why it was not measured.
        detail: Where that was, if it raised.
        state_bytes: Size of the state.
        peak_bytes: Most memory while it streamed, inputs of a piece included.
        seconds: Time of streaming so far.
    """

    contender: str
    length: int
    status: Status
    message: str = ""
    detail: str = ""
    state_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: float | None = None


def find_row(rows: Iterable[Row], contender: str, length: int, direction: Direction) -> Row | None:
    """The row of a cell, if there is one."""
    cell = (contender, length, direction)
    return next((row for row in rows if (row.contender, row.length, row.direction) == cell), None)


def ratio(rows: Sequence[Row], row: Row) -> float | None:
    """How many times faster than SDPA at the same length in the same run; None if either was not measured."""
    reference = find_row(rows, SDPA, row.length, row.direction)
    if reference is None or not reference.seconds or not row.seconds:
        return None
    return reference.seconds / row.seconds


def growth_exponent(points: Iterable[tuple[float, float | None]], low: float, high: float) -> float | None:
    """The power of the length by which a figure grows: a line of least squares through the logarithms of both.

    Args:
        points: Lengths, and the figure at each, None where it is missing.
        low: Smallest length to take into account.
        high: Largest one.

    Returns:
        The slope; None with fewer than two points in the range.
    """
    logs = [(math.log(n), math.log(value)) for n, value in points if value and low <= n <= high]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def exponent_of(rows: Iterable[Row], contender: str, direction: Direction, fit: tuple[int, int]) -> float | None:
    """The exponent by which the time of a contender grows over the lengths of ``fit``, both ends included."""
    points = [(r.length, r.seconds) for r in rows if (r.contender, r.direction) == (contender, direction)]
    return growth_exponent(points, *fit)


def expected_seconds(measured: Sequence[tuple[int, float]], length: int, *, presumed: float = 1.0) -> float | None:
    """What a run should take at a length that is larger than those measured so far; None with nothing to go by.

    Args:
        measured: Lengths and seconds, rising.
        length: The length.
        presumed: The exponent by which time grows, where a single length says nothing of it.
    """
    if not measured:
        return None
    last, seconds = measured[-1]
    exponent = presumed
    if len(measured) > 1:
        before, earlier = measured[-2]
        # Short sequences hardly grow, and nothing here grows faster than by its square.
        exponent = min(2.0, max(1.0, math.log(seconds / earlier) / math.log(last / before)))
    return seconds * (length / last) ** exponent
