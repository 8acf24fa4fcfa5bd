"""What is measured of one step, and how it becomes numbers on the host."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from danon_lightning.callbacks.gradient_monitor.local_norms import LocalNorms
from danon_lightning.callbacks.gradient_monitor.placement import Place, Placement
from danon_lightning.callbacks.gradient_monitor.tensors import (
    accumulator_dtype,
    nonfinite_counts,
    nonzero_counts,
    norms_of,
    sums,
    values_of,
)
from danon_lightning.callbacks.logs import Guarded


class Row(IntEnum):
    """Sums over the elements of a layer."""

    SQUARE = 0  # of the gradient before clipping
    CLIPPED = 1  # the same after it
    WEIGHT = 2  # squares of weights before the step
    UPDATE = 3  # squares of what the step has added to them
    NONZERO = 4
    NONFINITE = 5
    ELEMENTS = 6
    WHOLE = 7  # as SQUARE, of those parameters whose backward passes are watched
    PIECES = 8  # squares of the gradients of all these passes


class Scalar(IntEnum):
    """Numbers of a rank, behind the rows."""

    PASSES = 0
    PASSES_SQUARED = 1
    SAMPLES = 2
    RESIDUAL = 3  # squared norm of what compression owes
    LOSS_SCALE = 4


@dataclass
class Optimized:
    """Parameters of one optimizer that this rank counts, in the middle of its step."""

    parameters: Sequence[nn.Parameter]
    gradients: Sequence[Tensor]
    layers: Tensor
    negated: tuple[Tensor, ...]  # minus the weights before the step; empty if nobody wants to know


@dataclass
class StepMeasurement:
    """What happens from the first backward pass of a step until its end. All is kept on the device.

    Attributes:
        step: Its number.
        placement: Which layer each parameter belongs to.
        device: Where sums are kept.
        guard: Takes errors.
        local: Watches backward passes, if that is of use.
        samples: Seen by this rank; 0 if unknown.
        loss_scale: What gradients of backward passes are multiplied by; None for 1.
        optimized: What is being stepped, by ``id`` of the optimizer.
        stepped: Whether any optimizer has made its step.
        clips: Whether gradients may change between the hooks before and after the step.
        failed: Whether something could not be measured, so that none of it is to be believed.
        stale: Whether the gradient is another than the mean of what backward passes have brought.
    """

    step: int
    placement: Placement
    device: torch.device
    guard: Guarded
    local: LocalNorms | None = None
    samples: float = 0.0
    loss_scale: Tensor | None = None
    optimized: dict[int, Optimized] = field(default_factory=dict)
    stepped: bool = False
    clips: bool = True
    failed: bool = False
    stale: bool = False
    _rows: dict[tuple[int, Row], Tensor] = field(default_factory=dict)

    def before_step(self, optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]], *, updates: bool) -> None:
        """Look at gradients before clipping; if a closure is called several times, at those of the last time.

        Args:
            optimizer: Which is about to make its step.
            named: All parameters.
            updates: Whether to find out how much the step changes the weights. Takes a copy of them until the step has
                been made.
        """
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        compared: Collection[str] = self.local.names if self.local is not None else ()
        found: list[tuple[Place, nn.Parameter, Tensor]] = []
        whole: list[int] = []
        for name, parameter in named:
            place = self.placement.places.get(name)
            if place is not None and place.is_counted and id(parameter) in own and parameter.grad is not None:
                if name in compared:
                    whole.append(len(found))
                found.append((place, parameter, parameter.grad))
        parameters = [parameter for _, parameter, _ in found]
        layers = torch.tensor([place.layer for place, _, _ in found], dtype=torch.int64).to(self.device)
        gradients = [gradient for _, _, gradient in found]
        values = [values_of(gradient) for gradient in gradients]
        norms = norms_of(values)
        self._put(optimizer, Row.SQUARE, norms, layers, squared=True)
        self._put(optimizer, Row.NONZERO, nonzero_counts(values), layers)
        self._put(optimizer, Row.NONFINITE, nonfinite_counts(values, norms), layers)
        size = len(self.placement.layers)
        # Of the whole parameter: what a sparse gradient leaves out is zero.
        elements = [0.0] * size
        for place, parameter, _ in found:
            elements[place.layer] += parameter.numel() * (2 if parameter.is_complex() else 1)
        self._rows[id(optimizer), Row.ELEMENTS] = torch.tensor(elements, dtype=accumulator_dtype(self.device))
        if len(whole) == len(found):
            self._rows[id(optimizer), Row.WHOLE] = self._rows[id(optimizer), Row.SQUARE]
        else:
            selected = layers[torch.tensor(whole, dtype=torch.int64)]
            self._put(optimizer, Row.WHOLE, [norms[index] for index in whole], selected, squared=True)
        known = self.optimized.get(id(optimizer))
        negated: tuple[Tensor, ...] = ()
        if known is not None and list(map(id, known.parameters)) == list(map(id, parameters)):
            negated = known.negated  # from before the first call of the closure
        elif updates and parameters:
            negated = tuple(torch._foreach_neg([values_of(parameter.detach()) for parameter in parameters]))
            self._put(optimizer, Row.WEIGHT, norms_of(negated), layers, squared=True)
        self.optimized[id(optimizer)] = Optimized(parameters, gradients, layers, negated)

    def after_step(self, optimizer: Optimizer) -> None:
        """Look at gradients after clipping, and at the new weights."""
        state = self.optimized.pop(id(optimizer), None)
        if state is None:
            return
        self.stepped = True
        if self.clips:
            pairs = zip(state.parameters, state.gradients, strict=True)
            gradients = [values_of(given if parameter.grad is None else parameter.grad) for parameter, given in pairs]
            self._put(optimizer, Row.CLIPPED, norms_of(gradients), state.layers, squared=True)
        if state.negated:
            torch._foreach_add_(state.negated, [values_of(parameter.detach()) for parameter in state.parameters])
            self._put(optimizer, Row.UPDATE, norms_of(state.negated), state.layers, squared=True)

    def _put(
        self, optimizer: Optimizer, row: Row, numbers: Sequence[Tensor], layers: Tensor, *, squared: bool = False
    ) -> None:
        self._rows[id(optimizer), row] = sums(numbers, layers, len(self.placement.layers), squared=squared)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A context whose failure spoils this measurement, instead of ending the run."""
        with self.guard:
            try:
                yield
            except BaseException:
                self.failed = True
                raise

    def drop(self) -> None:
        """Give up: no hook is left."""
        if self.local is not None:
            self.local.remove()
        self.optimized.clear()

    def finish(self, residual: float, world_size: int) -> "Measured":
        """Add up over ranks, and read everything at once. Collective, whatever has gone wrong on this rank.

        Args:
            residual: Norm of what compression owes on this rank.
            world_size: Number of ranks.
        """
        self.drop()
        layers = len(self.placement.layers)
        size = len(Row) * layers + len(Scalar)
        everything = torch.full((size,), float("nan"), dtype=accumulator_dtype(self.device), device=self.device)
        with self.guard:
            own = self._everything(residual, world_size)
            if not self.failed:  # else it is undefined on all ranks
                everything = own
        if world_size > 1:
            dist.all_reduce(everything)
        numbers = np.array(everything.tolist())
        return Measured(
            step=self.step,
            placement=self.placement,
            rows=numbers[: -len(Scalar)].reshape(len(Row), layers),
            scalars=numbers[-len(Scalar) :],
            stepped=self.stepped,
            clips=self.clips,
            stale=self.stale,
        )

    def _everything(self, residual: float, world_size: int) -> Tensor:
        """Rows and scalars of this rank, such that their sums over ranks are those of the model."""
        layers = len(self.placement.layers)
        dtype = accumulator_dtype(self.device)
        rows = torch.zeros(len(Row), layers, dtype=dtype, device=self.device)
        for (_, row), values in self._rows.items():
            rows[row] += values.to(self.device)
        passes = 0
        if self.local is not None:
            rows[Row.PIECES] = self.local.squares(layers, self.device)
            passes = self.local.passes
        scalars = torch.zeros(len(Scalar), dtype=dtype, device=self.device)
        known = [float(passes), float(passes**2), self.samples, residual**2]
        scalars[: len(known)] = torch.tensor(known, dtype=dtype)
        scalars[Scalar.LOSS_SCALE] = 1.0 if self.loss_scale is None else self.loss_scale
        # Rows are the same on each replica but for PIECES; a residual is one of several parts of each replica's.
        scalars /= world_size
        scalars[Scalar.RESIDUAL] *= world_size / self.placement.replicas
        return torch.cat([rows.flatten() / self.placement.replicas, scalars])


