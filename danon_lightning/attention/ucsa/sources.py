"""What the queries of a stretch of tokens may read, laid out by rows: the key/value heads of all sequences."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.core import map_state
from danon_lightning.attention.merging import MASKED
from danon_lightning.attention.ucsa.cells import Cells

__all__ = ["CELLS_ABREAST", "Level", "Sources", "level_of"]

# Of so many cells a row of logits is whole vectors of a processor, which are worked on in a fraction of the time.
CELLS_ABREAST = 16


class Level(NamedTuple):
    """Cells of one level, c of them; below the top a multiple of r.

    Attributes:
        keys: Rotated summaries ``[N, c, d]``.
        values: ``[N, c, d]``.
        log_mass: Logarithm of the number of real tokens ``[N, c]``, ``MASKED`` for cells without any.
        bounds: The largest and the smallest value of each channel side by side ``[N, c, 2d]``.
        bias: Added to the score in the selection ``[N, R or 1, c]``, or ``None``.
        expandable: Which cells may be expanded ``[N, c]``, boolean; ``None`` if all that are visible may.
        judges: Below the top, what the bound queries of all that chose the parent are multiplied with: bounds of its
            children, then keys, twice side by side ``[N, c / r, 2r, 2d]``; see ``with_judges``.
        first: Index of the first of the cells, a multiple of r below the top, where it may be other than 0.
    """

    keys: Tensor
    values: Tensor
    log_mass: Tensor
    bounds: Tensor
    bias: Tensor | None
    expandable: Tensor | None
    judges: Tensor | None = None
    first: int = 0

    def with_judges(self, factor: int) -> "Level":
        """Return the level with ``judges``: bounds and logits of the children of a cell in one product."""
        keys = torch.cat([self.keys, self.keys], dim=-1)
        judges = torch.cat([x.unflatten(1, (-1, factor)) for x in (self.bounds, keys)], dim=2)
        return self._replace(judges=judges)


class Sources(NamedTuple):
    """Sets of keys and values; masks tell what is hidden and are ``None`` where nothing is.

    Attributes:
        sink_keys: Rotated ``[N, g, d]``, like all keys.
        sink_values: ``[N, g, d]``.
        sink_hidden: ``[N, g]``.
        window_keys: Neighbouring blocks that all windows lie in ``[N, w, S, d]``.
        window_values: ``[N, w, S, d]``.
        window_hidden: ``[N, w, S]``.
        window_first: Index of the first of these blocks.
        block_keys: Blocks that may be expanded ``[N, u, S, d]``.
        block_values: ``[N, u, S, d]``.
        block_hidden: ``[N, u, S]``.
        slots: Where each block lies among these ``[N, blocks]``, -1 for those that are gone; ``None``: in order.
        levels: Blocks as cells, and the levels above.
    """

    sink_keys: Tensor
    sink_values: Tensor
    sink_hidden: Tensor | None
    window_keys: Tensor
    window_values: Tensor
    window_hidden: Tensor | None
    window_first: int
    block_keys: Tensor
    block_values: Tensor
    block_hidden: Tensor | None
    slots: Tensor | None
    levels: tuple[Level, ...]

    def rows(self, start: int, stop: int) -> "Sources":
        """Return some of the rows."""
        sources: Sources = map_state(lambda x: x[start:stop], self)
        return sources

    def with_judges(self, factor: int) -> "Sources":
        """Return the same with the ``judges`` of all levels below the top."""
        *below, top = self.levels
        return self._replace(levels=(*(level.with_judges(factor) for level in below), top))

    def differentiable(self) -> list[Tensor]:
        """Return what gradients flow to."""
        found = [self.sink_keys, self.sink_values, self.window_keys, self.window_values]
        found += [self.block_keys, self.block_values]
        return found + [x for level in self.levels for x in (level.keys, level.values)]

    def with_differentiable(self, tensors: Sequence[Tensor]) -> "Sources":
        """Return the same with other tensors in place of those of ``differentiable``."""
        sink_keys, sink_values, window_keys, window_values, block_keys, block_values, *cells = tensors
        levels = (x._replace(keys=cells[2 * i], values=cells[2 * i + 1]) for i, x in enumerate(self.levels))
        return self._replace(
            sink_keys=sink_keys,
            sink_values=sink_values,
            window_keys=window_keys,
            window_values=window_values,
            block_keys=block_keys,
            block_values=block_values,
            levels=tuple(levels),
        )


def level_of(cells: Cells, groups: int, multiple: int, *, causal: bool) -> Level:
    """Lay cells out by rows.

    Args:
        cells: Cells of one level, of G heads.
        groups: Number of key/value heads G.
        multiple: The number of cells is filled up to a multiple of this.
        causal: Whether queries see the past only, and so nothing of what fills up.
    """
    batch, count = cells.keys.shape[0], cells.keys.shape[-2]
    missing = -count % multiple
    bias, expandable = cells.bias, cells.expandable
    if bias is not None:
        bias = F.pad(bias.unflatten(1, (groups, -1)).flatten(0, 1), (0, missing))
    if expandable is not None:
        expandable = F.pad(expandable.expand(batch, groups, -1).flatten(0, 1), (0, missing))
    elif missing and not causal:
        # What fills up is no cell.
        expandable = torch.arange(count + missing, device=cells.keys.device).expand(batch * groups, -1) < count
    log_mass = cells.log_mass.unsqueeze(1).expand(batch, groups, -1).flatten(0, 1)
    return Level(
        F.pad(cells.keys.flatten(0, 1), (0, 0, 0, missing)),
        F.pad(cells.values.flatten(0, 1), (0, 0, 0, missing)),
        F.pad(log_mass, (0, missing), value=MASKED),
        F.pad(torch.cat([cells.upper, cells.lower], dim=-1).flatten(0, 1), (0, 0, 0, missing)),
        bias,
        expandable,
    )
