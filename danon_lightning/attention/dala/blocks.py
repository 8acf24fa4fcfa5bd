"""How a sequence is cut in blocks, and these in pieces that are worked on one after the other."""

from dataclasses import dataclass

import torch

from danon_lightning.attention.pieces import tokens_at_once

__all__ = ["Blocks"]


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

    def holding(self, start: int, stop: int) -> slice:
        """Return the blocks of the tokens from ``start``, where a block begins, to ``stop``."""
        return slice(start // self.size, -(-stop // self.size))
