"""What is remembered of a run, in bounded memory."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from danon_lightning.callbacks.gradient_monitor.measurement import Measured, Row

_LARGEST = 512


@dataclass(frozen=True)
class Moment:
    """One logged step.

    Attributes:
        step: Its number.
        norm: Of the whole gradient, before clipping.
        clipped: The same after it; None if the step was skipped.
        ratio: Norm of the update divided by that of the weights; None if not known.
        norms: [layers], before clipping; NaN where there was no gradient, infinite where it was not finite.
        ratios: [layers]; NaN where not known.
    """

    step: int
    norm: float
    clipped: float | None
    ratio: float | None
    norms: NDArray[np.float64]
    ratios: NDArray[np.float64]


@dataclass
class History:
    """Logged steps, evenly spread over the run: of more than 512, every other one is forgotten.

    Attributes:
        layers: Names, in the order of the model.
        moments: In the order of time.
        logged: Number of steps that were added.
        nonfinite: Name of a layer → number of these in which it had elements that were not finite.
        elements: [layers]: their sizes.
        active: [layers]: number of the steps in which there was a gradient.
        zero: [layers]: number of those in which it was all zero.
    """

    layers: tuple[str, ...] = ()
    moments: list[Moment] = field(default_factory=list)
    logged: int = 0
    nonfinite: dict[str, int] = field(default_factory=dict)
    _stride: int = 1

    def __post_init__(self) -> None:
        """Start with nothing."""
        self.elements, self.active, self.zero = np.zeros((3, len(self.layers)))

    def add(self, measured: Measured) -> None:
        """Remember a step with the same layers."""
        layers = self.layers
        self.elements = np.maximum(self.elements, measured.rows[Row.ELEMENTS])
        norms = np.where(measured.active, np.nan_to_num(measured.norms(Row.SQUARE), nan=np.inf, posinf=np.inf), np.nan)
        ratios = measured.ratios()
        self.active += measured.active
        self.zero += norms == 0
        for index in np.flatnonzero(measured.rows[Row.NONFINITE] > 0):
            self.nonfinite[layers[index]] = self.nonfinite.get(layers[index], 0) + 1
        if self.logged % self._stride == 0:
            clipped = measured.norm(Row.CLIPPED if measured.clips else Row.SQUARE) if measured.stepped else None
            ratio = None if ratios is None else measured.norm(Row.UPDATE) / measured.norm(Row.WEIGHT)
            unknown = np.full(len(layers), np.nan)
            per_layer = unknown if ratios is None else np.where(measured.active, ratios, np.nan)
            self.moments.append(Moment(measured.step, measured.norm(Row.SQUARE), clipped, ratio, norms, per_layer))
        self.logged += 1
        if len(self.moments) > _LARGEST:
            self.moments = self.moments[::2]
            self._stride *= 2

    def norms(self) -> NDArray[np.float64]:
        """[layers, moments]: norms before clipping."""
        return np.array([moment.norms for moment in self.moments]).T.reshape(len(self.layers), len(self.moments))

    def ratios(self) -> NDArray[np.float64]:
        """[layers, moments]: updates to weights."""
        return np.array([moment.ratios for moment in self.moments]).T.reshape(len(self.layers), len(self.moments))
