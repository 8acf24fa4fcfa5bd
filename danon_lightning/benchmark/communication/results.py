"""The figures of one variant at one rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """What became of one variant at one rate. Bytes are of one step and the node that sends most.

    Attributes:
        variant: Its name.
        mbit: Rate of each host's link in Mbit/s; None for unshaped.
        status: Whether it was measured, stopped with an error, or had to be stopped.
        message: Why it was not measured.
        detail: Where that was: a traceback, or the stack of a rank that hung.
        seconds: Median step, on the slowest rank.
        best_seconds: Shortest step.
        flat_seconds: Median step of "flat" in the same job; for a variant with a job of its own, at the same rate.
        formula_bytes: Bytes that should leave a node by the algorithm; None with only one node.
        egress_bytes: Bytes that did, by the count of the host's interface; None without emulated hosts.
        payload_bytes: Bytes that this package's own statistics counted; None for variants of others.
    """

    variant: str
    mbit: float | None
    status: Literal["finished", "crashed", "hung"]
    message: str = ""
    detail: str = ""
    seconds: float | None = None
    best_seconds: float | None = None
    flat_seconds: float | None = None
    formula_bytes: float | None = None
    egress_bytes: float | None = None
    payload_bytes: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster than "flat" it was."""
        return self.flat_seconds / self.seconds if self.seconds and self.flat_seconds else None

    @property
    def line_rate_share(self) -> float | None:
        """Share of the link's rate that it used over the whole step."""
        if not self.seconds or self.egress_bytes is None or self.mbit is None:
            return None
        return self.egress_bytes * 8 / (self.seconds * self.mbit * 1e6)


def measured_rates(rows: Sequence[Row]) -> list[float | None]:
    """The rates of these rows in rising order, each once; unshaped, None, is the highest."""
    rates = {row.mbit for row in rows}
    return [*sorted(rate for rate in rates if rate is not None), *([None] if None in rates else [])]
