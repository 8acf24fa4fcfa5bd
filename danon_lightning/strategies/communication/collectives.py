"""Who exchanges with whom: the mean over all ranks in one or two levels.

Legend: N = M outer groups × L inner ranks. The *inner* level (the ranks of a node: fast links) always moves dense
values; the *outer* level (equal local ranks of all nodes: slow links) moves what the compressor makes of them. The flat
collective is the case L = 1: all ranks are outer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from danon_lightning.strategies.communication.compressors import BlockCompressor
from danon_lightning.strategies.communication.stats import CommunicationStats
from danon_lightning.strategies.mesh import Mesh

# Messages of one level that are under way at the same time: one is on the wire while the next is being coded.
IN_FLIGHT = 2
# gloo runs larger exchanges in half duplex.
_LARGEST_MESSAGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Level:
    """One private process group of the exchange.

    nccl has the operations below. gloo has them too, but copies every message once or twice more; there, each pair of
    ranks exchanges its part straight from and into the tensors given.

    Attributes:
        ranks: Global ranks of the group, in order.
        index: Place of this rank among them.
        remote_peers: How many of the others sit on other nodes.
        group: The process group; None for a group of one, which exchanges nothing.
    """

    ranks: list[int]
    index: int
    remote_peers: int
    group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def all_to_all(self, chunks: Tensor, stats: CommunicationStats) -> tuple[Tensor, list[dist.Work]]:
        """Start sending row i of ``chunks [size, …]`` to peer i; row i of the result comes from peer i."""
        self._count(chunks[0], stats)
        received = torch.empty_like(chunks)
        if chunks.is_cuda:
            return received, [dist.all_to_all_single(received, chunks, group=self.group, async_op=True)]
        received[self.index] = chunks[self.index]
        return received, self._exchange(lambda peer: chunks[peer], received)

    def all_gather(self, chunk: Tensor, out: Tensor, stats: CommunicationStats) -> list[dist.Work]:
        """Start collecting every peer's ``chunk`` in ``out [size, …]``."""
        self._count(chunk, stats)
        out[self.index] = chunk
        if out.is_cuda:
            # The form for one tensor goes by different names in the supported versions of torch.
            return [dist.all_gather(list(out), out[self.index].clone(), group=self.group, async_op=True)]
        return self._exchange(lambda peer: out[self.index], out)

    def _exchange(self, outgoing: Callable[[int], Tensor], incoming: Tensor) -> list[dist.Work]:
        peers = [(self.index + step) % self.size for step in range(1, self.size)]  # not everybody to the first at once
        works = [dist.irecv(incoming[peer], self.ranks[peer], group=self.group) for peer in peers]
        works += [dist.isend(outgoing(peer), self.ranks[peer], group=self.group) for peer in peers]
        return [work for work in works if work is not None]

    def _count(self, chunk: Tensor, stats: CommunicationStats) -> None:
        local_peers = self.size - 1 - self.remote_peers
        stats.count(chunk.nbytes * local_peers, chunk.nbytes * self.remote_peers)


