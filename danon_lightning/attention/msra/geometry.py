"""Which cells of which level a query sees.

Level l divides the sequence in cells of r^l tokens and in blocks of B cells. A query sees, at level 0, the tokens of
its own block and of the one before; at level l, the cells of its own level-l block and of the one before that end where
the reach of level l - 1 begins. So every past token is covered exactly once, by cells that grow with the distance, as
in the fast multipole method.

Reference:
    Greengard & Rokhlin 1987, "A fast algorithm for particle simulations"; Zhu & Soricut 2021, "H-Transformer-1D: Fast
    One-Dimensional Hierarchical Attention for Sequences".
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from danon_lightning.attention.statistics import count_real

__all__ = ["Geometry"]

# Queries for which cells are counted at once: the table of who sees what would be quadratic.
COUNTED_AT_ONCE = 1024


@dataclass(frozen=True)
class Geometry:
    """The layout of the levels.

    Args:
        block_size: Cells B in a block of any level; a multiple of ``pool_factor``, so that the levels meet.
        pool_factor: Cells r of one level in a cell of the next one, at least 2.
        num_levels: Number of levels L, the tokens included, at least 1.

    Raises:
        ValueError: If a value is out of range or they do not fit.
    """

    block_size: int
    pool_factor: int
    num_levels: int

    def __post_init__(self) -> None:
        """Check the values."""
        if self.pool_factor < 2:
            raise ValueError(f"pool_factor={self.pool_factor} must be at least 2: a cell summarises several others")
        if self.block_size < 1 or self.block_size % self.pool_factor:
            nearest = max(1, round(self.block_size / self.pool_factor)) * self.pool_factor
            raise ValueError(
                f"block_size={self.block_size} must be a positive multiple of the pooling factor {self.pool_factor}; "
                f"use block_size={nearest}"
            )
        if self.num_levels < 1:
            raise ValueError(f"num_levels={self.num_levels} must be at least 1, or 'auto'")

    @classmethod
    def resolve(cls, block_size: int, pool_factor: int, num_levels: int | Literal["auto"], length: int) -> "Geometry":
        """Return the layout, with as many levels as ``length`` tokens need if ``num_levels`` is ``"auto"``."""
        if isinstance(num_levels, int) and not isinstance(num_levels, bool):
            return cls(block_size, pool_factor, num_levels)
        if num_levels != "auto":
            raise ValueError(f"num_levels={num_levels!r} must be an integer of at least 1, or 'auto'")
        geometry = cls(block_size, pool_factor, 1)
        return cls(block_size, pool_factor, geometry.levels_needed(length))

    @property
    def reach(self) -> int:
        """Length of the longest sequence in which every token reaches every other one: 2·B·r^(L-1)."""
        return 2 * self.block_length(self.num_levels - 1)

    def span(self, level: int) -> int:
        """Return the number of tokens r^l in a cell."""
        return self.pool_factor**level

    def block_length(self, level: int) -> int:
        """Return the number of tokens B·r^l in a block."""
        return self.block_size * self.span(level)

    def levels_needed(self, length: int) -> int:
        """Return the least number of levels with which every one of ``length`` tokens reaches every other one."""
        levels = 1
        while 2 * self.block_length(levels - 1) < length:
            levels += 1
        return levels

    def active_levels(self, length: int) -> int:
        """Return the number of levels with a visible cell in a sequence of ``length`` tokens."""
        return min(self.num_levels, self.levels_needed(length))

    def visible(self, queries: Tensor, cells: Tensor, level: int, *, causal: bool) -> Tensor:
        """Tell which cells of a level the queries see.

        Args:
            queries: Positions of queries, integer.
            cells: Indices of cells at ``level``, integer, of a shape that broadcasts with ``queries``.
            level: The level.
            causal: Whether only the past is visible.

        Returns:
            A boolean tensor of the broadcast shape.
        """
        size = self.block_size
        block = queries // self.block_length(level)
        not_too_far_back = cells >= (block - 1) * size
        if level == 0:
            return not_too_far_back & (cells <= queries if causal else cells < (block + 2) * size)
        # All borders in units of cells of this level: a block of the level below spans B / r of them.
        below, step = queries // self.block_length(level - 1), size // self.pool_factor
        left = not_too_far_back & (cells < (below - 1) * step)
        if causal:
            return left
        return left | ((cells >= (below + 2) * step) & (cells < (block + 2) * size))

    def count_seen(self, real: Tensor, level: int, *, causal: bool) -> Tensor:
        """Count the cells of a level, of those with real tokens, that each real query sees.

        Args:
            real: True for real tokens ``[b, n]``, boolean.
            level: The level.
            causal: Whether only the past is visible.

        Returns:
            ``[b, 1, n]``, zero for queries that are padding.
        """
        length, span = real.shape[1], self.span(level)
        starts = torch.arange(0, length, span, device=real.device)
        filled = (count_real(starts, (starts + span).clamp(max=length), real) > 0).to(torch.float32)
        cells = torch.arange(len(starts), device=real.device)
        counts = []
        for queries in torch.arange(length, device=real.device).split(COUNTED_AT_ONCE):
            visible = self.visible(queries.unsqueeze(-1), cells, level, causal=causal)
            counts.append(filled @ visible.to(filled.dtype).mT)
        return (torch.cat(counts, dim=-1) * real).unsqueeze(1)
