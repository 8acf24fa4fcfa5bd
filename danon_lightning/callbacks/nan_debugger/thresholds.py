"""Gradients and weights that are still finite, but look odd."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from danon_lightning.callbacks.nan_debugger.check import Reading
from danon_lightning.callbacks.nan_debugger.history import History

# Medians are taken anew so often: they move slowly, and cost more than all else here.
_MEDIAN_EVERY = 10
# A gradient that is this many times as large as when it was first found small is growing, not vanishing.
_GROWS = 2.0
# As many parameters are listed.
_LISTED = 3


@dataclass(frozen=True)
class NumericLimits:
    """What counts as odd. None switches a limit off.

    An explosion in comparison with what is usual has to matter to the whole model: a layer that begins at zero may
    grow a thousandfold and still be faint. So it must be ``explosion_share`` of the whole model's usual norm, too.
    A gradient that vanishes must likewise be faint beside the rest of the model, and must not be growing.

    Attributes:
        explosion: Norm of the gradient of one parameter.
        explosion_factor: The same, as a multiple of its median over the last steps,
        explosion_share: and at once as a share of the median norm of all gradients together.
        vanishing: A norm below it, in each of ``vanishing_steps`` steps, is as good as none,
        vanishing_share: if it is below this share of the median norm of all gradients together, too.
        vanishing_steps: See above.
        weight: Absolute value of a weight.
        window: What is odd in one way is mentioned again only after so many steps.
        warmup_steps: Nothing is usual before a parameter has had a gradient in so many steps (at most as many as the
            history holds).
    """

    explosion: float | None = 1e6
    explosion_factor: float | None = 100.0
    explosion_share: float = 1.0
    vanishing: float | None = 1e-10
    vanishing_share: float = 1e-6
    vanishing_steps: int = 20
    weight: float | None = 1e4
    window: int = 100
    warmup_steps: int = 20

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in ("explosion", "vanishing", "weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive, or None to switch the limit off")
        if self.explosion_factor is not None and not self.explosion_factor > 1:
            raise ValueError(f"explosion_factor={self.explosion_factor} must be above 1, or None to switch it off")
        if not self.explosion_share >= 0:
            raise ValueError(f"explosion_share={self.explosion_share} must be at least 0")
        if not self.vanishing_share > 0:
            raise ValueError(f"vanishing_share={self.vanishing_share} must be positive; float('inf') for no such limit")
        for name in ("vanishing_steps", "window", "warmup_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Oddity:
    """A parameter that stands out.

    Attributes:
        kind: "explosion", "vanishing" or "weight".
        parameter: Its name.
        value: Norm of its gradient, or largest absolute weight.
        usual: Median of the norms of the last steps, NaN if they are too few; for a weight the limit.
    """

    kind: str
    parameter: str
    value: float
    usual: float

    @property
    def badness(self) -> float:
        """The larger, the worse, among those of one kind."""
        return -self.value if self.kind == "vanishing" else self.value

    def __str__(self) -> str:
        """In a few words."""
        compared = "" if np.isnan(self.usual) or self.kind == "weight" else f" (usually {self.usual:.3g})"
        return f"{self.parameter} {self.value:.3g}{compared}"


def describe(oddities: Sequence[Oddity]) -> str:
    """One sentence on all that is odd in one way, the worst first.

    Args:
        oddities: Of one kind, one at least, each of another parameter.
    """
    worst = sorted(oddities, key=lambda one: one.badness, reverse=True)
    kind, count = worst[0].kind, len(worst)
    what, measure = {
        "explosion": ("the gradient explodes", "norms"),
        "vanishing": ("the gradient vanishes", "norms"),
        "weight": (f"weights exceed {worst[0].usual:.3g}", "largest"),
    }[kind]
    listed = ", ".join(map(str, worst[:_LISTED])) + (f" and {count - _LISTED} more" if count > _LISTED else "")
    return f"{what} in {count} parameter{'s' if count > 1 else ''}, {measure}: {listed}"


class Watch:
    """Compares each step with the limits, and mentions what is odd in one way once in a while.

    Args:
        limits: What counts as odd.
        history: The steps before, to which the present one has not yet been added.

    Attributes:
        worst: Of each kind, the worst that was seen of each parameter.
    """

    def __init__(self, limits: NumericLimits, history: History) -> None:
        """See the class."""
        self.limits, self._history = limits, history
        self.worst: dict[str, dict[str, Oddity]] = {}
        self._mentioned: dict[str, int] = {}
        self._begin(())

    def _begin(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._small: NDArray[np.int64] = np.zeros(len(names), np.int64)
        self._small_from: NDArray[np.float64] = np.zeros(len(names))
        self._medians: NDArray[np.float64] = np.full(len(names), np.nan)
        self._medians_at = -_MEDIAN_EVERY
        self._total = np.nan

    def look(self, step: int, reading: Reading) -> dict[str, list[Oddity]]:
        """What is odd in a finite step, by kind; of kinds that have not been mentioned lately."""
        limits, norms = self.limits, reading.norms
        if step < self._medians_at:  # another fit
            self._mentioned.clear()
        if reading.names != self._names or step < self._medians_at:
            self._begin(reading.names)
        if step - self._medians_at >= _MEDIAN_EVERY:
            known = self._history.medians(self._names, limits.warmup_steps)
            self._medians = np.where(known > 0, known, np.nan)  # nothing is a multiple of zero
            self._total, self._medians_at = self._history.median_total(), step
        total = reading.total_norm if np.isnan(self._total) else self._total
        exploding = np.zeros(len(norms), bool)
        if limits.explosion is not None:
            exploding |= norms > limits.explosion
        if limits.explosion_factor is not None:  # false where the median is NaN
            exploding |= (norms > limits.explosion_factor * self._medians) & (norms > limits.explosion_share * total)
        found = [("explosion", int(i)) for i in np.flatnonzero(exploding)]
        if limits.vanishing is not None:
            vanishing = self._vanishing(norms, min(limits.vanishing, limits.vanishing_share * total))
            found += [("vanishing", int(i)) for i in np.flatnonzero(vanishing)]
        odd = [Oddity(kind, reading.names[i], float(norms[i]), float(self._medians[i])) for kind, i in found]
        if limits.weight is not None:
            largest = [(name, value) for name, value in reading.weights.items() if value > limits.weight]
            odd += [Oddity("weight", name, value, limits.weight) for name, value in largest]
        by_kind: dict[str, list[Oddity]] = {}
        for one in odd:
            by_kind.setdefault(one.kind, []).append(one)
            worst = self.worst.setdefault(one.kind, {})
            if one.parameter not in worst or one.badness > worst[one.parameter].badness:
                worst[one.parameter] = one
        return {kind: those for kind, those in by_kind.items() if self._is_news(step, kind)}

    def _vanishing(self, norms: NDArray[np.float64], limit: float) -> NDArray[np.bool_]:
        """Which have been small for long, and have not grown meanwhile."""
        small = norms < limit
        begins = small & ((self._small == 0) | (norms > _GROWS * self._small_from))
        self._small_from = np.where(begins, norms, self._small_from)
        self._small = np.where(begins, 1, np.where(small, self._small + 1, 0))
        return self._small >= self.limits.vanishing_steps

    def _is_news(self, step: int, kind: str) -> bool:
        is_news = step - self._mentioned.get(kind, -self.limits.window) >= self.limits.window
        if is_news:
            self._mentioned[kind] = step
        return is_news
