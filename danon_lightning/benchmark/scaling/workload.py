"""A training step whose computing is waiting, so that a few processors can stand for many machines."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from danon_lightning.strategies.communication.cost_model import ddp_buckets

# A backward pass computes two products for each one of the forward pass.
FORWARD_SHARE = 1 / 3
# Sides are multiples of this, so that no matrix is small enough to be left uncompressed.
_SIDE_STEP = 64


@dataclass(frozen=True)
class Workload:
    """A stack of equal layers, a square float32 matrix each, and what a step on one of the hosts computes.

    Attributes:
        layers: Number of them.
        side: Rows, and columns, of each matrix.
        compute_seconds: Forward and backward pass on one host, without an exchange.
        bucket_bytes: A bucket of DistributedDataParallel is closed once it holds as much.
    """

    layers: int
    side: int
    compute_seconds: float
    bucket_bytes: int

    @classmethod
    def of_size(cls, elements: float, layers: int, compute_seconds: float, bucket_mb: float) -> "Workload":
        """The workload whose number of elements is nearest to ``elements``; buckets in units of 2²⁰ bytes."""
        side = max(1, round(math.sqrt(elements / layers) / _SIDE_STEP)) * _SIDE_STEP
        return cls(layers, side, compute_seconds, max(1, round(bucket_mb * 2**20)))

    def dilated(self, factor: float) -> "Workload":
        """The same with so many times as much waiting."""
        return replace(self, compute_seconds=factor * self.compute_seconds)

    @property
    def elements(self) -> int:
        """Number of gradient elements."""
        return self.layers * self.side**2

    @property
    def num_bytes(self) -> int:
        """Size of all gradients."""
        return 4 * self.elements

    def buckets(self) -> list[Sequence[tuple[str, Tensor]]]:
        """The buckets, as names and parameters without memory, in the order in which they become ready."""
        shape = (self.side, self.side)
        matrices = [(str(index), torch.empty(shape, device="meta")) for index in range(self.layers)]
        return list(ddp_buckets(matrices, self.bucket_bytes))

    def ready_seconds(self, compute_seconds: float) -> list[float]:
        """When each bucket is ready, from the beginning of a step that computes for so long."""
        forward = FORWARD_SHARE * compute_seconds
        ready, done = [], 0
        for bucket in self.buckets():
            done += len(bucket)
            ready.append(forward + (compute_seconds - forward) * done / self.layers)
        return ready


class TimedStack(nn.Module):
    """The layers of a workload. Gradients are given, other ones on each rank, and each comes when its time has come.

    Times count from the beginning of the forward pass, as they do on a device that computes while the processor looks
    after the exchange: what the processor does meanwhile delays nothing unless it takes longer.
    """

    def __init__(self, workload: Workload, rank: int) -> None:
        """Fill the matrices with zeros and draw the gradients from the rank's number."""
        super().__init__()
        self._workload = workload
        shape = (workload.side, workload.side)
        generator = torch.Generator().manual_seed(rank)
        self.matrices = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for _ in range(workload.layers))
        self.gradients = [torch.randn(shape, generator=generator) for _ in range(workload.layers)]
        self.computed_at = 0.0

    def forward(self) -> Tensor:
        """Wait for the time of a forward pass; returns a scalar to call ``backward`` on.

        After that ``computed_at`` is the moment, of ``time.perf_counter``, at which the last gradient was there.
        """
        start = time.perf_counter()
        seconds, layers = self._workload.compute_seconds, self._workload.layers
        forward = FORWARD_SHARE * seconds
        _wait_until(start + forward)
        value = torch.zeros(())
        for index, (matrix, gradient) in enumerate(zip(self.matrices, self.gradients, strict=True)):
            until = start + forward + (seconds - forward) * (layers - index) / layers
            value = _TimedLayer.apply(value, matrix, gradient, until, self)
        return value


class _TimedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, matrix: Tensor, gradient: Tensor, until: float, stack: TimedStack) -> Tensor:
        ctx.given = gradient, until, stack
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *from_above: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        gradient, until, stack = ctx.given
        _wait_until(until)
        stack.computed_at = time.perf_counter()
        return from_above[0], gradient, None, None, None


def _wait_until(moment: float) -> None:
    # Sleeping leaves the processor, and the interpreter, to others.
    time.sleep(max(0.0, moment - time.perf_counter()))
