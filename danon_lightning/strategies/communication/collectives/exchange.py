"""The two levels of an exchange, and the steps that all collectives are made of.

Legend: N = M outer groups × L inner ranks. The *inner* level (the ranks of a node: fast links) always moves dense
values; the *outer* level (equal local ranks of all nodes: slow links) moves what the compressor makes of them. Where
all ranks exchange alike, L = 1 and all of them are outer; where nothing is slow, M = 1 and all of them are inner.

Collectives are generators, so that several messages can be under way at once: they yield wherever they would wait for
other ranks. How often they yield is the same on all ranks.

Sums are taken locally and in rank order. Unlike in a ring their rounding does not depend on where in a bucket an
element lies, so regrouping the buckets changes nothing, and a resumed run repeats an uninterrupted one.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from danon_lightning.strategies.communication import kernels
from danon_lightning.strategies.communication.compressors import Compressor, LinearCompressor
from danon_lightning.strategies.communication.levels import (
    LARGEST_MESSAGE_BYTES,
    ROW_ALIGNMENT,
    Box,
    GroupLevel,
    Level,
)
from danon_lightning.strategies.communication.memory import Memory
from danon_lightning.strategies.communication.messages import Piece

# How many messages further the exchange goes before it waits for what a message has sent to other nodes: one is on the
# wire while the next is being coded.
IN_FLIGHT = 2

T = TypeVar("T")
Steps = Generator[None, None, T]


@dataclass
class Exchange:
    """The two levels, and what they are used with.

    Args:
        inner: The level that moves dense values.
        outer: The level that moves coded ones.
        compressor: The code; None if all is dense.
        memory: What is kept from step to step, if there is a compressor.

    Attributes:
        loss_scale: What gradients are divided by before they are averaged, and results multiplied with.
        dense_bytes: What this rank would have sent over the outer level, had all been dense float32.
        sent_bytes: What it has sent there.
        looks_at_averages: Whether, where all is dense, ``finite`` shall be that of all ranks: what is not finite on one
            of them is in the averages, which are the same on all.
    """

    inner: Level
    outer: GroupLevel
    compressor: Compressor | LinearCompressor | None
    memory: Memory | None
    loss_scale: float = field(default=1.0, init=False)
    dense_bytes: float = field(default=0.0, init=False)
    sent_bytes: int = field(default=0, init=False)
    looks_at_averages: bool = field(default=False, init=False)
    _finite: "bool | Tensor" = field(default=True, init=False)

    @property
    def finite(self) -> bool:
        """Whether all that this rank has summed, or looked at, since :meth:`begin_step` was finite."""
        return bool(self._finite)

    def begin_step(self, loss_scale: float) -> None:
        """Set the scale, forget what was found out about the last step, and see what this one exchanges."""
        self.loss_scale, self._finite = loss_scale, True
        if self.memory is not None:
            self.memory.begin_step()

    def close(self) -> None:
        """Give up the levels. Every rank does it, with nothing under way."""
        self.inner.close()
        self.outer.close()

    def collect(self, rows: Sequence[Sequence[Piece]], bucket: Tensor) -> "Steps[Collected]":
        """Hand each rank of the node the pieces it sums: ``rows[l]`` to local rank l."""
        own, itemsize = self.inner.index, bucket.element_size()
        box = self.inner.all_to_all([itemsize * count(row) for row in rows])
        for index, row in enumerate(rows):
            if index != own:
                for piece, values in along(row, box.outgoing[index].view(bucket.dtype)):
                    kernels.copy(values, view(piece, bucket))
        box.post()
        if self.inner.size > 1:
            yield
        box.wait()
        return Collected(self, box, bucket)

    def sum_across(self, values: Tensor, out: Tensor) -> Steps[None]:
        """Sum ``values [n]`` over the outer level into ``out [n]``, dense, in two times n·(M−1)/M elements sent."""
        size, itemsize = self.outer.size, values.element_size()
        if size == 1:
            if out is not values:
                out.copy_(values)
            return
        self.count_sent(2 * (size - 1) / size * values.nbytes)
        unit = ROW_ALIGNMENT // itemsize
        longest = LARGEST_MESSAGE_BYTES // itemsize * size
        started = []
        for start in range(0, len(values), longest):
            part, result = values[start : start + longest], out[start : start + longest]
            length = -(-len(part) // (size * unit)) * unit
            rows, results = _split(part, size, length), _split(result, size, length)
            sizes = [row.nbytes for row in rows]
            across = self.outer.all_to_all(sizes, [_bytes(row) for row in rows])
            back = self.outer.all_gather(sizes, [_bytes(row) for row in results])
            across.post()
            started.append((across, back, results[self.outer.index]))
        yield from self.lag()
        for across, back, mine in started:
            across.wait()
            add_up(mine, [row.view(values.dtype) for row in across.incoming], 1.0)
            back.post()
        yield from self.lag()
        for _, back, _ in started:
            back.wait()

    def lag(self) -> Steps[None]:
        """Let other messages go on while this one is on the wire."""
        for _ in range(IN_FLIGHT if self.outer.size > 1 else 0):
            yield

    def note_finite(self, finite: "bool | Tensor") -> None:
        """Take note of whether something was finite; a tensor is not looked at before the end of the step."""
        self._finite = self._finite & finite

    def hand_round(self, box: Box) -> Steps[None]:
        """Post the result in a box of the node, and wait for those of the others."""
        box.post()
        if self.inner.size > 1:
            yield
        box.wait()

    def count_sent(self, size: float) -> None:
        """Count bytes sent over the outer level."""
        self.sent_bytes += int(size)

    def count_dense(self, numel: int) -> None:
        """Count elements averaged over the outer level: what they would have taken as dense float32."""
        self.dense_bytes += 2 * (self.outer.size - 1) / self.outer.size * numel * 4

    def deliver(self, target: Tensor, decode: Callable[[Tensor], None]) -> None:
        """Have float32 values decoded into ``target``, a part of the bucket, and scale them like the loss."""
        out = target if target.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
        decode(out)
        if self.loss_scale != 1.0:
            out.mul_(self.loss_scale)
        if out is not target:
            target.copy_(out)


class Collected:
    """What the ranks of a node have handed to this one."""

    def __init__(self, exchange: Exchange, box: Box, bucket: Tensor) -> None:
        """From the box in which it has come."""
        self._exchange, self._box, self._bucket = exchange, box, bucket
        self._rows = [row.view(bucket.dtype) for row in box.incoming]
        self._offset = 0
        self._share = 1.0 / (exchange.inner.size * exchange.outer.size)

    def sum(self, piece: Piece, out: Tensor, *, unscaled: bool) -> None:
        """This node's share of the mean of the next piece (in their order), without the loss scale if ``unscaled``."""
        sources, share = self.terms(piece, unscaled=unscaled)
        self._exchange.note_finite(add_up(out, sources, share))

    def terms(self, piece: Piece, *, unscaled: bool) -> tuple[list[Tensor], float]:
        """What :meth:`sum` adds up, and what it multiplies the sum with."""
        own, start = self._exchange.inner.index, self._offset
        self._offset += piece.numel
        sources = [row[start : self._offset] for row in self._rows]
        sources[own] = view(piece, self._bucket)
        return sources, self._share / self._exchange.loss_scale if unscaled else self._share

    def release(self) -> None:
        """Done with it."""
        self._box.release()


