"""UCSA chunk by chunk.

The state keeps the sinks, the tokens of the window, the summaries and bounds of all complete blocks and of the cells
above them, and the tokens of past blocks: all of them, or as many as a cache holds. A block that was evicted from the
cache is still read as a summary, and never expanded. Nor is what lies beyond the reach of the tree, if that is limited:
there cells are merged again and again, so that the state grows with the logarithm of the length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.checks import check_rotation
from danon_lightning.attention.core import State
from danon_lightning.attention.rotary import apply_rotary, cell_positions
from danon_lightning.attention.ucsa.arguments import check_tensors
from danon_lightning.attention.ucsa.cache import (
    Eviction,
    add_block,
    available_blocks,
    empty_cache,
    extend_cache,
    record_selection,
)
from danon_lightning.attention.ucsa.layout import Layout
from danon_lightning.attention.ucsa.merged import first_cell, merge_oldest, merged_cells
from danon_lightning.attention.ucsa.sources import Sources
from danon_lightning.attention.ucsa.sparse import sparse_attention
from danon_lightning.attention.ucsa.tree import grow_tree, lay_out_tree

__all__ = ["CacheHits", "empty_state", "stream_chunk"]


@dataclass
class CacheHits:
    """How many of the blocks that queries would select, had none been evicted, were still held.

    Attributes:
        held: Number of selections of blocks that were held, a scalar.
        total: Number of all selections, a scalar.
    """

    held: Tensor | int = 0
    total: Tensor | int = 0

    @property
    def rate(self) -> Tensor:
        """The share of those held, a scalar."""
        return torch.as_tensor(self.held / self.total)

    def count(self, blocks: Tensor, slots: Tensor) -> None:
        """Add selections.

        Args:
            blocks: What queries would select ``[N, R, n, k]``, -1 for none.
            slots: Where each block lies in the cache ``[N, blocks]``, -1 for those that are gone.
        """
        if slots.shape[1] == 0:
            return
        places = slots.gather(1, blocks.long().clamp(min=0).flatten(1)).view_as(blocks)
        self.held = self.held + ((blocks >= 0) & (places >= 0)).sum()
        self.total = self.total + (blocks >= 0).sum()


def empty_state(
    batch_size: int,
    kv_heads: int,
    head_dim: int,
    *,
    block_size: int,
    tree_levels: int = 1,
    device: torch.device,
    dtype: torch.dtype,
) -> State:
    """Return the state before the first token.

    Args:
        batch_size: Number of sequences b.
        kv_heads: Key and value heads G.
        head_dim: Head width d.
        block_size: Tokens S in a block.
        tree_levels: Levels T of cells.
        device: Where the state lives.
        dtype: Dtype of keys and values; later states take on that of the newest chunk.

    Returns:
        ``position``, the number of tokens seen; ``padded``, whether a mask was ever given; the ``sinks`` (keys rotated)
        and the ``window`` (not rotated), with ``keys`` and ``values`` ``[b, G, m, d]`` and ``real`` ``[b, m]``;
        ``cells``, for each level what the fields of ``Cells`` are; the ``cache``, see ``empty_cache``; ``outgrown``,
        how many cells the uppermost level has no more; and ``merged``, what they have become: for each level above it
        the index of the ``first`` cell, and the ``keys`` (not rotated), ``values`` and ``log_mass`` of all.
    """
    nothing = torch.empty(batch_size, kv_heads, 0, head_dim, device=device, dtype=dtype)
    real = torch.empty(batch_size, 0, device=device, dtype=torch.bool)
    tokens = {"keys": nothing, "values": nothing, "real": real}
    cells: State = {name: nothing for name in ("means", "keys", "values", "upper", "lower")}
    cells["log_mass"] = torch.empty(batch_size, 0, device=device, dtype=torch.promote_types(dtype, torch.float32))
    cells["bias"] = None
    cells["expandable"] = torch.empty(batch_size, kv_heads, 0, device=device, dtype=torch.bool)
    return {
        "position": 0,
        "padded": False,
        "sinks": dict(tokens),
        "window": dict(tokens),
        "cells": [dict(cells) for _ in range(tree_levels)],
        "cache": empty_cache(batch_size, kv_heads, block_size, head_dim, device=device, dtype=dtype),
        "outgrown": 0,
        "merged": [],
    }


def stream_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    block_size: int,
    num_selected: int,
    window_blocks: int,
    num_sinks: int,
    tree_levels: int = 1,
    tree_factor: int = 16,
    rope_base: float | None = 10000.0,
    key_padding_mask: Tensor | None = None,
    error_tolerance: float = 0.0,
    selection_bias: Callable[[Tensor], Tensor] | None = None,
    max_cache_size: int | None = None,
    eviction: Eviction = "lru",
    reach: int | None = None,
    dropout_p: float = 0.0,
    hits: CacheHits | None = None,
) -> tuple[Tensor, State]:
    """Attend to what the state holds and to the chunk itself, causally.

    With an unbounded cache the result equals the matching rows of ``ucsa_attention`` over the whole sequence. With a
    bounded one it equals the same softmax in which blocks that were evicted are not expanded; with a limited reach, one
    in which cells beyond it are replaced by those that they were merged in. When the stream comes to a new block, the
    oldest block of the window goes to the cache, and what the queries before have selected decides which other one it
    replaces. So neither result depends on how the sequence is cut in chunks.

    Args:
        q: Queries of the chunk ``[b, H, n, d]``; the other tensors likewise cover the chunk only, and are otherwise as
            in ``ucsa_attention``.
        k: Keys ``[b, G, n, d]``.
        v: Values ``[b, G, n, d]``.
        state: From ``empty_state`` or an earlier call; not changed.
        block_size: Tokens S in a block, the same in all calls, like all settings.
        num_selected: Cells k that a query expands at each level.
        window_blocks: Blocks before the own one in the window.
        num_sinks: Tokens at the start that every query reads.
        tree_levels: Levels T of cells.
        tree_factor: Cells r of one level that a cell of the next one holds.
        rope_base: Base of the rotary embedding; ``None`` means no rotation.
        key_padding_mask: True for real tokens ``[b, n]``, boolean.
        error_tolerance: Blocks with a smaller error are not expanded.
        selection_bias: Makes what is added to the scores of blocks of their errors ``[b, G, blocks]``; it is called
            once for every block, with one or several blocks at a time.
        max_cache_size: Most tokens of past blocks, beyond sinks and window, that are kept; whole blocks count. ``None``
            keeps all.
        eviction: Which block goes when the cache is full: that selected least recently by any query (``"lru"``), the
            oldest (``"fifo"``) or that selected least often (``"lfu"``).
        reach: Most cells of the uppermost level that lie before the window, at least ``tree_factor`` - 1. Beyond it the
            oldest r = ``tree_factor`` are merged in one, r of those again when there are more than 2r, and so on; they
            are read as summaries. ``None``: there is no limit.
        dropout_p: Probability of dropping an attention weight.
        hits: If given, what a bounded cache still holds of what queries would select is added to it.

    Returns:
        The output ``[b, H, n, d]`` and the new state.

    Raises:
        ValueError: If shapes do not fit each other or a setting is out of range.
    """
    layout = Layout(block_size, num_selected, window_blocks, num_sinks, tree_levels, tree_factor)
    if isinstance(selection_bias, Tensor):
        raise ValueError("selection_bias is a tensor; a stream needs a function that makes it of the errors of blocks")
    check_tensors(q, k, v, 0, key_padding_mask=key_padding_mask, selection_bias=None, error_tolerance=error_tolerance)
    check_rotation(q, rope_base)
    if max_cache_size is not None and max_cache_size < 0:
        raise ValueError(f"max_cache_size={max_cache_size} must be at least 0, or None for a cache without bounds")
    if eviction not in get_args(Eviction):
        raise ValueError(f"eviction={eviction!r} must be one of {', '.join(get_args(Eviction))}")
    if reach is not None and reach < tree_factor - 1:
        raise ValueError(f"reach={reach} must be at least tree_factor - 1, {tree_factor - 1}, or None for no limit")
    start, stop = state["position"], state["position"] + q.shape[-2]
    real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    if key_padding_mask is not None:
        real, state = key_padding_mask, {**state, "padded": True}
    borders = [start, stop]
    if max_cache_size is not None or reach is not None:
        # What may be expanded, and what is merged, changes when the stream comes to another block.
        first = num_sinks if start < num_sinks else start + block_size - (start - num_sinks) % block_size
        borders = [start, *range(first, stop, block_size), stop]
    settings = (layout, rope_base, error_tolerance, selection_bias, max_cache_size, eviction, reach, dropout_p, hits)
    outputs = []
    for begin, end in zip(borders, borders[1:], strict=False):
        here = slice(begin - start, end - start)
        output, state = _step(q[:, :, here], k[:, :, here], v[:, :, here].to(k.dtype), real[:, here], state, *settings)
        outputs.append(output.to(v.dtype))
    # Copies, so that the state does not keep chunks alive.
    for name in ("sinks", "window"):
        state[name] = {key: x.clone() for key, x in state[name].items()}
    return torch.cat(outputs, dim=2), state


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor,
    state: State,
    layout: Layout,
    rope_base: float | None,
    error_tolerance: float,
    selection_bias: Callable[[Tensor], Tensor] | None,
    max_cache_size: int | None,
    eviction: Eviction,
    reach: int | None,
    dropout_p: float,
    hits: CacheHits | None,
) -> tuple[Tensor, State]:
    """Attend with tokens between which nothing is evicted or merged."""
    batch, heads, length, width = q.shape
    groups, size, start = k.shape[1], layout.block_size, state["position"]
    positions = cell_positions(start, length, 1, q.device)
    own = layout.own_block(start + length - 1)
    sinks = max(0, min(layout.num_sinks - start, length))
    rotated = apply_rotary(k[:, :, :sinks], positions[:sinks], rope_base)
    state = {
        **state,
        "position": start + length,
        "sinks": _append(state["sinks"], rotated, v[:, :, :sinks], real[:, :sinks]),
        "window": _append(state["window"], k[:, :, sinks:], v[:, :, sinks:], real[:, sinks:]),
    }
    window = state["window"]
    # The window still begins where that of the query before did.
    first = max(0, layout.own_block(max(0, start - 1)) - layout.window_blocks)
    place = cell_positions(0, window["keys"].shape[2], 1, q.device) + (layout.num_sinks + first * size)
    window_keys = apply_rotary(window["keys"], place, rope_base)
    state["cells"] = grow_tree(state, window_keys, first, layout, rope_base, error_tolerance, selection_bias)
    if reach is not None:
        outside = layout.blocks_outside(state["position"]) // layout.tree_factor ** (layout.tree_levels - 1)
        state = merge_oldest(state, outside, reach, layout)

    # Blocks of S, the last one filled up with what no query comes to see.
    missing = -window_keys.shape[2] % size
    keys, values = (F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, size)) for x in (window_keys, window["values"]))
    mask = F.pad(window["real"], (0, missing)).unflatten(1, (-1, size))
    leaving = max(0, own - layout.window_blocks - first)
    slots = None
    if leaving > 0:
        blocks = keys[:, :, :leaving], values[:, :, :leaving], mask[:, :leaving]
        if max_cache_size is None:
            state["cache"] = extend_cache(state["cache"], *blocks, first)
        else:
            capacity = max_cache_size // size
            state["cache"] = add_block(
                state["cache"],
                *blocks,
                first,
                own_block=own,
                first_block=first_cell(state, 0, layout),
                capacity=capacity,
                eviction=eviction,
            )
    cache = state["cache"]
    merged = merged_cells(state["merged"], layout, rope_base)
    # Merged cells take the places of the last that are no more.
    gone = (state["outgrown"] - (merged.num_cells if merged else 0)) * layout.tree_factor ** (layout.tree_levels - 1)
    is_bounded = max_cache_size is not None
    levels = lay_out_tree(state, merged, layout, groups, bounded=is_bounded)
    if is_bounded or gone:
        count = first_cell(state, 0, layout) + state["cells"][0]["log_mass"].shape[1] - gone
        slots = available_blocks(cache, gone, count).repeat_interleave(groups, dim=0)

    def hidden(x: Tensor) -> Tensor | None:
        return ~x.repeat_interleave(groups, dim=0) if state["padded"] else None

    sources = Sources(
        state["sinks"]["keys"].flatten(0, 1),
        state["sinks"]["values"].flatten(0, 1),
        hidden(state["sinks"]["real"]),
        keys.flatten(0, 1).contiguous(),
        values.flatten(0, 1).contiguous(),
        hidden(mask),
        first - gone,
        cache["keys"].to(k.dtype).flatten(0, 1),
        cache["values"].to(v.dtype).flatten(0, 1),
        hidden(cache["real"]),
        slots,
        levels,
    )
    query = apply_rotary(q, positions, rope_base).mul(width**-0.5).unflatten(1, (groups, -1)).flatten(0, 1)
    start -= gone * size
    attended = sparse_attention(query, sources, layout, start=start, dropout_p=dropout_p)
    if hits is not None and slots is not None:
        everything = sources._replace(levels=lay_out_tree(state, merged, layout, groups, bounded=False))
        hits.count(sparse_attention(query, everything, layout, start=start).blocks, slots)
    if is_bounded:
        selected = torch.where(attended.blocks < 0, -1, attended.blocks + gone).unflatten(0, (batch, groups))
        state["cache"] = record_selection(cache, selected, own, eviction)
    # The next query still has this block, or one after it, in its window.
    state["window"] = {
        name: x[..., leaving * size :, :] if x.dim() == 4 else x[:, leaving * size :] for name, x in window.items()
    }
    return attended.output.unflatten(0, (batch, groups)).flatten(1, 2), state


def _append(tokens: State, keys: Tensor, values: Tensor, real: Tensor) -> State:
    """Return tokens followed by others, in the dtype of the latter."""
    return {
        "keys": torch.cat([tokens["keys"].to(keys.dtype), keys], dim=2),
        "values": torch.cat([tokens["values"].to(values.dtype), values], dim=2),
        "real": torch.cat([tokens["real"], real], dim=1),
    }