@dataclass(frozen=True)
class Measured:
    """One step in numbers, of the whole model.

    Attributes:
        step: Its number.
        placement: Which layers there are.
        rows: [len(Row), layers].
        scalars: [len(Scalar)], means over ranks.
        stepped: Whether the optimizer has made its step.
        clips: Whether gradients were looked at again before it.
        stale: Whether the gradient is another than the mean of what backward passes have brought.
    """

    step: int
    placement: Placement
    rows: NDArray[np.float64]
    scalars: NDArray[np.float64]
    stepped: bool
    clips: bool
    stale: bool = False

    @property
    def active(self) -> NDArray[np.bool_]:
        """[layers]: those that have got a gradient."""
        return np.asarray(self.rows[Row.ELEMENTS] > 0)

    @property
    def loss_scale(self) -> float:
        """What the loss was multiplied by."""
        return float(self.scalars[Scalar.LOSS_SCALE])

    def norms(self, row: Row) -> NDArray[np.float64]:
        """[layers]: 2-norms."""
        return np.asarray(np.sqrt(np.maximum(self.rows[row], 0.0)))

    def norm(self, row: Row) -> float:
        """2-norm over all layers."""
        return float(np.sqrt(self.rows[row].sum()))

    def ratios(self) -> NDArray[np.float64] | None:
        """[layers]: norm of the update divided by that of the weights, NaN where these are zero; None if not known."""
        if not self.stepped or not self.rows[Row.WEIGHT].any():
            return None
        weights = self.norms(Row.WEIGHT)
        return np.divide(self.norms(Row.UPDATE), weights, out=np.full_like(weights, np.nan), where=weights > 0)
