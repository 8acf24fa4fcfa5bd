"""How a bucket of gradients is cut into messages, and who sums which part of them."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from danon_lightning.strategies.communication.compressors import Compressor, LinearCompressor
from danon_lightning.strategies.communication.compressors.base import Region

# Tensors smaller than this, and 1-D ones (biases, norms), are few in bytes and large in meaning: they travel dense.
SMALLEST_COMPRESSED = 4096

# Of what one rank sums of a message over its node: few messages, for each costs about a millisecond of processor time,
# but enough of them to keep the pipeline full.
_CPU_ROW_BYTES = 4 << 20
# What is summed shall still be in the cache (of about 2 MB) when it is coded.
_CPU_REGION_NUMEL = 1 << 19
# nccl cuts messages up by itself; what counts is that a launch is worth its while.
_CUDA_ROW_BYTES = 16 << 20
_CUDA_REGION_NUMEL = 1 << 22


def sizes_for(device: torch.device) -> tuple[int, int]:
    """Bytes of a message at most that one inner rank sums, and elements of a region at most, on this kind of device."""
    if device.type == "cuda":
        return _CUDA_ROW_BYTES, _CUDA_REGION_NUMEL
    return _CPU_ROW_BYTES, _CPU_REGION_NUMEL


@dataclass(frozen=True)
class Layout:
    """The two levels as the planner sees them: L inner ranks (of a node) × M outer ones (equal local ranks)."""

    inner: int
    outer: int

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.inner * self.outer


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a bucket.

    Attributes:
        bucket_offset: Where they begin in the bucket.
        numel: How many they are.
        region: What they are of their parameter; None where that does not matter, because they travel dense.
        region_offset: Where they begin in the region, if that consists of several pieces.
    """

    bucket_offset: int
    numel: int
    region: Region | None = None
    region_offset: int = 0


@dataclass(frozen=True)
class Message:
    """What is exchanged at a time.

    Attributes:
        kind: How it is exchanged: "dense"; or as its compressor says, "reduce" or "gather".
        parts: What inner rank l of every node sums over its node is ``parts[l]``. For "reduce" it has M elements: what
            each outer rank sums of it over the nodes. Else it has one.
    """

    kind: Literal["dense", "reduce", "gather"]
    parts: tuple[tuple[tuple[Piece, ...], ...], ...]

    @property
    def rows(self) -> list[list[Piece]]:
        """``rows[l]``: all that inner rank l sums over its node."""
        return [[piece for part in row for piece in part] for row in self.parts]


@dataclass(frozen=True)
class LinearMessage:
    """The regions of a bucket whose codes are summed (see :class:`LinearCompressor`).

    Attributes:
        fragments: The elements in portions, of which ``fragments[i][l]`` goes to inner rank l.
        regions: ``regions[l]``: the regions of inner rank l and their shapes.
    """

    fragments: tuple[tuple[tuple[Piece, ...], ...], ...]
    regions: tuple[tuple[tuple[Region, torch.Size], ...], ...]


@dataclass(frozen=True)
class Plan:
    """What becomes of a bucket.

    Attributes:
        messages: All its messages.
        dense: Its parameters that travel dense, one piece each.
    """

    messages: tuple[Message | LinearMessage, ...]
    dense: tuple[Piece, ...]

    @property
    def regions(self) -> set[Region]:
        """What something may be remembered of from step to step."""
        found = {piece.region for piece in self.dense}
        for message in self.messages:
            if isinstance(message, LinearMessage):
                found.update(region for row in message.regions for region, _ in row)
            else:
                found.update(piece.region for row in message.rows for piece in row)
        return {region for region in found if region is not None}


def plan_messages(
    parameters: Sequence[tuple[str, Tensor]],
    *,
    layout: Layout,
    compressor: Compressor | LinearCompressor | None,
    row_numel: int,
    region_numel: int,
) -> Plan:
    """Cut a bucket into messages, the same on every rank.

    Args:
        parameters: Names and parameters in the order in which their gradients lie in the bucket.
        layout: Sizes of the two levels.
        compressor: What the large parameters are coded with; None if all is dense.
        row_numel: Elements of a message at most that one inner rank sums.
        region_numel: Elements of a region at most, where regions are not whole parameters.
    """
    packer = _Packer(layout, compressor, row_numel, region_numel)
    dense = []
    offset = 0
    for name, parameter in parameters:
        numel = real_numel(parameter)
        if numel and not packer.add(name, parameter, offset):
            dense.append(Piece(offset, numel, Region(name, 0, numel)))
        offset += numel
    messages: list[Message | LinearMessage] = list(packer.messages())
    messages += _dense_messages(_merge(dense), layout, row_numel * layout.inner)
    return Plan(tuple(messages), tuple(dense))


def travels_dense(parameter: Tensor, compressor: Compressor | LinearCompressor) -> bool:
    """Whether a parameter is exchanged as it is, though others are coded."""
    if parameter.dim() < 2 or parameter.numel() < SMALLEST_COMPRESSED or parameter.is_complex():
        return True
    return isinstance(compressor, LinearCompressor) and compressor.code_numel(parameter.shape) is None


