"""One level of the exchange: a group of ranks, and the boxes through which they hand one another bytes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from danon_lightning.strategies.communication.stats import CommunicationStats

# Rows of a box start at multiples of this many bytes, so that they can be viewed as any type, and two ranks never write
# to the same cache line.
ROW_ALIGNMENT = 64
# gloo runs larger exchanges in half duplex.
LARGEST_MESSAGE_BYTES = 1 << 20


class Box(ABC):
    """One operation of a level, with the memory it takes. Rows are uint8 tensors, one for each rank of the level.

    ``post`` may be called once ``outgoing`` is filled; ``incoming`` may be read after ``wait`` and until ``release``.

    Attributes:
        outgoing: What this rank sends. In an all-to-all row i goes to rank i. In an all-gather the own row goes to all,
            and the others are not to be touched.
        incoming: What it receives: row i comes from rank i. The own row is that of ``outgoing``.
    """

    outgoing: Sequence[Tensor]
    incoming: Sequence[Tensor]

    @abstractmethod
    def post(self) -> None:
        """Start sending."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until everything has come, or raise the error that prevents it."""

    @abstractmethod
    def release(self) -> None:
        """Say that this rank has read what came. ``outgoing`` must not be written again before."""


class Level(ABC):
    """A group of ranks. Every rank opens the same boxes, of the same sizes, in the same order.

    Attributes:
        ranks: Global ranks of the group, in order.
        index: Place of this rank among them.
    """

    ranks: list[int]
    index: int

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @abstractmethod
    def all_to_all(self, sizes: Sequence[int]) -> Box:
        """Open a box in which every rank sends ``sizes[i]`` bytes to rank i."""

    @abstractmethod
    def all_gather(self, sizes: Sequence[int]) -> Box:
        """Open a box in which rank i sends ``sizes[i]`` bytes to all."""

    @abstractmethod
    def close(self) -> None:
        """Give up the group's connections. Every rank does it, with nothing under way."""


def row_offsets(sizes: Sequence[int]) -> list[int]:
    """Where rows of these sizes begin when laid out in one piece of memory, and at last its size."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // ROW_ALIGNMENT) * ROW_ALIGNMENT)
    return offsets


def split_rows(memory: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The rows in ``memory`` (uint8), as views."""
    return [memory[offset : offset + size] for offset, size in zip(row_offsets(sizes), sizes, strict=False)]


@dataclass
class GroupLevel(Level):
    """A level on a private process group of torch.distributed.

    nccl has the operations needed. gloo has them too, but copies every message once or twice more; there, each pair of
    ranks exchanges its row straight from and into the memory given.

    Args:
        ranks: Global ranks of the group, in order.
        index: Place of this rank among them.
        remote: For each of them, whether it sits on another node.
        group: The process group; None for a group of one, which exchanges nothing.
        device: Where boxes lie.
        stats: Where to count the bytes.
    """

    ranks: list[int]
    index: int
    remote: list[bool]
    group: dist.ProcessGroup | None
    device: torch.device
    stats: CommunicationStats
    _opened: int = field(default=0, init=False)

    def all_to_all(self, sizes: Sequence[int], outgoing: list[Tensor] | None = None) -> Box:
        """See :class:`Level`. The rows may be given, to spare a copy."""
        if outgoing is None:
            outgoing = split_rows(self._memory(sizes), sizes)
        received = [sizes[self.index]] * self.size
        incoming = split_rows(self._memory(received), received)
        incoming[self.index] = outgoing[self.index]
        self._count(sizes)
        return self._box(outgoing, incoming, gathers=False)

    def all_gather(self, sizes: Sequence[int], rows: list[Tensor] | None = None) -> Box:
        """See :class:`Level`. The rows may be given, to spare a copy."""
        if rows is None:
            rows = split_rows(self._memory(sizes), sizes)
        self._count([sizes[self.index]] * self.size)
        return self._box(rows, rows, gathers=True)

    def close(self) -> None:
        """See :class:`Level`."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
            self.group = None

    def _count(self, sizes: Sequence[int]) -> None:
        for peer, size in enumerate(sizes):
            if peer != self.index:
                self.stats.count(size, remote=self.remote[peer])

    def _memory(self, sizes: Sequence[int]) -> Tensor:
        return torch.empty(row_offsets(sizes)[-1], dtype=torch.uint8, device=self.device)

    def _box(self, outgoing: list[Tensor], incoming: list[Tensor], *, gathers: bool) -> Box:
        self._opened += 1
        if self.device.type == "cuda":
            return _NcclBox(self, outgoing, incoming, gathers)
        # Receives are posted before the peer sends, so that it need not ask first; tags keep operations apart that are
        # posted in another order than they were opened in.
        return _PairwiseBox(self, outgoing, incoming, gathers, tag=self._opened % (1 << 30))


class _PairwiseBox(Box):
    def __init__(
        self, level: GroupLevel, outgoing: list[Tensor], incoming: list[Tensor], gathers: bool, tag: int
    ) -> None:
        self.outgoing, self.incoming = outgoing, incoming
        self._level, self._gathers, self._tag = level, gathers, tag
        self._works = [
            dist.irecv(incoming[peer], level.ranks[peer], group=level.group, tag=tag)
            for peer in self._peers()
            if incoming[peer].numel()
        ]

    def post(self) -> None:
        own = self._level.index
        for peer in self._peers():
            row = self.outgoing[own if self._gathers else peer]
            if row.numel():
                self._works.append(dist.isend(row, self._level.ranks[peer], group=self._level.group, tag=self._tag))

    def wait(self) -> None:
        for work in self._works:
            if work is not None:
                work.wait()

    def release(self) -> None:
        """Nothing to do: the memory belongs to this box alone."""

    def _peers(self) -> list[int]:
        size = self._level.size
        return [(self._level.index + step) % size for step in range(1, size)]  # not everybody to the first at once


class _NcclBox(Box):
    def __init__(self, level: GroupLevel, outgoing: list[Tensor], incoming: list[Tensor], gathers: bool) -> None:
        self.outgoing, self.incoming = outgoing, incoming
        self._level, self._gathers = level, gathers
        self._work: dist.Work | None = None

    def post(self) -> None:
        level = self._level
        if level.group is None:
            return
        if self._gathers:
            # The form for one tensor goes by different names in the supported versions of torch, and rows are uneven.
            own = self.outgoing[level.index].clone()
            self._work = dist.all_gather(list(self.incoming), own, group=level.group, async_op=True)
            return
        outgoing, incoming = list(self.outgoing), list(self.incoming)
        outgoing[level.index] = incoming[level.index] = incoming[level.index][:0]  # is there already
        self._work = dist.all_to_all(incoming, outgoing, group=level.group, async_op=True)

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()  # the stream waits, not the processor

    def release(self) -> None:
        """Nothing to do: the memory belongs to this box alone."""
