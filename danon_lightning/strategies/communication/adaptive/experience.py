"""What steps have really taken with each candidate, which is to be believed rather than any prediction."""

from dataclasses import dataclass

# Of a record each look counts alike at first, and later ones at least so much.
_LEAST_WEIGHT = 0.2
# Links whose bandwidths differ by less than this factor are alike.
_ALIKE = 1.5
# Where steps of the same candidate become longer or shorter by this factor, they are other steps than before.
_OTHER_STEPS = 1.4
# After so many looks a record is forgotten: what was slow then may no longer be.
_KEPT_LOOKS = 200


@dataclass
class _Record:
    bandwidth: float
    seconds: float
    looks: int
    last: int


class Experience:
    """Remembers steps by candidate and by bandwidth.

    A prediction does not know what an exchange does to everything else: where ranks share processors, coding makes the
    backward pass longer too. So a candidate that was tried is judged by its steps, as long as links and steps are what
    they were; also when a link comes back to a bandwidth that it has had before. And one that was not is taken to
    disturb the rest of a step as much as others that code, if any was tried.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._records: dict[str, list[_Record]] = {}
        self._computing: dict[bool, float] = {}  # by whether gradients are coded meanwhile

    def note(self, name: str, bandwidth: float, seconds: float, look: int, *, computing: float, codes: bool) -> None:
        """Take note of steps.

        Args:
            name: Of the candidate that was in use.
            bandwidth: Between nodes, in any unit.
            seconds: What a step has taken.
            look: Number of the look.
            computing: Of these, all but what the exchange has added.
            codes: Whether the candidate codes gradients.
        """
        record = self._find(name, bandwidth)
        if record is not None and not 1 / _OTHER_STEPS < seconds / record.seconds < _OTHER_STEPS:
            self._records.clear()
            self._computing.clear()
            record = None
        if record is None:
            record = _Record(bandwidth, seconds, 0, look)
            self._records.setdefault(name, []).append(record)
        record.looks, record.last = record.looks + 1, look
        record.seconds += max(1 / record.looks, _LEAST_WEIGHT) * (seconds - record.seconds)
        before = self._computing.get(codes, computing)
        self._computing[codes] = before + _LEAST_WEIGHT * (computing - before)

    def recall(self, name: str, bandwidth: float, look: int) -> float | None:
        """What a step takes with a candidate; None if that was not tried, or long ago.

        Args:
            name: Of the candidate.
            bandwidth: Between nodes at present.
            look: Number of the look.
        """
        record = self._find(name, bandwidth)
        return record.seconds if record is not None and look - record.last <= _KEPT_LOOKS else None

    def computing(self, *, codes: bool) -> float | None:
        """All of a step but what the exchange adds, while gradients are coded or are not; None if nothing was seen.

        As long as one of the two was not seen, it is taken to be like the other.
        """
        return self._computing.get(codes, self._computing.get(not codes))

    def _find(self, name: str, bandwidth: float) -> _Record | None:
        alike = [one for one in self._records.get(name, []) if 1 / _ALIKE < bandwidth / one.bandwidth < _ALIKE]
        return max(alike, key=lambda one: one.last, default=None)
