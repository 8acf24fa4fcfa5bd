"""Keeps up with links that change: latency and bandwidth from what real transfers take."""

import math
import statistics
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from danon_lightning.strategies.communication.cost_model.links import Link

_KEPT = 64
# What the first guess weighs against one new observation: enough to tell latency from bandwidth where all transfers are
# of one size, and too little to matter where they are not.
_GUESS_WEIGHT = 0.01
_ITERATIONS = 12
# Residuals beyond so many times the median one are left out.
_OUTLIER = 4.0
_SMALLEST_RESIDUAL = 1e-4
# Observations contradict one another if, of the last ones, more than this share is off the line that fits them best by
# more than this part of what it says. So does a link that has just changed, for a while.
_LAST = 16
_TOLERATED_SHARE, _TOLERATED_ERROR = 0.3, 0.5
_LASTING = 16


class LinkEstimator:
    """Fits latency α and bandwidth β of a link to pairs of bytes and seconds, as they come.

    A weighted least-squares line through the last transfers, of which older ones count less (exponential forgetting),
    and single ones that are far off (a pause of the system, say) not at all. Errors count relative to what the line
    says, so that long transfers do not drown the short ones that tell the latency.

    Where transfers go on to contradict one another, as on a link that somebody else uses now and then, ``link`` is
    None: choose what is safe then (dense, by ring). It is there again once they agree for a while. A link that has
    changed for good is no contradiction: the estimate follows within ``half_life`` transfers or so.

    Args:
        link: The first guess, of a probe.
        half_life: Number of transfers after which one counts half.

    Raises:
        ValueError: If ``half_life`` is not positive.

    Reference:
        Schlossmacher, "An Iterative Technique for Absolute Deviations Curve Fitting", JASA 68(344), 1973, for the line
        that single outliers do not move.
    """

    def __init__(self, link: Link, *, half_life: float = 16.0) -> None:
        """See the class."""
        if not 0 < half_life < math.inf:
            raise ValueError(f"half_life={half_life} must be a number of transfers above 0")
        self._guess, self._decay = link, 0.5 ** (1 / half_life)
        self._pairs: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        self._estimate: Link | None = link  # None until it is asked for
        self._in_doubt = 0  # observations at which the last ones contradicted one another, less those at which not
        self._in_order = 0
        self._trusted = True

    @property
    def link(self) -> Link | None:
        """The link as it is now; None while observations contradict one another."""
        return self._fitted() if self._trusted else None

    def observe(self, num_bytes: float, seconds: float) -> None:
        """Take note of one transfer.

        Args:
            num_bytes: Its size: of all ranks of the node that have sent at the same time, if they have.
            seconds: What it took. A pair that cannot be (no bytes, no time, or not finite) counts as a contradiction.
        """
        possible = 0 < num_bytes < math.inf and 0 < seconds < math.inf
        if possible:
            self._pairs.append((float(num_bytes), float(seconds)))
            self._estimate = None
        contradictory = not possible or self._contradicts()
        if contradictory:
            self._in_doubt, self._in_order = min(self._in_doubt + 1, _LASTING), 0
        else:
            self._in_doubt, self._in_order = max(self._in_doubt - 1, 0), self._in_order + 1
        if self._trusted and self._in_doubt >= _LASTING:
            self._trusted = False
            warnings.warn(
                f"measurements of a link contradict one another (many are far off the line that fits best, "
                f"{self._fitted()}): until they agree, what is safe is to exchange dense, by ring",
                stacklevel=2,
            )
        elif not self._trusted and self._in_order >= _LASTING:
            self._trusted = True

    def state_dict(self) -> dict[str, Any]:
        """What has been observed, as plain numbers."""
        return {
            "guess": [self._guess.latency_seconds, self._guess.bytes_per_second],
            "pairs": [list(pair) for pair in self._pairs],
            "in_doubt": self._in_doubt,
            "in_order": self._in_order,
            "trusted": self._trusted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._guess, self._estimate = Link(*state["guess"]), None
        self._pairs = deque(((float(b), float(s)) for b, s in state["pairs"]), maxlen=_KEPT)
        self._in_doubt, self._in_order = int(state["in_doubt"]), int(state["in_order"])
        self._trusted = bool(state["trusted"])

    def _fitted(self) -> Link:
        if self._estimate is None:
            self._estimate = self._fit(list(self._pairs)) if self._pairs else self._guess
        return self._estimate

    def _contradicts(self) -> bool:
        last = list(self._pairs)[-_LAST:]
        if len(last) < _LAST:
            return False
        line = self._fit(last)
        off = sum(abs(seconds / line.seconds(size) - 1) > _TOLERATED_ERROR for size, seconds in last)
        return off > _TOLERATED_SHARE * _LAST

    def _fit(self, pairs: Sequence[tuple[float, float]]) -> Link:
        """The line that most of the pairs lie near, and then least squares through these."""
        ages = [self._decay ** (len(pairs) - 1 - index) for index in range(len(pairs))]
        line, weights = self._guess, ages
        for _ in range(_ITERATIONS):  # towards least absolute deviations
            line = self._least_squares(pairs, weights, line)
            residuals = [abs(seconds / line.seconds(size) - 1) for size, seconds in pairs]
            weights = [age / max(r, _SMALLEST_RESIDUAL) for age, r in zip(ages, residuals, strict=True)]
        usual = max(statistics.median(residuals), _SMALLEST_RESIDUAL)
        kept = [age * (r <= _OUTLIER * usual) for age, r in zip(ages, residuals, strict=True)]
        return self._least_squares(pairs, kept, line)

    def _least_squares(self, pairs: Sequence[tuple[float, float]], weights: Sequence[float], near: Link) -> Link:
        """Least squares of relative errors; ``near`` says what they are relative to."""
        guess, largest = self._guess, max(size for size, _ in pairs)
        heaviest = _GUESS_WEIGHT * (sum(weights) / len(weights))
        # The guess takes part as two observations, of nothing at all and of the largest transfer.
        points = [*zip(pairs, weights, strict=True)]
        points += [((0.0, guess.latency_seconds), heaviest), ((largest, guess.seconds(largest)), heaviest)]
        # In units of the largest transfer, for the numbers' sake. Normal equations of seconds = α + s·(size / largest).
        a = b = c = d = e = 0.0
        floor = 1e-3 * near.seconds(largest)
        for (size, seconds), weight in points:
            x, w = size / largest, weight / max(near.seconds(size), floor) ** 2
            a, b, c, d, e = a + w, b + w * x, c + w * x * x, d + w * seconds, e + w * x * seconds
        determinant = a * c - b * b
        slope = (a * e - b * d) / determinant
        latency = (d - b * slope) / a
        if latency < 0:
            latency, slope = 0.0, e / c
        # A transfer takes time, whatever the line says.
        slope = max(slope, 1e-3 * largest / guess.bytes_per_second)
        return Link(latency, largest / slope)


def agree_on_link(
    link: Link | None, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> Link | None:
    """The slowest of the ranks' estimates, the same on all of them; None if any rank has none. Collective.

    Args:
        link: This rank's estimate.
        group: Of the ranks; None for all.
        device: Where numbers can be reduced: that of the group's backend.
    """
    numbers = [1.0, 0.0, 0.0] if link is None else [0.0, link.latency_seconds, 1 / link.bytes_per_second]
    agreed = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
    missing, latency, per_byte = agreed.tolist()
    return None if missing else Link(latency, 1 / per_byte)
