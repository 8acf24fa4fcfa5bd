"""The tokens of past blocks that a stream may still read one by one, at most a given number of them.

Caches are dicts of tensors that calls do not change. Every sequence of a batch has a cache of its own: which blocks are
worth keeping differs.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from danon_lightning.attention.core import State

__all__ = ["Eviction", "add_block", "available_blocks", "empty_cache", "extend_cache", "record_selection"]

Eviction: TypeAlias = Literal["lru", "fifo", "lfu"]


def empty_cache(
    batch_size: int, kv_heads: int, block_size: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
) -> State:
    """Return a cache without blocks.

    Returns:
        Rotated ``keys`` and ``values`` ``[b, G, u, S, d]``, ``real`` ``[b, u, S]`` telling tokens from padding, the
        index of each block ``blocks`` ``[b, u]``, and ``use`` ``[b, u]``: the block that last selected it (lru), or how
        often it was selected (lfu).
    """
    nothing = torch.empty(batch_size, kv_heads, 0, block_size, head_dim, device=device, dtype=dtype)
    indices = torch.empty(batch_size, 0, device=device, dtype=torch.long)
    real = torch.empty(batch_size, 0, block_size, device=device, dtype=torch.bool)
    return {"keys": nothing, "values": nothing, "real": real, "blocks": indices, "use": indices}


def extend_cache(cache: State, keys: Tensor, values: Tensor, real: Tensor, first: int, use: int = 0) -> State:
    """Return the cache with blocks appended.

    Args:
        cache: The cache.
        keys: Rotated ``[b, G, m, S, d]``.
        values: ``[b, G, m, S, d]``.
        real: ``[b, m, S]``.
        first: Index of the first of the blocks.
        use: What their ``use`` is.
    """
    batch, count = keys.shape[0], keys.shape[2]
    indices = torch.arange(first, first + count, device=keys.device).expand(batch, -1)
    return {
        "keys": torch.cat([cache["keys"].to(keys.dtype), keys], dim=2),
        "values": torch.cat([cache["values"].to(values.dtype), values], dim=2),
        "real": torch.cat([cache["real"], real], dim=1),
        "blocks": torch.cat([cache["blocks"], indices], dim=1),
        "use": torch.cat([cache["use"], torch.full_like(indices, use)], dim=1),
    }


def add_block(
    cache: State,
    keys: Tensor,
    values: Tensor,
    real: Tensor,
    block: int,
    *,
    own_block: int,
    first_block: int,
    capacity: int,
    eviction: Eviction,
) -> State:
    """Return the cache with one more block, if need be in the place of another.

    Args:
        cache: The cache.
        keys: Rotated ``[b, G, 1, S, d]``.
        values: ``[b, G, 1, S, d]``.
        real: ``[b, 1, S]``.
        block: Index of the block.
        own_block: The block that the stream has come to.
        first_block: The first block that may still be selected.
        capacity: Blocks that the cache may hold.
        eviction: Which block goes, if all may still be selected: the one that was selected least recently (lru; a new
            one counts as selected), least often (lfu), of equal ones the oldest; or the oldest (fifo).
    """
    if capacity == 0:
        return cache
    use = own_block if eviction == "lru" else 0
    if cache["blocks"].shape[1] < capacity:
        return extend_cache(cache, keys, values, real, block, use)
    worth = cache["blocks"] if eviction == "fifo" else cache["use"] * (block + 1) + cache["blocks"]
    worth = worth.masked_fill(cache["blocks"] < first_block, -1)
    slots = torch.arange(capacity, device=keys.device)
    goes = slots == worth.argmin(dim=1, keepdim=True)  # [b, u]
    wide = goes[:, None, :, None, None]
    return {
        "keys": torch.where(wide, keys, cache["keys"].to(keys.dtype)),
        "values": torch.where(wide, values, cache["values"].to(values.dtype)),
        "real": torch.where(goes.unsqueeze(-1), real, cache["real"]),
        "blocks": cache["blocks"].masked_fill(goes, block),
        "use": cache["use"].masked_fill(goes, use),
    }


def available_blocks(cache: State, first: int, count: int) -> Tensor:
    """Return where each of ``count`` blocks, from ``first`` on, lies in the cache, -1 for those that are gone.

    Returns:
        ``[b, count]``.
    """
    blocks = cache["blocks"] - first
    places = torch.full((blocks.shape[0], count + 1), -1, device=blocks.device)
    # Earlier ones in a column more.
    blocks = blocks.masked_fill(blocks < 0, count)
    return places.scatter(1, blocks, torch.arange(blocks.shape[1], device=blocks.device).expand_as(blocks))[:, :count]


def record_selection(cache: State, selected: Tensor, own_block: int, eviction: Eviction) -> State:
    """Return the cache with what queries of a block selected noted.

    Args:
        cache: The cache.
        selected: Indices of blocks ``[b, ...]``, -1 for none.
        own_block: The block of the queries.
        eviction: What is noted.
    """
    if eviction == "fifo" or selected.numel() == 0 or cache["blocks"].shape[1] == 0:
        return cache
    hits = (selected.flatten(1).unsqueeze(-1) == cache["blocks"].unsqueeze(1)).sum(dim=1)
    use = torch.where(hits > 0, own_block, cache["use"]) if eviction == "lru" else cache["use"] + hits
    return {**cache, "use": use}
