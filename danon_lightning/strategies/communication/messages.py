"""How a bucket of gradients is cut into messages."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Tensors smaller than this, and 1-D ones (biases, norms), are few in bytes and large in meaning: they travel dense.
SMALLEST_COMPRESSED = 4096


@dataclass(frozen=True)
class Piece:
    """``numel`` consecutive elements: where they lie in the bucket, and where in the message."""

    bucket_offset: int
    message_offset: int
    numel: int


@dataclass(frozen=True)
class Message:
    """What is exchanged at a time: pieces of one bucket, padded with zeros to ``numel`` elements."""

    pieces: tuple[Piece, ...]
    numel: int
    compressed: bool

    def load(self, bucket: Tensor) -> Tensor:
        """The message's elements ``[numel]``: a view of ``bucket`` where they lie there in one piece, else a copy."""
        if len(self.pieces) == 1 and self.pieces[0].numel == self.numel:
            return bucket[self.pieces[0].bucket_offset :][: self.numel]
        out = torch.zeros(self.numel, dtype=bucket.dtype, device=bucket.device)
        for piece in self.pieces:
            out[piece.message_offset :][: piece.numel] = bucket[piece.bucket_offset :][: piece.numel]
        return out

    def store(self, values: Tensor, bucket: Tensor) -> None:
        """Write ``values [numel]`` back to where they came from, unless they are there already."""
        if values.data_ptr() == bucket[self.pieces[0].bucket_offset :].data_ptr():
            return
        for piece in self.pieces:
            bucket[piece.bucket_offset :][: piece.numel] = values[piece.message_offset :][: piece.numel]


def plan_messages(parameters: Sequence[Tensor], *, capacity: int, shards: int, block_size: int | None) -> list[Message]:
    """Cut a bucket into messages, the same on every rank.

    Args:
        parameters: The bucket's parameters in the order in which their gradients lie in its buffer.
        capacity: Elements of a message at most; rounded down to what can be shared out evenly in whole blocks.
        shards: Each message is padded to a multiple of this, so that every rank sums an equal part.
        block_size: Elements of a compressor's block, or None if all is dense. A parameter's blocks start at its first
            element and its last block is padded, so their content is independent of the bucket.

    Returns:
        The compressed messages, then the dense ones.
    """
    compressed, dense = _Packer(capacity, shards, block_size or 1), _Packer(capacity, shards, 1)
    offset = 0
    for parameter in parameters:
        # A bucket holds complex numbers as pairs of real ones, which have no blocks of their own.
        numel = parameter.numel() * (2 if parameter.is_complex() else 1)
        big = parameter.dim() > 1 and numel >= SMALLEST_COMPRESSED and not parameter.is_complex()
        (compressed if big and block_size is not None else dense).add(offset, numel)
        offset += numel
    return compressed.messages(compressed=True) + dense.messages(compressed=False)


class _Packer:
    """Fills messages of bounded size, each piece beginning at a multiple of ``align``."""

    def __init__(self, capacity: int, shards: int, align: int) -> None:
        self._unit, self._align = shards * align, align
        self._capacity = max(1, capacity // self._unit) * self._unit
        self._packed: list[list[Piece]] = []
        self._filled = self._capacity

    def add(self, bucket_offset: int, numel: int) -> None:
        while numel:
            if self._filled >= self._capacity:
                self._packed.append([])
                self._filled = 0
            take = min(numel, self._capacity - self._filled)
            pieces = self._packed[-1]
            if self._align == 1 and pieces and pieces[-1].bucket_offset + pieces[-1].numel == bucket_offset:
                last = pieces.pop()  # neighbours in the bucket are neighbours in the message: one copy serves both
                pieces.append(Piece(last.bucket_offset, last.message_offset, last.numel + take))
            else:
                pieces.append(Piece(bucket_offset, self._filled, take))
            self._filled += _round_up(take, self._align)
            bucket_offset, numel = bucket_offset + take, numel - take

    def messages(self, *, compressed: bool) -> list[Message]:
        out = []
        for pieces in self._packed:
            end = pieces[-1].message_offset + pieces[-1].numel
            out.append(Message(tuple(pieces), _round_up(end, self._unit), compressed))
        return out


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
