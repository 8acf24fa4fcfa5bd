"""Gradients that are exchanged while the next step computes."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danon_lightning.strategies.communication.averaging import Averaging
from danon_lightning.strategies.communication.communicator import GradientCommunicator
from danon_lightning.strategies.sync.settings import AsyncSync

_Gradients = list[tuple[Tensor, Tensor]]


class StaleGradients:
    """Sends the gradients of each step on their way, and hands over those of the step before."""

    staleness = 1.0
    skips = False  # what has arrived last was not finite

    def __init__(
        self,
        settings: AsyncSync,
        communicator: GradientCommunicator,
        bucket_bytes: int,
        loss_scale: Callable[[], float],
    ) -> None:
        """Start with nothing under way.

        Args:
            settings: How to compensate.
            communicator: Averages gradients.
            bucket_bytes: At most in one bucket.
            loss_scale: What the loss is multiplied with at present.
        """
        self._settings, self._communicator, self._bucket_bytes = settings, communicator, bucket_bytes
        self._loss_scale = loss_scale
        self._under_way: Averaging | None = None
        self._arrived: _Gradients | None = None
        self._finite = True
        self._scale = 1.0
        self._weights: dict[Tensor, Tensor] = {}

    def replace(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Send gradients on their way, and put those of the step before in their place.

        Args:
            parameters: With gradients, the same on all replicas.

        Returns:
            Whether there are such gradients, and all of them are finite. If not, ``.grad`` is None.
        """
        self.wait()
        arrived, finite, factor = self._arrived, self._finite, self._loss_scale() / self._scale
        before, self._weights = self._weights, {}
        if self._settings.compensation:
            self._weights = {parameter: parameter.detach().clone() for parameter in parameters}
        self._scale, self._arrived = self._loss_scale(), None
        self._under_way = self._communicator.start_average(parameters, self._bucket_bytes)
        self.skips = not finite
        if arrived is None or not finite:
            return False
        for parameter, gradient in arrived:
            if parameter in before:
                _compensate(gradient, parameter.detach() - before[parameter], self._settings.compensation)
            parameter.grad = gradient if factor == 1 else gradient.mul_(factor)
        return True

    def release(self, released: Container[Tensor]) -> None:
        """Have nothing more to do with parameters that this rank does not hold any longer."""
        if self._arrived is not None:
            self._arrived = [
                (parameter, gradient) for parameter, gradient in self._arrived if parameter not in released
            ]

    def wait(self) -> None:
        """Wait for what is under way."""
        if self._under_way is not None:
            self._arrived = self._under_way.wait()
            self._under_way = None
            # Without compression nobody has looked; then the step is not skipped by this class either.
            self._finite = self._communicator.finite

    def state_dict(self, names: Mapping[int, str]) -> dict[str, Any]:
        """What is under way, the same on all replicas: this waits for it.

        Args:
            names: Of parameters, by their ``id``.
        """
        self.wait()
        arrived = self._arrived if self._finite else None
        return {
            "gradients": {names[id(p)]: gradient / self._scale for p, gradient in arrived or ()},
            "weights": {names[id(p)]: weight for p, weight in self._weights.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Go on from a checkpoint.

        Args:
            state: Of :meth:`state_dict`, with the names of all parameters, or of more.
            parameters: Those of this rank.
        """
        found = {kind: {n: t for n, t in state[kind].items() if n in parameters} for kind in ("gradients", "weights")}
        if found["gradients"]:
            self._arrived = [(parameters[name], _like(parameters[name], g)) for name, g in found["gradients"].items()]
        self._weights = {parameters[name]: _like(parameters[name], w) for name, w in found["weights"].items()}
        self._scale, self._finite = 1.0, True


def _compensate(gradient: Tensor, moved: Tensor, strength: float) -> None:
    """Zheng et al. 2017, eq. 10, in place; in complex numbers nothing is done."""
    if gradient.is_complex() or not gradient.numel():
        return
    size = gradient.square().mean().sqrt().clamp_min(torch.finfo(gradient.dtype).tiny)
    gradient.addcmul_(gradient.square() / size, moved.to(gradient.dtype), value=strength)


def _like(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    return tensor.to(parameter.device, parameter.dtype, copy=True)
