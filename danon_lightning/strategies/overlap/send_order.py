"""In which order buckets leave."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.futures import Future

# DDP regroups its buckets after the first step.
_WARMUP_STEPS = 1
_FIRST_AGREEMENT = 4
_STEPS_BETWEEN = 10


class _Exchange(Protocol):
    @property
    def waiting(self) -> int: ...

    def send(self, buffer: Tensor, parameters: list[Tensor], *, first: bool, last: bool) -> Future[Tensor]: ...

    def agree_on_maximum(self, value: int) -> int: ...


@dataclass(eq=False)
class Departure:
    """A bucket on its way, or about to leave.

    Attributes:
        buffer: Its gradients, one after another.
        parameters: Whose they are.
        future: Done when they are averaged; None as long as the bucket is held back.
    """

    buffer: Tensor
    parameters: Sequence[Tensor]
    future: "Future[Tensor] | None" = None


class SendOrder:
    """Lets buckets leave as they come, as long as they leave before the backward pass ends; the others the other way.

    The backward pass completes the buckets of the last layers first, the next forward pass needs those of the first
    layers first. What can be sent while the backward pass goes on should be: an idle link gains nothing. What cannot is
    held back until the last bucket has come, and leaves in the order of the forward pass (ByteScheduler, Peng et al.
    2019; P3, Jayarajan et al. 2019, without preemption).

    How many leave as they come is agreed on, every few steps, so that it is the same on all ranks: the most that any of
    them has begun to send, in the median over the steps since, before its backward pass ended; and one more, lest the
    link be idle. If all of them were begun, some more.

    Attributes:
        released: How many buckets leave as they come; None for all of them, as long as nothing is known.
    """

    def __init__(self, exchange: _Exchange, *, reorders: bool = True) -> None:
        """Hold nothing back at first.

        Args:
            exchange: Where buckets go.
            reorders: False to let all of them leave as they come, always.
        """
        self._exchange, self._reorders = exchange, reorders
        self.released: int | None = None
        self._held: list[Departure] = []
        self._steps = self._sent = self._agreed_at = 0
        self._proposals: list[int] = []

    @property
    def holds(self) -> bool:
        """Whether a bucket is held back."""
        return bool(self._held)

    def add(self, bucket: Departure, *, last: bool) -> None:
        """Take a bucket of the backward pass, in their order, and let leave what shall leave now.

        Args:
            bucket: The next one.
            last: Whether the backward pass has no more.
        """
        if not last and (self.released is None or self._sent < self.released) and not self._held:
            self._send(bucket, last=False)
            return
        self._held.append(bucket)
        if not last:
            return
        self._measure()
        while self._held:
            self._send(self._held.pop(), last=len(self._held) == 0)
        self._steps, self._sent = self._steps + 1, 0

    def _send(self, bucket: Departure, *, last: bool) -> None:
        first = self._sent == 0
        self._sent += 1
        bucket.future = self._exchange.send(bucket.buffer, list(bucket.parameters), first=first, last=last)

    def _measure(self) -> None:
        buckets, waiting = self._sent + len(self._held), self._exchange.waiting
        spare = 1 if waiting else max(1, buckets // 8)
        if self._steps >= _WARMUP_STEPS:
            self._proposals.append(min(buckets, max(0, self._sent - waiting) + spare))

    def agree(self) -> None:
        """Settle what is held back from now on, if it is time to. Collective then; with nothing under way."""
        steps = self._steps
        is_due = steps == _FIRST_AGREEMENT or (steps > 0 and steps % _STEPS_BETWEEN == 0)
        if not (self._reorders and is_due) or self._agreed_at == steps:
            return
        self._agreed_at = steps
        self.released = self._exchange.agree_on_maximum(round(statistics.median(self._proposals)))
        self._proposals.clear()
