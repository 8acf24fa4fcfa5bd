"""Gradients that are averaged without DistributedDataParallel: buckets of them, and their averages."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.futures import Future

from danon_lightning.strategies.communication.messages import real_numel
from danon_lightning.strategies.communication.stats import CommunicationStats


def group_into_buckets(parameters: Sequence[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Parameters that are averaged together, in their order: at least one bucket, which may be empty.

    Args:
        parameters: Of any types; those of a bucket are of one.
        bucket_bytes: Size of a bucket at most, unless one parameter is larger.
    """
    buckets: list[list[Tensor]] = [[]]
    room = 0
    for parameter in parameters:
        if buckets[-1] and (parameter.nbytes > room or parameter.dtype != buckets[-1][0].dtype):
            buckets.append([])
        if not buckets[-1]:
            room = bucket_bytes
        buckets[-1].append(parameter)
        room -= parameter.nbytes
    return buckets


def take_gradients(bucket: Sequence[Tensor], device: torch.device) -> Tensor:
    """The gradients of ``bucket`` one after another, complex ones as pairs; ``[n]``. Their ``.grad`` become None."""
    gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
    assert len(gradients) == len(bucket)
    flat = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
    buffer = torch.cat([g.reshape(-1) for g in flat]) if flat else torch.empty(0, device=device)
    for parameter in bucket:
        parameter.grad = None  # or there would be two of each
    return buffer


class Averaging:
    """Gradients whose averages are under way."""

    def __init__(
        self, buckets: "list[tuple[list[Tensor], Tensor, Future[Tensor]]]", stats: CommunicationStats | None
    ) -> None:
        """Take note of them.

        Args:
            buckets: Parameters, where their gradients lie one after another, and what these are waited for by.
            stats: Where to add up how long they were waited for, if anywhere.
        """
        self._buckets, self._stats = buckets, stats

    def wait(self) -> list[tuple[Tensor, Tensor]]:
        """Wait for all of them.

        Returns:
            Parameters and averages.

        Raises:
            RuntimeError: If the exchange has failed.
        """
        start = time.perf_counter()
        averages = []
        for bucket, buffer, future in self._buckets:
            future.wait()
            for parameter, part in zip(bucket, buffer.split([real_numel(p) for p in bucket]), strict=True):
                whole = torch.view_as_complex(part.view(-1, 2)) if parameter.is_complex() else part
                averages.append((parameter, whole.view(parameter.shape)))
        if self._stats is not None:
            self._stats.exposed_seconds += time.perf_counter() - start
        return averages
