"""What a stream has left behind so far that the tree no longer reaches it.

The uppermost level of the tree holds a limited number of cells. Beyond it the oldest r of them become one cell of a
level above, the oldest cells of that level one of the next, and so on: the older, the coarser, and O(log n) of them in
all. They stay in the softmax as summaries, and are never expanded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from danon_lightning.attention.core import State
from danon_lightning.attention.pooling import Cells as Summaries
from danon_lightning.attention.pooling import pool_cells
from danon_lightning.attention.ucsa.cells import rotate_centres
from danon_lightning.attention.ucsa.layout import Layout

__all__ = ["count_merged", "first_cell", "merge_oldest", "merged_cells"]


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
    known: Sequence[State | None] = [*state["merged"], None]
    for old in known:
        if leaving.num_cells == 0:
            merged += [] if old is None else [old]
            continue
        new = pool_cells(leaving, factor)
        old = {"first": 0, **new.slice(0, 0)._asdict()} if old is None else old
        cells = Summaries(
            torch.cat([old["keys"].to(new.keys.dtype), new.keys], dim=2),
            torch.cat([old["values"].to(new.values.dtype), new.values], dim=2),
            torch.cat([old["log_mass"], new.log_mass], dim=1),
        )
        count = count_merged(old["first"] + cells.num_cells, 2 * factor, factor) - old["first"]
        leaving, staying = cells.slice(0, count), cells.slice(count, cells.num_cells)
        merged.append({"first": old["first"] + count, **{name: x.clone() for name, x in staying._asdict().items()}})
    return {**state, "cells": tree, "merged": merged, "outgrown": outgrown}


def merged_cells(merged: list[State], layout: Layout, rope_base: float | None) -> Summaries | None:
    """Return all merged cells, the oldest first, their keys rotated at their centres; ``None`` if there are none."""
    if not merged:
        return None
    rotated = [
        rotate_centres(cells["keys"], cells["first"], layout.tree_levels + above, layout, rope_base)
        for above, cells in enumerate(merged)
    ]
    return Summaries(
        torch.cat(rotated[::-1], dim=2),
        torch.cat([cells["values"] for cells in merged[::-1]], dim=2),
        torch.cat([cells["log_mass"] for cells in merged[::-1]], dim=1),
    )


def first_cell(state: State, level: int, layout: Layout) -> int:
    """Return the index of the first cell of a level that has not been merged."""
    outgrown: int = state["outgrown"]
    return outgrown * layout.tree_factor ** (layout.tree_levels - 1 - level)


def _without(x: Any, count: int) -> Any:
    """Return a copy of what a level knows of its cells, without the first of them."""
    if not isinstance(x, Tensor):
        return x
    return (x[:, count:] if x.dim() == 2 else x[:, :, count:]).clone()