def add_up(out: Tensor, sources: Sequence[Tensor], scale: float) -> "bool | Tensor":
    """out = scale · Σ sources, in their order; returns whether it is finite. Half precision is summed in float32.

    Nothing is multiplied on the way: where a kernel fuses that, it does so in the body of a tensor and not at its end,
    and the result would depend on where in a message an element lies.
    """
    if out.dtype == torch.float32:
        return kernels.add_scaled(out, sources, scale)
    total = sources[0].to(torch.promote_types(out.dtype, torch.float32), copy=True)
    for source in sources[1:]:
        total += source
    out.copy_(total.mul_(scale))
    return kernels.all_finite(out)


def copying(values: Tensor) -> Callable[[Tensor], None]:
    """For :meth:`Exchange.deliver`: values that are float32 already."""

    def copy(out: Tensor) -> None:
        out.copy_(values)

    return copy


def view(piece: Piece, bucket: Tensor) -> Tensor:
    """The piece's elements of the bucket."""
    return bucket[piece.bucket_offset : piece.bucket_offset + piece.numel]


def count(pieces: Sequence[Piece]) -> int:
    """Elements in all of them."""
    return sum(piece.numel for piece in pieces)


def along(pieces: Sequence[Piece], values: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """Each piece with its elements of ``values``, where pieces lie one after another."""
    return zip(pieces, values.split([piece.numel for piece in pieces]), strict=True)


def _split(values: Tensor, count: int, length: int) -> list[Tensor]:
    """``count`` rows of ``length`` elements, of which the last ones have the rest, or nothing."""
    return [values[index * length : (index + 1) * length] for index in range(count)]


def _bytes(values: Tensor) -> Tensor:
    return values.view(torch.uint8)
