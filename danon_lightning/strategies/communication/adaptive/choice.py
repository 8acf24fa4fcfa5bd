"""Which candidate is the best, and whether that is reason enough to change: pure functions of numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from danon_lightning.strategies.communication.adaptive.settings import AutoCompression

# A choice that was left again after so few looks was a mistake. It needs twice as many confirmations the next time.
_MISTAKE = 6
_MOST_PATIENCE = 16
_ROUNDING = 1e-9


@dataclass
class Chooser:
    """Compares predicted step times at each look, with hysteresis.

    It leaves the present choice if another one is faster by ``gain``, or as fast (by ``tie``) and less lossy, at so
    many looks in a row as ``confirmations``. For less than ``gain`` it takes more looks, in proportion; for less than
    ``tie`` there is never reason enough. Which one it goes to is what the last look says.

    Args:
        settings: The thresholds.
    """

    settings: AutoCompression
    _agreeing: float = field(default=0.0, init=False)
    _looks_since_change: int = field(default=_MISTAKE, init=False)
    _patience: dict[str, int] = field(default_factory=dict, init=False)

    def update(self, seconds: Mapping[str, float], current: str, *, at_once: bool = False) -> str:
        """Look once.

        Args:
            seconds: Predicted seconds of a step with each candidate, from the least lossy one on.
            current: The present choice, one of them.
            at_once: Whether nothing speaks for the present choice: it is the first one, or the link is another one now.

        Returns:
            What to choose: ``current``, if there is not reason enough for another one.
        """
        self._looks_since_change += 1
        target = self.best(seconds)
        if at_once:
            self._agreeing = 0.0
            return target
        weight = self._weight(seconds, target, current)
        if not weight:
            self._agreeing = 0.0
            return current
        self._agreeing += weight
        if self._agreeing < self.settings.confirmations * self._patience.get(target, 1) - _ROUNDING:
            return current
        if self._looks_since_change < _MISTAKE:
            self._patience[current] = min(2 * self._patience.get(current, 1), _MOST_PATIENCE)
        self._agreeing, self._looks_since_change = 0.0, 0
        return target

    @property
    def is_hesitating(self) -> bool:
        """Whether the last looks speak for another choice, but not yet clearly enough."""
        return self._agreeing > 0

    def best(self, seconds: Mapping[str, float]) -> str:
        """The least lossy of those that are, by ``tie``, as fast as the fastest."""
        limit = min(seconds.values()) * (1 + self.settings.tie)
        return next(name for name, value in seconds.items() if value <= limit)

    def forget_mistakes(self) -> None:
        """Something has changed: what was a mistake need not be one now."""
        self._patience.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"agreeing": self._agreeing, "looks": self._looks_since_change, "patience": dict(self._patience)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on."""
        self._agreeing, self._looks_since_change = float(state["agreeing"]), int(state["looks"])
        self._patience = {name: int(value) for name, value in state["patience"].items()}

    def _weight(self, seconds: Mapping[str, float], target: str, current: str) -> float:
        """How much one look speaks for leaving ``current``, from 0 to 1."""
        if target == current:
            return 0.0
        gain = 1 - min(seconds.values()) / seconds[current]
        if gain >= self.settings.tie:
            return min(gain / self.settings.gain, 1.0)
        # It is alike. So is the target, which is the least lossy of those.
        names = list(seconds)
        return float(names.index(target) < names.index(current))
