"""What an exchange moves: the bytes of every message, as the collectives cut and count them.

Nothing is estimated here. Messages are planned by the planner of the exchange itself, and the tests compare the sums
with what ranks count while they exchange.

Legend: I inner ranks (of a node, if there are two levels; else 1) × O outer ones; see :mod:`…collectives.exchange`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from danon_lightning.strategies.communication.collectives.exchange import count
from danon_lightning.strategies.communication.collectives.payloads import padded
from danon_lightning.strategies.communication.compressors import Compressor, LinearCompressor
from danon_lightning.strategies.communication.layout import uses_two_levels
from danon_lightning.strategies.communication.levels import LARGEST_MESSAGE_BYTES, ROW_ALIGNMENT, row_offsets
from danon_lightning.strategies.communication.messages import (
    Layout,
    LinearMessage,
    Message,
    Piece,
    plan_messages,
    sizes_for,
)
from danon_lightning.strategies.mesh import Mesh

# Late enough for any warm-up to have ended.
STEADY_STEP = 1 << 40
# As torch's DistributedDataParallel has it by default.
_FIRST_BUCKET_BYTES = 1 << 20

# Name and parameter, in any order; parameters on the meta device will do.
Parameters = Sequence[tuple[str, Tensor]]


@dataclass(frozen=True)
class Phase:
    """One transfer between outer ranks.

    Attributes:
        leaving: ``leaving[m][i]``: bytes that leave node m for other ones, sent by its inner rank i (if there is one
            level, by all ranks of the node).
        inside: The same for bytes that stay in the node.
        transfers: How many operations they are cut into.
    """

    leaving: tuple[tuple[int, ...], ...]
    inside: tuple[tuple[int, ...], ...]
    transfers: int = 1


@dataclass(frozen=True)
class MessageTraffic:
    """What one message moves.

    Attributes:
        way: How it is averaged.
        rows: Elements that each inner rank sums over its node.
        pieces: Of how many regions, or parts of them, these are.
        collected: Bytes, by portion, that the ranks of a node hand one another to be summed.
        phases: Transfers between outer ranks, in order.
        shared: Bytes that they hand one another as the result.
    """

    way: Literal["dense", "reduce", "gather", "linear"]
    rows: tuple[int, ...]
    pieces: tuple[int, ...]
    collected: tuple[int, ...]
    phases: tuple[Phase, ...]
    shared: int

    @property
    def numel(self) -> int:
        """Elements that it averages."""
        return sum(self.rows)


@dataclass(frozen=True)
class Levels:
    """Sizes of the two levels, and where outer ranks are.

    Attributes:
        inner: Ranks that exchange dense inside a node, I.
        outer: Ranks that exchange codes, O.
        nodes: Number of nodes.
    """

    inner: int
    outer: int
    nodes: int

    @classmethod
    def of(
        cls, nodes: int, ranks_per_node: int, *, hierarchical: bool | Literal["auto"] = "auto", compressed: bool
    ) -> "Levels":
        """The levels that an exchange has; see :func:`build_levels`, which connects them.

        Raises:
            ValueError: For ``hierarchical=True`` on a mesh of one level.
        """
        ranks = nodes * ranks_per_node
        if uses_two_levels(Mesh(nodes, ranks_per_node, 0), hierarchical):
            return cls(ranks_per_node, nodes, nodes)
        return cls(1, ranks, nodes) if compressed or nodes > 1 else cls(ranks, 1, 1)

    @property
    def outer_per_node(self) -> int:
        """Outer ranks on each node of one inner one."""
        return self.outer // self.nodes if self.outer > 1 else 1


def ddp_buckets(parameters: Parameters, bucket_bytes: int = 25 << 20) -> list[Parameters]:
    """Share parameters out among buckets, about as DistributedDataParallel does it: last ones first, by type.

    Args:
        parameters: In the order of the model.
        bucket_bytes: A bucket is closed once it has as many; the first one, in which gradients come first, at 1 MB.
    """
    buckets: list[list[tuple[str, Tensor]]] = []
    filled: dict[torch.dtype, int] = {}
    opened: dict[torch.dtype, list[tuple[str, Tensor]]] = {}
    for name, parameter in reversed(parameters):
        dtype = parameter.dtype
        if dtype not in opened:
            opened[dtype], filled[dtype] = [], 0
            buckets.append(opened[dtype])
        opened[dtype].append((name, parameter))
        filled[dtype] += parameter.numel() * parameter.element_size()
        if filled[dtype] >= (min(_FIRST_BUCKET_BYTES, bucket_bytes) if len(buckets) == 1 else bucket_bytes):
            del opened[dtype]
    return list(buckets)


def exchange_traffic(
    buckets: Sequence[Parameters],
    levels: Levels,
    compressor: Compressor | LinearCompressor | None,
    *,
    step: int = STEADY_STEP,
    device: torch.device | str = "cpu",
) -> list[list[MessageTraffic]]:
    """What each message of each bucket moves; see :func:`bucket_traffic`."""
    return [bucket_traffic(bucket, levels, compressor, step=step, device=device) for bucket in buckets]


def bucket_traffic(
    bucket: Parameters,
    levels: Levels,
    compressor: Compressor | LinearCompressor | None,
    *,
    step: int = STEADY_STEP,
    device: torch.device | str = "cpu",
) -> list[MessageTraffic]:
    """What each message of a bucket moves.

    Args:
        bucket: Parameters of one type, in the order in which their gradients lie in the bucket.
        levels: The levels of the exchange.
        compressor: The code; None if all is dense.
        step: Number of the exchange, which matters during a compressor's warm-up.
        device: Kind of device that gradients lie on: it decides how long messages are.
    """
    if not bucket:
        return []
    itemsize = bucket[0][1].dtype.itemsize // (2 if bucket[0][1].is_complex() else 1)
    row_bytes, region_numel = sizes_for(torch.device(device))
    plan = plan_messages(
        bucket,
        layout=Layout(levels.inner, levels.outer),
        compressor=compressor,
        row_numel=row_bytes // itemsize,
        region_numel=region_numel,
    )
    found = []
    for message in plan.messages:
        if isinstance(message, LinearMessage):
            assert isinstance(compressor, LinearCompressor)
            found.append(_linear(message, levels, compressor, itemsize))
        elif message.kind == "dense":
            found.append(_dense(message, levels, itemsize, itemsize))
        else:
            assert isinstance(compressor, Compressor)
            if compressor.prefers_dense(step, levels.outer):
                found.append(_dense(message, levels, itemsize, 4))
            else:
                found.append(_coded(message, levels, compressor, itemsize, step))
    return found


def _dense(message: Message, levels: Levels, itemsize: int, summed_itemsize: int) -> MessageTraffic:
    rows = [count(row) for row in message.rows]
    return MessageTraffic(
        way="dense",
        rows=tuple(rows),
        pieces=tuple(map(len, message.rows)),
        collected=(_collected(message.rows, levels, itemsize),),
        phases=_sum_across(rows, levels, summed_itemsize),
        shared=(levels.inner - 1) * summed_itemsize * sum(rows),
    )


def _coded(message: Message, levels: Levels, compressor: Compressor, itemsize: int, step: int) -> MessageTraffic:
    def size(pieces: Iterable[Piece]) -> int:
        return sum(padded(compressor.payload_bytes(piece.numel, step)) for piece in pieces)

    if message.kind == "reduce":
        sizes = [[size(part) for part in row] for row in message.parts]
        phases: tuple[Phase, ...] = (_all_to_all(sizes, levels), _all_gather(sizes, levels))
    else:
        sizes = [[size(row)] * levels.outer for row in message.rows]
        phases = (_all_gather(sizes, levels),)
    rows = [count(row) for row in message.rows]
    return MessageTraffic(
        way="reduce" if message.kind == "reduce" else "gather",
        rows=tuple(rows),
        pieces=tuple(map(len, message.rows)),
        collected=(_collected(message.rows, levels, itemsize),),
        phases=phases,
        shared=(levels.inner - 1) * sum(row_offsets(row)[-1] for row in sizes),
    )


def _linear(message: LinearMessage, levels: Levels, compressor: LinearCompressor, itemsize: int) -> MessageTraffic:
    codes = [sum(compressor.code_numel(shape) or 0 for _, shape in row) for row in message.regions]
    rounds = [_sum_across(one, levels, 4) for one in _by_round(message, compressor)]
    rows = [sum(region.numel for region, _ in row) for row in message.regions]
    return MessageTraffic(
        way="linear",
        rows=tuple(rows),
        pieces=tuple(map(len, message.regions)),
        collected=tuple(_collected(fragment, levels, itemsize) for fragment in message.fragments),
        phases=tuple(phase for phases in rounds for phase in phases),
        shared=(levels.inner - 1) * 4 * sum(codes),
    )


def _by_round(message: LinearMessage, compressor: LinearCompressor) -> list[list[int]]:
    """Numbers that each inner rank has summed in each round. A code is what all rounds have summed."""
    found = [[0] * len(message.regions) for _ in range(compressor.num_rounds)]
    for inner, row in enumerate(message.regions):
        for _, shape in row:
            total = compressor.code_numel(shape) or 0
            for number in range(compressor.num_rounds):
                found[number][inner] += total // compressor.num_rounds + (number < total % compressor.num_rounds)
    return found


def _collected(rows: Sequence[Sequence[Piece]], levels: Levels, itemsize: int) -> int:
    return (levels.inner - 1) * itemsize * sum(count(row) for row in rows)


def _sum_across(rows: Sequence[int], levels: Levels, itemsize: int) -> tuple[Phase, ...]:
    """Of dense values, ``rows[l]`` of inner rank l, in portions as :meth:`Exchange.sum_across` makes them."""
    size = levels.outer
    if size == 1:
        return ()
    unit, longest = ROW_ALIGNMENT // itemsize, LARGEST_MESSAGE_BYTES // itemsize * size
    sizes = [[0] * size for _ in rows]
    for row, numel in enumerate(rows):
        for start in range(0, numel, longest):
            part = min(longest, numel - start)
            length = -(-part // (size * unit)) * unit
            for outer in range(size):
                sizes[row][outer] += itemsize * max(0, min(length, part - outer * length))
    transfers = -(-max(rows) // longest)
    phases = _all_to_all(sizes, levels), _all_gather(sizes, levels)
    return tuple(replace(phase, transfers=transfers) for phase in phases)


def _all_to_all(sizes: Sequence[Sequence[int]], levels: Levels) -> Phase:
    """Everybody sends ``sizes[i][o]`` bytes to outer rank o."""
    by_node, ranks, totals = _by_node(sizes, levels), levels.outer_per_node, [sum(row) for row in sizes]
    return Phase(
        tuple(tuple(ranks * (total - own) for own, total in zip(mine, totals, strict=True)) for mine in by_node),
        tuple(tuple((ranks - 1) * own for own in mine) for mine in by_node),
    )


def _all_gather(sizes: Sequence[Sequence[int]], levels: Levels) -> Phase:
    """Outer rank o sends ``sizes[i][o]`` bytes to all others."""
    by_node, ranks = _by_node(sizes, levels), levels.outer_per_node
    return Phase(
        tuple(tuple((levels.outer - ranks) * own for own in mine) for mine in by_node),
        tuple(tuple((ranks - 1) * own for own in mine) for mine in by_node),
    )


def _by_node(sizes: Sequence[Sequence[int]], levels: Levels) -> list[list[int]]:
    """What the outer ranks of each node have of ``sizes``, by inner rank."""
    ranks = levels.outer_per_node
    return [[sum(row[at : at + ranks]) for row in sizes] for at in range(0, levels.outer, ranks)]
