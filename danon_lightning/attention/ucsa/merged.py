"""What a stream has left behind so far that the tree no longer reaches it.

The uppermost level of the tree holds a limited number of cells. Beyond it the oldest r of them become one cell of a
level above, the oldest cells of that level one of the next, and so on: the older, the coarser, and O(log n) of them in
all. They stay in the softmax as summaries, and are never expanded.
"""

from typing import Any

import torch
from torch import Tensor

from danon_lightning.attention.core import State
from danon_lightning.attention.pooling import Cells as Summaries
from danon_lightning.attention.pooling import pool_cells
from danon_lightning.attention.ucsa.cells import rotate_centres
from danon_lightning.attention.ucsa.layout import Layout

__all__ = ["count_merged", "merge_oldest", "merged_cells"]


def count_merged(cells: int, most: int, factor: int) -> int:
    """Return how many of so many cells, the oldest, are merged for at most ``most`` to be left.

    Args:
        cells: Cells of a level, those merged already included.
        most: At least ``factor`` - 1.
        factor: Cells r that become one.
    """
    return factor * max(0, -(-(cells - most) // factor))


def merge_oldest(state: State, outside: int, reach: int, layout: Layout) -> State:
    """Return the state with the oldest cells merged.

    Args:
        state: With all cells that are complete; not changed.
        outside: Cells of the uppermost level that lie before the window, those merged already included.
        reach: Most of these that stay in the tree; levels above it keep at most 2r cells each.
        layout: Where cells lie.
    """
    factor, outgrown = layout.tree_factor, count_merged(outside, reach, layout.tree_factor)
    count = outgrown - state["outgrown"]
    if count == 0:
        return state
    top = state["cells"][-1]
    leaving = Summaries(top["means"], top["values"], top["log_mass"]).slice(0, count)
    tree = []
    for level, fields in enumerate(state["cells"]):
        gone = count * factor ** (layout.tree_levels - 1 - level)
        # Below the top, means are those of the newest cells alone.
        tree.append({name: x if name == "means" else _without(x, gone) for name, x in fields.items()})
    tree[-1]["means"] = _without(top["means"], count)

    merged: list[State] = []
    for level in [*state["merged"], None]:
        if leaving.num_cells > 0:
            new = pool_cells(leaving, factor)
            level = level or {"first": 0, **new.slice(0, 0)._asdict()}
            cells = Summaries(
                torch.cat([level["keys"].to(new.keys.dtype), new.keys], dim=2),
                torch.cat([level["values"].to(new.values.dtype), new.values], dim=2),
                torch.cat([level["log_mass"], new.log_mass], dim=1),
            )
            count = count_merged(level["first"] + cells.num_cells, 2 * factor, factor) - level["first"]
            leaving, staying = cells.slice(0, count), cells.slice(count, cells.num_cells)
            level = {"first": level["first"] + count, **{name: x.clone() for name, x in staying._asdict().items()}}
        if level is not None:
            merged.append(level)
    return {**state, "cells": tree, "merged": merged, "outgrown": outgrown}


def merged_cells(merged: list[State], layout: Layout, rope_base: float | None) -> Summaries | None:
    """Return all merged cells, the oldest first, their keys rotated at their centres; ``None`` if there are none."""
    levels = []
    for above, cells in enumerate(merged):
        keys = rotate_centres(cells["keys"], cells["first"], layout.tree_levels + above, layout, rope_base)
        levels.append(Summaries(keys, cells["values"], cells["log_mass"]))
    if not levels:
        return None
    keys, values, masses = zip(*reversed(levels), strict=True)
    return Summaries(torch.cat(keys, dim=2), torch.cat(values, dim=2), torch.cat(masses, dim=1))


def _without(x: Any, count: int) -> Any:
    """Return a copy of what a level knows of its cells, without the first of them."""
    if not isinstance(x, Tensor):
        return x
    return (x[:, count:] if x.dim() == 2 else x[:, :, count:]).clone()
