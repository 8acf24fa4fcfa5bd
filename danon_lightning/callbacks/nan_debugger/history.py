"""The last steps: norms, losses and learning rates, in a ring of bounded size."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from danon_lightning.callbacks.nan_debugger.check import Reading


@dataclass
class History:
    """Norms of gradients of the last steps.

    Attributes:
        size: How many steps are kept.
        steps: Their numbers, oldest first.
        total_norms: Norms of all gradients together; NaN in steps that were not finite.
        losses: Mean losses.
        learning_rates: Largest learning rate of all groups of parameters.
        names: Of all parameters that have had a gradient.
    """

    size: int
    steps: list[int] = field(default_factory=list)
    total_norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    _columns: dict[str, int] = field(default_factory=dict)
    _norms: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))
    _next: int = 0
    _order: tuple[tuple[str, ...], NDArray[np.intp]] = ((), np.empty(0, np.intp))

    def add(
        self,
        step: int,
        names: Sequence[str],
        norms: NDArray[np.float64],
        total_norm: float,
        loss: float,
        learning_rate: float,
    ) -> None:
        """Note a step. What is not finite is noted as NaN."""
        for values, value in (
            (self.total_norms, total_norm),
            (self.losses, loss),
            (self.learning_rates, learning_rate),
        ):
            values.append(value if np.isfinite(value) else float("nan"))
            del values[: -self.size]
        columns = self.columns(tuple(names))
        row, self._next = self._next, (self._next + 1) % self.size
        self.steps.append(step)
        del self.steps[: -self.size]
        self._norms[row] = np.nan
        self._norms[row, columns] = np.where(np.isfinite(norms), norms, np.nan)

    def note(self, step: int, reading: Reading, rate: float) -> None:
        """Note what was read in a step, and its learning rate."""
        loss = sum(reading.losses) if reading.losses else float("nan")  # each is its share of their mean
        self.add(step, reading.names, reading.norms, reading.total_norm, loss, rate)

    def columns(self, names: tuple[str, ...]) -> NDArray[np.intp]:
        """Where the parameters stand in :meth:`norms`; new ones are added."""
        if self._order[0] != names:
            new = [name for name in names if name not in self._columns]
            self._columns |= {name: len(self._columns) + i for i, name in enumerate(new)}
            self.names = list(self._columns)
            grown = np.full((self.size, len(self._columns)), np.nan)
            grown[: self._norms.shape[0], : self._norms.shape[1]] = self._norms
            self._norms = grown
            self._order = (names, np.array([self._columns[name] for name in names], np.intp))
        return self._order[1]

    def norms(self) -> NDArray[np.float64]:
        """Norms, ``[steps, parameters]``, oldest step first; NaN where there was no gradient or it was not finite."""
        kept = self._norms[: len(self.steps)]
        return np.roll(kept, -self._next, axis=0) if len(self.steps) == self.size else kept

    def medians(self, names: tuple[str, ...], least: int) -> NDArray[np.float64]:
        """Median norm of each of the parameters, ``[parameters]``.

        Args:
            names: Which parameters.
            least: NaN where fewer steps are known (fewer than all, if the history is shorter than that).
        """
        columns = self.columns(names)
        norms = self.norms()[:, columns]
        known = np.isfinite(norms).sum(0) >= min(least, self.size)
        medians = np.full(len(names), np.nan)
        if known.any():
            medians[known] = np.nanmedian(norms[:, known], axis=0)
        return medians

    def median_total(self) -> float:
        """Median norm of all gradients together, NaN if no step is known."""
        known = [norm for norm in self.total_norms if np.isfinite(norm)]
        return float(np.median(known)) if known else float("nan")

    def last_norm(self) -> float:
        """Norm of all gradients together in the last finite step, NaN if there is none."""
        return next((norm for norm in reversed(self.total_norms) if np.isfinite(norm)), float("nan"))

    def clear(self) -> None:
        """Forget everything."""
        self.__init__(self.size)  # type: ignore[misc]