@dataclass(frozen=True)
class Collective:
    """The two levels of the exchange, and the arithmetic on them."""

    inner: Level
    outer: Level

    @property
    def shards(self) -> int:
        """Parts a message is cut into, one summed by each rank: N = L·M."""
        return self.inner.size * self.outer.size

    def close(self) -> None:
        """Give up the process groups. Every rank does it, with nothing under way."""
        for level in (self.inner, self.outer):
            if level.group is not None and dist.is_initialized():
                dist.destroy_process_group(level.group)

    def capacity(self, itemsize: int) -> int:
        """Elements of a message at most, so that no peer is sent more than 1 MB at a time."""
        first = self.inner.size if self.inner.size > 1 else self.outer.size
        return first * (_LARGEST_MESSAGE_BYTES // itemsize)

    def mean(
        self, values: Tensor, compressor: BlockCompressor | None, stats: CommunicationStats
    ) -> Iterator[Tensor | None]:
        """Average ``values [n]`` over all ranks, n a multiple of ``shards`` (times the compressor's block size).

        Dense values are overwritten on the way.

        A generator, so that several messages can be under way at once: it yields None wherever it would wait for the
        network, a fixed number of times, and at last the averaged values ``[n]``, the same bits on every rank.

        Sums are taken locally and in rank order. Unlike in a ring their rounding does not depend on where in a bucket
        an element lies, so regrouping the buckets changes nothing, and a resumed run repeats an uninterrupted one.
        """
        L, M = self.inner.size, self.outer.size
        # Half-precision gradients are summed and compressed in float32; what is dense on a wire keeps its own type.
        wide = torch.promote_types(values.dtype, torch.float32)
        share = 1 / (L * M)
        shard = values.view(L, -1)  # [L, n/L]: row l is summed by local rank l
        if L > 1:
            received, works = self.inner.all_to_all(shard, stats)
            yield from _wait(works)
            shard, share = _sum_rows(received, wide).mul_(share), 1.0
        coded = _encode(shard.view(M, -1), compressor, values.dtype)  # [M, …]: row m is summed by node m
        if M > 1:
            received, works = self.outer.all_to_all(coded, stats)
            yield from _wait(works)
            total = _sum_rows(_decode(received, compressor), wide).mul_(share)  # [n/N]
            # Dense results arrive where they belong; what was there has been sent.
            coded = values.view(M, -1) if L == 1 and compressor is None else torch.empty_like(coded)
            yield from _wait(self.outer.all_gather(_encode(total, compressor, values.dtype), coded, stats))
        if L > 1:
            # The coded result is shared inside the node too: every rank decodes the same bytes.
            everything = values.view(L, -1) if compressor is None else coded.new_empty(L, coded.numel())
            yield from _wait(self.inner.all_gather(coded.view(-1), everything, stats))
            coded = everything
        yield _decode(coded, compressor).reshape(-1).to(values.dtype)


def _wait(works: list[dist.Work]) -> Iterator[None]:
    for _ in range(IN_FLIGHT):
        yield None
    for work in works:
        work.wait()


def _sum_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first dimension, first row first.

    Nothing is multiplied on the way: where a kernel fuses that, it does so in the body of a tensor and not at its end,
    and the result would depend on where in a message an element lies.
    """
    total = rows[0].to(dtype, copy=True)
    for row in rows[1:]:
        total += row
    return total


def _encode(values: Tensor, compressor: BlockCompressor | None, dense_dtype: torch.dtype) -> Tensor:
    """``[…, n]`` -> ``[…, n]`` dense, or uint8 ``[…, n / block_size · block_bytes]``."""
    if compressor is None:
        return values.to(dense_dtype)
    blocks = compressor.encode(values.reshape(-1, compressor.block_size).float())
    return blocks.view(*values.shape[:-1], -1)


def _decode(coded: Tensor, compressor: BlockCompressor | None) -> Tensor:
    """Inverse of :func:`_encode`, float32 where it was compressed."""
    if compressor is None:
        return coded
    blocks = compressor.decode(coded.reshape(-1, compressor.block_bytes))
    return blocks.view(*coded.shape[:-1], -1)


def check_hierarchical(hierarchical: object) -> None:
    """Raise a ValueError unless ``hierarchical`` is True, False or "auto"."""
    if hierarchical not in (True, False, "auto"):
        raise ValueError(f"hierarchical={hierarchical!r} must be True, False or 'auto'")


def uses_two_levels(mesh: Mesh, hierarchical: bool | Literal["auto"]) -> bool:
    """Whether the exchange has an inner level on this mesh.

    Args:
        mesh: Layout of the ranks.
        hierarchical: True for two levels, False for one, "auto" for two wherever there are several nodes with several
            ranks each.

    Raises:
        ValueError: If ``hierarchical`` is none of the three, or is True on a mesh that has only one level.
    """
    possible = mesh.num_nodes > 1 and mesh.ranks_per_node > 1
    check_hierarchical(hierarchical)
    if hierarchical is True and not possible:
        raise ValueError(
            f"hierarchical=True needs several nodes with several ranks each, but this job has {mesh}: "
            "use hierarchical='auto' or False"
        )
    return possible and bool(hierarchical)


def build_collective(
    mesh: Mesh,
    hierarchical: bool | Literal["auto"],
    *,
    backend: str,
    timeout: timedelta | None,
) -> Collective:
    """Create the private process groups of an exchange. Collective: every rank must call it at the same point.

    Private groups keep the exchange apart from whatever else the job communicates, and in an order of its own.

    Args:
        mesh: Layout of the ranks.
        hierarchical: See :func:`uses_two_levels`, which raises what this raises.
        backend: Backend of the groups, "gloo" or "nccl".
        timeout: How long an operation may take before the job is given up; None for torch's default.
    """
    two_levels = uses_two_levels(mesh, hierarchical)

    def level(groups: list[list[int]]) -> Level:
        mine = None
        for ranks in groups:  # every rank takes part in the creation of every group
            group = dist.new_group(ranks, backend=backend, timeout=timeout) if len(ranks) > 1 else None
            if mesh.rank in ranks:
                mine = group, ranks
        assert mine is not None
        group, ranks = mine
        remote = sum(mesh.node_of(rank) != mesh.node for rank in ranks)
        return Level(ranks, ranks.index(mesh.rank), remote, group)

    if two_levels:
        inner = level([mesh.ranks_of_node(node) for node in range(mesh.num_nodes)])
        outer = level([mesh.ranks_across_nodes(local) for local in range(mesh.ranks_per_node)])
        return Collective(inner, outer)
    return Collective(level([[rank] for rank in range(mesh.world_size)]), level([list(range(mesh.world_size))]))
