"""Gradients and weights that are still finite, but look odd."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from danon_lightning.callbacks.nan_debugger.check import Reading
from danon_lightning.callbacks.nan_debugger.history import History

# As many steps must be known before one is said to stand out from them.
_MEDIAN_STEPS = 20
# The median of all parameters is taken anew so often: it moves slowly, and costs more than all else here.
_MEDIAN_EVERY = 10


@dataclass(frozen=True)
class NumericLimits:
    """What counts as odd. None switches a limit off.

    Attributes:
        explosion: Norm of the gradient of one parameter.
        explosion_factor: The same, as a multiple of its median over the last steps.
        vanishing: A norm below it, in each of ``vanishing_steps`` steps, is as good as none.
        vanishing_steps: See above.
        weight: Absolute value of a weight.
        window: A parameter is mentioned again only after so many steps.
    """

    explosion: float | None = 1e6
    explosion_factor: float | None = 100.0
    vanishing: float | None = 1e-10
    vanishing_steps: int = 20
    weight: float | None = 1e4
    window: int = 100

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in ("explosion", "vanishing", "weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive, or None to switch the limit off")
        if self.explosion_factor is not None and not self.explosion_factor > 1:
            raise ValueError(f"explosion_factor={self.explosion_factor} must be above 1, or None to switch it off")
        for name in ("vanishing_steps", "window"):
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

    def __str__(self) -> str:
        """In plain words."""
        if self.kind == "weight":
            return f"{self.parameter}: a weight has reached {self.value:.3g} (limit {self.usual:.3g})"
        compared = "" if np.isnan(self.usual) else f", usually {self.usual:.3g}"
        what = "explodes" if self.kind == "explosion" else "vanishes"
        return f"{self.parameter}: the gradient {what}, its norm is {self.value:.3g}{compared}"


class Watch:
    """Compares each step with the limits, and mentions each parameter once in a while.

    Args:
        limits: What counts as odd.
        history: The steps before, to which the present one has not yet been added.
    """

    def __init__(self, limits: NumericLimits, history: History) -> None:
        """See the class."""
        self.limits, self._history = limits, history
        self._mentioned: dict[tuple[str, str], int] = {}
        self._small: NDArray[np.int64] = np.zeros(0, np.int64)
        self._names: tuple[str, ...] = ()
        self._medians: NDArray[np.float64] = np.empty(0)
        self._medians_at = -_MEDIAN_EVERY

    def look(self, step: int, reading: Reading) -> list[Oddity]:
        """What is odd in a finite step, and has not been mentioned lately."""
        limits, norms = self.limits, reading.norms
        if reading.names != self._names:
            self._names, self._small = reading.names, np.zeros(len(norms), np.int64)
            self._medians_at = -_MEDIAN_EVERY
        usual = self._usual(step)
        exploding = np.zeros(len(norms), bool)
        if limits.explosion is not None:
            exploding |= norms > limits.explosion
        if limits.explosion_factor is not None:
            exploding |= norms > limits.explosion_factor * usual  # false where the median is NaN
        found = [("explosion", int(i)) for i in np.flatnonzero(exploding)]
        if limits.vanishing is not None:
            self._small = np.where(norms < limits.vanishing, self._small + 1, 0)
            found += [("vanishing", int(i)) for i in np.flatnonzero(self._small >= limits.vanishing_steps)]
        odd = [Oddity(kind, reading.names[i], float(norms[i]), float(usual[i])) for kind, i in found]
        if limits.weight is not None:
            odd += [
                Oddity("weight", name, value, limits.weight)
                for name, value in reading.weights.items()
                if value > limits.weight
            ]
        return [one for one in odd if self._is_news(step, one)]

    def _usual(self, step: int) -> NDArray[np.float64]:
        if step - self._medians_at >= _MEDIAN_EVERY:
            columns = self._history.columns(self._names)
            norms = self._history.norms()[:, columns]
            known = np.isfinite(norms).sum(0) >= _MEDIAN_STEPS
            self._medians = np.full(len(self._names), np.nan)
            if known.any():
                medians = np.nanmedian(norms[:, known], axis=0)
                self._medians[known] = np.where(medians > 0, medians, np.nan)  # nothing is a multiple of zero
            self._medians_at = step
        return self._medians

    def _is_news(self, step: int, odd: Oddity) -> bool:
        key = (odd.kind, odd.parameter)
        is_news = step - self._mentioned.get(key, -self.limits.window) >= self.limits.window
        if is_news:
            self._mentioned[key] = step
        return is_news
