"""The tree of cells of a stream: how it grows, and what of it queries may read."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from danon_lightning.attention.core import State
from danon_lightning.attention.pooling import Cells as Summaries
from danon_lightning.attention.ucsa.cache import available_blocks
from danon_lightning.attention.ucsa.cells import Cells, block_cells, parent_cells
from danon_lightning.attention.ucsa.layout import Layout
from danon_lightning.attention.ucsa.merged import first_cell
from danon_lightning.attention.ucsa.sources import Level, level_of

__all__ = ["grow_tree", "lay_out_tree"]


def grow_tree(
    state: State,
    window_keys: Tensor,
    first: int,
    layout: Layout,
    rope_base: float | None,
    error_tolerance: float,
    selection_bias: Callable[[Tensor], Tensor] | None,
) -> list[State]:
    """Return the cells, those that have become complete included.

    Args:
        state: The state, its window holding all tokens from block ``first`` on.
        window_keys: The keys of the window, rotated.
        first: Index of the first block in the window.
        layout: Where cells lie.
        rope_base: Base of the rotary embedding.
        error_tolerance: As in ``stream_chunk``.
        selection_bias: As in ``stream_chunk``.
    """
    levels: list[State] = list(state["cells"])
    done = first_cell(state, 0, layout) + levels[0]["log_mass"].shape[1]
    total = max(0, state["position"] - layout.num_sinks) // layout.block_size
    if total == done:
        return levels
    tokens = slice((done - first) * layout.block_size, (total - first) * layout.block_size)
    window = state["window"]
    new = block_cells(
        window["keys"][:, :, tokens],
        window_keys[:, :, tokens],
        window["values"][:, :, tokens],
        window["real"][:, tokens] if state["padded"] else None,
        first=done,
        layout=layout,
        rope_base=rope_base,
        error_tolerance=error_tolerance,
        selection_bias=selection_bias,
    )
    for level in range(layout.tree_levels):
        cells = _append_cells(levels[level], new)
        above = levels[level + 1]["log_mass"].shape[1] if level + 1 < layout.tree_levels else 0
        count, means = cells["log_mass"].shape[1], cells["means"]
        parents = count // layout.tree_factor
        # Means are only kept of cells that wait for their siblings: at the top, all of them do.
        waiting = count - parents * layout.tree_factor if level + 1 < layout.tree_levels else count
        cells["means"] = means[:, :, means.shape[2] - waiting :].clone()
        levels[level] = cells
        if level + 1 == layout.tree_levels or parents == above:
            break
        children = slice(above * layout.tree_factor, parents * layout.tree_factor)
        new = parent_cells(
            Cells(
                means[:, :, : children.stop - children.start],
                cells["keys"][:, :, children],
                cells["values"][:, :, children],
                cells["log_mass"][:, children],
                cells["upper"][:, :, children],
                cells["lower"][:, :, children],
                None if cells["bias"] is None else cells["bias"][:, :, children],
                cells["expandable"][:, :, children],
            ),
            first=first_cell(state, level + 1, layout) + above,
            level=level + 1,
            layout=layout,
            rope_base=rope_base,
        )
    return levels


def _append_cells(cells: State, new: Cells) -> State:
    """Return cells followed by others, in the dtype of the latter."""
    batch, groups, count = new.keys.shape[:3]
    expandable = torch.ones(1, 1, 1, dtype=torch.bool, device=new.keys.device)
    if new.expandable is not None:
        expandable = new.expandable
    appended: State = {
        name: torch.cat([cells[name].to(x.dtype), x], dim=2)
        for name, x in new._asdict().items()
        if name in ("means", "keys", "values", "upper", "lower")
    }
    log_mass = new.log_mass.expand(batch, -1)
    appended["log_mass"] = torch.cat([cells["log_mass"].to(log_mass.dtype), log_mass], dim=1)
    appended["expandable"] = torch.cat([cells["expandable"], expandable.expand(batch, groups, count)], dim=2)
    bias: Any = new.bias
    if bias is not None and cells["bias"] is not None:
        bias = torch.cat([cells["bias"].to(bias.dtype), bias], dim=2)
    appended["bias"] = bias
    return appended


def lay_out_tree(
    state: State, merged: Summaries | None, layout: Layout, groups: int, *, bounded: bool
) -> tuple[Level, ...]:
    """Lay cells out by rows, merged ones before those of the uppermost level.

    Args:
        state: The state.
        merged: Its merged cells, if there are any.
        layout: Where cells lie.
        groups: Key and value heads G.
        bounded: Whether blocks outside of the cache may not be expanded.
    """
    levels, top = [], layout.tree_levels - 1
    before = merged.num_cells if merged else 0
    expandable = state["cells"][0]["expandable"]
    if bounded:
        first = first_cell(state, 0, layout)
        expandable = expandable & (available_blocks(state["cache"], first, expandable.shape[2]) >= 0).unsqueeze(1)
    for level, fields in enumerate(state["cells"]):
        if level > 0 and bounded:
            # Cells that are not complete are not visible.
            count = fields["log_mass"].shape[1] * layout.tree_factor
            expandable = expandable[:, :, :count].unflatten(2, (-1, layout.tree_factor)).any(dim=-1)
        elif level > 0:
            expandable = fields["expandable"]
        # Means are only needed to grow.
        known = Cells(**{**fields, "means": fields["keys"], "expandable": expandable})
        if level == top:
            known = known if merged is None else _before(merged, known)
            levels.append(level_of(known, groups, 1, causal=True))
        else:
            first = before * layout.tree_factor ** (top - level)
            levels.append(level_of(known, groups, layout.tree_factor, causal=True)._replace(first=first))
    return tuple(levels)


def _before(merged: Summaries, cells: Cells) -> Cells:
    """Return cells that may not be expanded, followed by others."""
    nothing, bias = torch.zeros_like(merged.keys), cells.bias
    if bias is not None:
        bias = bias.new_zeros(*bias.shape[:2], merged.num_cells)
    expandable = torch.zeros_like(nothing[..., 0], dtype=torch.bool)
    older = Cells(merged.keys, merged.keys, merged.values, merged.log_mass, nothing, nothing, bias, expandable)
    return Cells(**_append_cells(older._asdict(), cells))
