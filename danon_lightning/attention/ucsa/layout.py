"""Which tokens and which cells a query of UCSA may read.

The first tokens are sinks. What follows is cut in blocks of S tokens, and blocks are the cells of level 0 of a tree: a
cell of level l holds r^l blocks. A query sees the sinks, the blocks around its own token by token, and the cells that
lie wholly outside of this window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """The sizes of everything.

    Args:
        block_size: Tokens S in a block, at least 1.
        num_selected: Cells k that a query expands at each level, at least 0.
        window_blocks: Blocks before the own one that are read token by token (and after it, unless causal), at least 0.
        num_sinks: Tokens at the start that every query reads, at least 0.
        tree_levels: Levels T of cells, at least 1: blocks alone.
        tree_factor: Cells r of one level that a cell of the next one holds, at least 2.
        causal: Whether a query sees the past only.

    Raises:
        ValueError: If a value is out of range.
    """

    block_size: int
    num_selected: int
    window_blocks: int
    num_sinks: int
    tree_levels: int = 1
    tree_factor: int = 16
    causal: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        least = {
            "block_size": 1,
            "num_selected": 0,
            "window_blocks": 0,
            "num_sinks": 0,
            "tree_levels": 1,
            "tree_factor": 2,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}")

    @property
    def blocks_in_window(self) -> int:
        """Blocks that a query reads token by token, its own one included."""
        return self.window_blocks * (1 if self.causal else 2) + 1

    def span(self, level: int) -> int:
        """Return the number of tokens that a cell holds."""
        return self.block_size * self.tree_factor**level

    def num_blocks(self, length: int) -> int:
        """Return the number of blocks of a sequence of ``length`` tokens, the last one perhaps incomplete."""
        return -(-max(0, length - self.num_sinks) // self.block_size)

    def own_block(self, position: int) -> int:
        """Return the block around which the window of the query at ``position`` lies; for sinks it is the first."""
        return max(0, position - self.num_sinks) // self.block_size

    def blocks_outside(self, length: int) -> int:
        """Return the largest number of blocks that a query of a sequence of ``length`` tokens sees beyond its window.

        Bidirectional queries at either end have the most.
        """
        return max(0, self.num_blocks(length) - 1 - self.window_blocks)

    def reading_everything(self, length: int, *, expandable: bool) -> int:
        """Return how many of the first queries read all that they see token by token.

        Args:
            length: Tokens of the sequence.
            expandable: Whether every block may be expanded.
        """
        selected = self.num_selected if expandable else 0
        if self.causal:
            return min(length, self.num_sinks + (1 + self.window_blocks + selected) * self.block_size)
        return length if self.blocks_outside(length) <= selected else 0

    def cells_before(self, positions: Tensor, level: int) -> Tensor:
        """Return for each query the number of cells wholly before its window: those with a smaller index."""
        own = (positions - self.num_sinks).clamp(min=0) // self.block_size
        return (own - self.window_blocks).clamp(min=0) // self.tree_factor**level

    def cells_after(self, positions: Tensor, level: int) -> Tensor:
        """Return for each query of a bidirectional layout the index of the first cell wholly after its window."""
        own = (positions - self.num_sinks).clamp(min=0) // self.block_size
        width = self.tree_factor**level
        return (own + self.window_blocks + width) // width

    def outside(self, cells: Tensor, positions: Tensor, level: int) -> Tensor:
        """Tell which cells lie wholly outside of the window, on a side that the query sees.

        Args:
            cells: Indices of cells.
            positions: Positions of queries, of a shape that broadcasts with that of ``cells``.
            level: Level of the cells.
        """
        visible = cells < self.cells_before(positions, level)
        return visible if self.causal else visible | (cells >= self.cells_after(positions, level))

    def frontier(self, positions: Tensor, level: int) -> Tensor:
        """Return the cells of ``level + 1`` that the window cuts, some of whose children lie outside of it.

        Args:
            positions: Positions of queries ``[m]``.
            level: Level of the children.

        Returns:
            Indices of cells ``[m, 1]``, ``[m, 2]`` if bidirectional; -1 where there is none.
        """
        before = self.cells_before(positions, level + 1)
        has_children = self.cells_before(positions, level) > before * self.tree_factor
        left = torch.where(has_children, before, -1)
        if self.causal:
            return left.unsqueeze(-1)
        after = self.cells_after(positions, level + 1)
        has_children = self.cells_after(positions, level) < after * self.tree_factor
        # A cell that sticks out on both sides is one parent, of all children outside.
        right = torch.where(has_children & (after - 1 != left), after - 1, -1)
        return torch.stack([left, right], dim=-1)