def real_numel(parameter: Tensor) -> int:
    """How many real numbers it has: buckets hold complex ones as pairs, which have no blocks of their own."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


class _Packer:
    """Shares out large parameters among the ranks, and fills messages of bounded size with them.

    Who sums what follows from the parameter alone: residuals belong to the rank that does it.
    """

    def __init__(
        self, layout: Layout, compressor: Compressor | LinearCompressor | None, row_numel: int, region_numel: int
    ) -> None:
        self._layout, self._compressor, self._row_numel = layout, compressor, row_numel
        self._region_numel = region_numel
        self._reduces = isinstance(compressor, Compressor) and compressor.exchange == "reduce"
        self._whole = isinstance(compressor, LinearCompressor) and compressor.whole_parameters
        shares = layout.size if self._reduces else layout.inner
        self._pieces: list[list[Piece]] = [[] for _ in range(shares)]
        self._shapes: dict[Region, torch.Size] = {}

    def add(self, name: str, parameter: Tensor, bucket_offset: int) -> bool:
        """Take the parameter, unless it is to travel dense."""
        numel, compressor = parameter.numel(), self._compressor
        if compressor is None or travels_dense(parameter, compressor):
            return False
        shares = len(self._pieces)
        alignment = compressor.alignment if isinstance(compressor, Compressor) else 1
        # In whole blocks; the first block goes to a rank that depends on the name, or small parameters would all
        # burden the first ranks. (hash() differs between processes.)
        length = numel if self._whole else -(-numel // (shares * alignment)) * alignment
        first = zlib.crc32(name.encode())
        for index, start in enumerate(range(0, numel, length)):
            share = self._pieces[(first + index) % shares]
            stop = min(numel, start + length)
            if isinstance(compressor, LinearCompressor):
                region = Region(name, start, stop)
                self._shapes[region] = parameter.shape if self._whole else torch.Size([region.numel])
                share += [
                    Piece(bucket_offset + start + at, size, region, at)
                    for at, size in _runs(region.numel, self._row_numel)
                ]
            else:
                longest = min(self._region_numel, self._row_numel // (shares // self._layout.inner))
                longest = longest // alignment * alignment
                share += [
                    Piece(bucket_offset + start + at, size, Region(name, start + at, start + at + size))
                    for at, size in _runs(stop - start, max(longest, alignment))
                ]
        return True

    def messages(self) -> Iterable[Message | LinearMessage]:
        inner = self._layout.inner
        per_inner = len(self._pieces) // inner
        portions = _portions(self._pieces, self._row_numel // per_inner)
        # Share number l · M + m belongs to inner rank l of outer rank m.
        cut = [tuple(tuple(p[l * per_inner : (l + 1) * per_inner]) for l in range(inner)) for p in portions]  # noqa: E741
        if not cut:
            return
        if isinstance(self._compressor, LinearCompressor):
            shapes = self._shapes
            regions = [dict.fromkeys(p.region for p in share if p.region is not None) for share in self._pieces]
            yield LinearMessage(
                tuple(tuple(row[0] for row in parts) for parts in cut),
                tuple(tuple((region, shapes[region]) for region in share) for share in regions),
            )
            return
        for parts in cut:
            yield Message("reduce" if self._reduces else "gather", parts)


def _portions(shares: list[list[Piece]], capacity: int) -> list[list[tuple[Piece, ...]]]:
    """Cut each share into runs of pieces of at most ``capacity`` elements; portion i has the i-th run of all."""
    runs: list[list[tuple[Piece, ...]]] = []
    for share in shares:
        cut: list[list[Piece]] = []
        room = 0
        for piece in share:
            if not cut or piece.numel > room:
                cut.append([])
                room = capacity
            cut[-1].append(piece)
            room -= piece.numel
        runs.append([tuple(run) for run in cut])
    return [[run[i] if i < len(run) else () for run in runs] for i in range(max(map(len, runs), default=0))]


def _dense_messages(pieces: list[Piece], layout: Layout, capacity: int) -> Iterable[Message]:
    """Messages of at most ``capacity`` elements, each shared out evenly."""
    count = -(-sum(piece.numel for piece in pieces) // capacity)
    for portion in split_pieces(pieces, count, capacity):
        total = sum(piece.numel for piece in portion)
        shares = split_pieces(portion, layout.inner, -(-total // layout.inner))
        yield Message("dense", tuple((share,) for share in shares))


def split_pieces(pieces: Iterable[Piece], count: int, length: int) -> list[tuple[Piece, ...]]:
    """Share pieces out in their order: ``length`` elements for each of ``count``; the last ones get the rest."""
    shares: list[list[Piece]] = [[] for _ in range(count)]
    filled = 0
    for piece in pieces:
        done = 0
        while done < piece.numel:
            take = min(piece.numel - done, length - filled % length)
            shares[filled // length].append(Piece(piece.bucket_offset + done, take))
            done, filled = done + take, filled + take
    return [tuple(share) for share in shares]


def _merge(pieces: list[Piece]) -> list[Piece]:
    """Join neighbours, so that one copy serves both."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and merged[-1].bucket_offset + merged[-1].numel == piece.bucket_offset:
            last = merged.pop()
            merged.append(Piece(last.bucket_offset, last.numel + piece.numel))
        else:
            merged.append(Piece(piece.bucket_offset, piece.numel))
    return merged


def _runs(numel: int, longest: int) -> list[tuple[int, int]]:
    """(start, length) of consecutive runs."""
    return [(start, min(longest, numel - start)) for start in range(0, numel, longest)]
