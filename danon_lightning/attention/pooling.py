"""The pyramid of summaries: every level pools a fixed number of neighbouring cells of the level below.

Cells remember how many real tokens they stand for. The logarithm of that mass, added to a cell's attention logit, makes
a cell of m equal tokens weigh exactly as much as the m tokens would.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.merging import MASKED
from danon_lightning.attention.recompute import is_traced

__all__ = ["Cells", "build_pyramid", "pool_cells", "token_cells"]

# Few enough for what is computed of them to stay in the cache of a processor core, and in memory that is used again.
CELLS_AT_ONCE = 4096
# In which dimension of keys, values and masses the cells follow one another.
CELL_DIMS = (2, 2, 1)


class Cells(NamedTuple):
    """Consecutive cells of one level.

    Attributes:
        keys: Summary keys, not rotated ``[b, G, m, d]``.
        values: Summary values ``[b, G, m, d]``.
        log_mass: Logarithm of the number of real tokens in each cell ``[b, m]``, or ``[1, m]`` when no sequence is
            padded; ``MASKED`` for empty cells. float32 or float64.
    """

    keys: Tensor
    values: Tensor
    log_mass: Tensor

    @property
    def num_cells(self) -> int:
        """Number of cells m."""
        return self.keys.shape[-2]

    def slice(self, start: int, stop: int) -> "Cells":
        """Return the cells from ``start`` up to, but not including, ``stop``."""
        return Cells(self.keys[..., start:stop, :], self.values[..., start:stop, :], self.log_mass[..., start:stop])

    def for_heads(self, heads: int) -> "Cells":
        """Return the cells with keys and values repeated for ``heads`` query heads, a multiple of G."""
        repeats = heads // self.keys.shape[1]
        if repeats == 1:
            return self
        return self._replace(
            keys=self.keys.repeat_interleave(repeats, dim=1), values=self.values.repeat_interleave(repeats, dim=1)
        )


def token_cells(keys: Tensor, values: Tensor, key_padding_mask: Tensor | None) -> Cells:
    """Return the lowest level, where every cell is one token.

    Args:
        keys: Keys ``[b, G, n, d]``.
        values: Values ``[b, G, n, d]``.
        key_padding_mask: True for real tokens ``[b, n]``, boolean; ``None`` means that all are.
    """
    dtype = torch.promote_types(keys.dtype, torch.float32)
    if key_padding_mask is None:
        return Cells(keys, values, torch.zeros(1, keys.shape[-2], dtype=dtype, device=keys.device))
    log_mass = torch.zeros(key_padding_mask.shape, dtype=dtype, device=keys.device)
    return Cells(keys, values, log_mass.masked_fill(~key_padding_mask, MASKED))


def pool_cells(
    cells: Cells,
    pool_factor: int,
    *,
    pool_query: Tensor | None = None,
    key_map: Tensor | None = None,
    value_map: Tensor | None = None,
) -> Cells:
    """Summarise every ``pool_factor`` neighbouring cells in one; a last incomplete group gives a cell too.

    The children are averaged with weights softmax(k · u + log mass): by mass alone while u is zero.

    Args:
        cells: The level below, m cells.
        pool_factor: Children a cell has.
        pool_query: Direction u that decides which children count more ``[G, d]``; ``None`` means zero.
        key_map: Linear map of the pooled keys ``[G, d, d]``; ``None`` means identity.
        value_map: Linear map of the pooled values ``[G, d, d]``; ``None`` means identity.

    Returns:
        ``ceil(m / pool_factor)`` cells.
    """
    at_once = pool_factor * max(1, CELLS_AT_ONCE // pool_factor)
    if cells.num_cells <= at_once or cells.keys.device.type != "cpu" or is_traced(cells.keys):
        return _pooled(cells, pool_factor, pool_query, key_map, value_map)
    # Splits and not slices: each of many slices would fill up its gradient with zeros to the whole length.
    splits = (x.split(at_once, dim=dim) for x, dim in zip(cells, CELL_DIMS, strict=True))
    pooled = (
        _pooled(Cells(*piece), pool_factor, pool_query, key_map, value_map) for piece in zip(*splits, strict=True)
    )
    if torch.is_grad_enabled():
        parts = zip(*pooled, strict=True)
        return Cells(*(torch.cat(part, dim=dim) for part, dim in zip(parts, CELL_DIMS, strict=True)))
    return _written_together(pooled, -(-cells.num_cells // pool_factor))


def _written_together(pieces: Iterable[Cells], num_cells: int) -> Cells:
    """Return consecutive cells as one: each piece is in the way of the next one only until it is written."""
    total, start = None, 0
    for piece in pieces:
        if total is None:
            total = Cells(
                *(
                    x.new_empty(*x.shape[:dim], num_cells, *x.shape[dim + 1 :])
                    for x, dim in zip(piece, CELL_DIMS, strict=True)
                )
            )
        for part, x in zip(total.slice(start, start + piece.num_cells), piece, strict=True):
            part.copy_(x)
        start += piece.num_cells
    assert total is not None
    return total


def _pooled(
    cells: Cells, pool_factor: int, pool_query: Tensor | None, key_map: Tensor | None, value_map: Tensor | None
) -> Cells:
    num_parents = -(-cells.num_cells // pool_factor)
    missing = num_parents * pool_factor - cells.num_cells
    keys, values = (F.pad(x, (0, 0, 0, missing)) if missing else x for x in cells[:2])
    log_mass = F.pad(cells.log_mass, (0, missing), value=MASKED) if missing else cells.log_mass
    # [b, G, m/r, r, d] and [b, m/r, r]
    children_keys, children_values = (x.unflatten(-2, (num_parents, pool_factor)) for x in (keys, values))
    children_mass = log_mass.unflatten(-1, (num_parents, pool_factor))
    scores = children_mass.unsqueeze(1)
    if pool_query is not None:
        scores = scores + (children_keys * pool_query[:, None, None, :]).sum(dim=-1)
    weights = torch.softmax(scores, dim=-1).unsqueeze(-1).to(values.dtype)
    pooled_keys, pooled_values = (weights * children_keys).sum(dim=-2), (weights * children_values).sum(dim=-2)
    if key_map is not None:
        pooled_keys = pooled_keys @ key_map.transpose(-1, -2)
    if value_map is not None:
        pooled_values = pooled_values @ value_map.transpose(-1, -2)
    # An empty cell gets MASKED + log(children), which rounds to MASKED or stays as far out of reach.
    return Cells(pooled_keys, pooled_values, torch.logsumexp(children_mass, dim=-1))


def build_pyramid(
    tokens: Cells,
    pool_factor: int,
    num_levels: int,
    *,
    pool_query: Tensor | None = None,
    key_maps: Tensor | None = None,
    value_maps: Tensor | None = None,
) -> list[Cells]:
    """Return ``num_levels`` levels, the tokens first.

    Args:
        tokens: The lowest level, as ``token_cells`` makes it.
        pool_factor: Cells of one level that a cell of the next one summarises.
        num_levels: Number of levels L, the tokens included.
        pool_query: As in ``pool_cells``, shared by all levels.
        key_maps: One map of the keys for every level above the tokens ``[at least L - 1, G, d, d]``.
        value_maps: The same for the values.
    """
    levels = [tokens]
    for level in range(num_levels - 1):
        levels.append(
            pool_cells(
                levels[-1],
                pool_factor,
                pool_query=pool_query,
                key_map=None if key_maps is None else key_maps[level],
                value_map=None if value_maps is None else value_maps[level],
            )
        )
    return levels
