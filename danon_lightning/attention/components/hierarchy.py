"""Compression level by level: cells of cells."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danon_lightning.attention.components.cells import CompressedSequence, CompressionStats, energy_retained
from danon_lightning.attention.components.compression import DynamicCompression

__all__ = ["HierarchicalCompression"]


class HierarchicalCompression(nn.Module):
    """A pyramid of compressions: each level compresses the cells of the one below, the first one the tokens.

    A cell counts its children equally, however many tokens they stand for. Each level has maps and a ratio of its own;
    an adaptive ratio follows the energy that its level retains of what it was given.

    Args:
        dim: Width D of a token.
        num_levels: Number of levels.
        **settings: Settings of every level, as those of ``DynamicCompression``.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(self, dim: int, num_levels: int = 3, **settings: Any) -> None:
        """Create the levels."""
        super().__init__()
        if not isinstance(num_levels, int) or isinstance(num_levels, bool) or num_levels < 1:
            raise ValueError(f"num_levels={num_levels!r} must be an integer of at least 1")
        self.num_levels = num_levels
        self.levels = nn.ModuleList(DynamicCompression(dim, **settings) for _ in range(num_levels))

    def compress(
        self, x: Tensor, return_stats: bool = False
    ) -> list[CompressedSequence] | tuple[list[CompressedSequence], list[CompressionStats]]:
        """Compress a batch of sequences to all levels.

        Args:
            x: Tokens ``[b, L, D]``, floating point, none of them padding.
            return_stats: Whether to measure what the levels kept.

        Returns:
            What each level made, the finest first; and if asked for the statistics of each level against the tokens.

        Raises:
            ValueError: If ``x`` has the wrong shape or dtype.
        """
        compressed: list[CompressedSequence] = []
        below = x
        for level in self._levels():
            made = level.compress(below)
            assert isinstance(made, CompressedSequence)
            compressed.append(made)
            below = made.dequantized()
        if not return_stats:
            return compressed
        stats = []
        with torch.no_grad():
            for index, made in enumerate(compressed):
                retained = float(energy_retained(x, self.decompress(compressed, x.shape, index)))
                stats.append(CompressionStats(made.shape[1] / x.shape[1], retained, made.nbytes / x.nbytes))
        return compressed, stats

    def decompress(
        self, compressed: Sequence[CompressedSequence], shape: torch.Size | tuple[int, ...], level: int = -1
    ) -> Tensor:
        """Expand the cells of one level to tokens, through all levels below it.

        Args:
            compressed: From ``compress``, up to ``level`` at least; of the lower levels only the assignment is read.
            shape: The shape ``(b, L, D)`` of the tokens.
            level: Where to start, 0 being the finest level; -1 is the last one of ``compressed``.

        Returns:
            ``[b, L, D]``, floating point.

        Raises:
            ValueError: If there is no such level, or the cells cannot come from tokens of that shape.
        """
        available = min(len(compressed), self.num_levels)
        if not -available <= level < available:
            raise ValueError(f"level={level} must lie in [{-available}, {available - 1}]: the cells have these levels")
        level %= available
        cells = compressed[level].dequantized()
        for index in range(level, -1, -1):
            assignment = compressed[index].assignment
            length = assignment.shape[1] if index else shape[1]
            here = CompressedSequence(cells, assignment)
            cells = self._levels()[index].decompress(here, (shape[0], length, shape[2]))
        return cells

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x [b, L, D]`` compressed through all levels and expanded again; gradients pass quantization."""
        assignments = []
        cells = x
        for level in self._levels():
            cells, assignment = level.pool(cells)
            assignments.append(assignment)
        for level, assignment in zip(reversed(self._levels()), reversed(assignments), strict=True):
            cells = level.expand(cells, assignment)
        return cells

    def _levels(self) -> list[DynamicCompression]:
        return [level for level in self.levels if isinstance(level, DynamicCompression)]
