"""Sequences as pieces of a few blocks each, worked on one piece after the other."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.pieces import tokens_at_once
from danon_lightning.attention.rotary import apply_rotary, cell_positions

__all__ = ["Blocks", "with_block_before"]


@dataclass(frozen=True)
class Blocks:
    """How a sequence is cut.

    Args:
        length: Tokens n in the sequence.
        size: Tokens B in a block; a sequence of a single block has a block of its own length.
        count: Number of blocks, the last one filled up.
        at_once: Blocks in a piece.
    """

    length: int
    size: int
    count: int
    at_once: int

    @classmethod
    def of(cls, length: int, block_size: int, device: torch.device) -> "Blocks":
        """Return the cut of ``length`` tokens in blocks of ``block_size``, for work on ``device``."""
        size = min(block_size, length)
        return cls(length, size, -(-length // size), max(1, tokens_at_once(device) // size))

    def cut(self, x: Tensor, fill: float = 0.0) -> tuple[Tensor, ...]:
        """Cut ``[..., n, d]`` in pieces ``[..., g, B, d]`` of g blocks, the last block filled up with ``fill``."""
        missing = self.count * self.size - self.length
        if missing:
            x = F.pad(x, (0, 0, 0, missing), value=fill)
        # A split and not slices: each of many slices would fill up its gradient with zeros to the whole length.
        return self.split(x.unflatten(-2, (self.count, self.size)), dim=-3)

    def split(self, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Split a dimension of one entry a block in pieces."""
        pieces: tuple[Tensor, ...] = x.split(self.at_once, dim=dim)
        return pieces

    def cut_rotated(self, x: Tensor, base: float | None) -> Iterator[Tensor]:
        """Cut ``[..., n, d]`` likewise, each token rotated by its position."""
        positions = cell_positions(0, self.count * self.size, 1, x.device).split(self.at_once * self.size)
        for piece, where in zip(self.cut(x), positions, strict=True):
            yield apply_rotary(piece.flatten(-3, -2), where, base).unflatten(-2, (-1, self.size))

    def join(self, pieces: list[Tensor], dim: int) -> Tensor:
        """Undo ``cut``, blocks and tokens being the dimensions ``dim`` and ``dim + 1``."""
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)
        return joined.flatten(dim, dim + 1).narrow(dim, 0, self.length)


def with_block_before(pieces: Iterable[Tensor], fill: float = 0.0) -> Iterator[Tensor]:
    """Yield every piece ``[..., g, B, d]`` with the tokens of the block before in front of those of each block.

    Args:
        pieces: Pieces that follow one another.
        fill: What stands in for the block before the first one.

    Yields:
        ``[..., g, 2B, d]``.
    """
    last = None
    for piece in pieces:
        if last is None:
            last = torch.full_like(piece[..., :1, :, :], fill)
        before = torch.cat([last, piece[..., :-1, :, :]], dim=-3)
        yield torch.cat([before, piece], dim=-2)
        last = piece[..., -1:, :, :]
