"""MSRA chunk by chunk, with a state that grows with the logarithm of the sequence length.

At level l the state keeps the cells of the current block and of the one before it, fewer than 2·B; those that wait for
siblings before they can be pooled are the newest of them.
"""

import torch
from torch import Tensor

from danon_lightning.attention.core import State
from danon_lightning.attention.merging import MASKED, AttentionPart, attention_part
from danon_lightning.attention.msra.fusion import FeatureFusion, fuse_levels
from danon_lightning.attention.msra.geometry import Geometry
from danon_lightning.attention.pooling import Cells, pool_cells, token_cells
from danon_lightning.attention.rotary import apply_rotary, cell_positions

__all__ = ["empty_state", "stream_chunk"]


def empty_state(
    batch_size: int, kv_heads: int, head_dim: int, num_levels: int, *, device: torch.device, dtype: torch.dtype
) -> State:
    """Return the state before the first token.

    Args:
        batch_size: Number of sequences b.
        kv_heads: Key and value heads G.
        head_dim: Head width d.
        num_levels: Number of levels L.
        device: Where the state lives.
        dtype: Dtype of keys and values; later states take on that of the newest chunk.

    Returns:
        ``position``, the number of tokens seen, and for each level the ``keys`` and ``values`` ``[b, G, m, d]`` and
        the ``log_mass`` ``[b, m]`` of the cells kept.
    """
    nothing = torch.empty(batch_size, kv_heads, 0, head_dim, device=device, dtype=dtype)
    no_mass = torch.empty(batch_size, 0, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return {
        "position": 0,
        "keys": [nothing] * num_levels,
        "values": [nothing] * num_levels,
        "log_mass": [no_mass] * num_levels,
    }


def stream_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    geometry: Geometry,
    level_bias: Tensor | None = None,
    pool_query: Tensor | None = None,
    key_maps: Tensor | None = None,
    value_maps: Tensor | None = None,
    rope_base: float | None = 10000.0,
    key_padding_mask: Tensor | None = None,
    feature_fusion: FeatureFusion = "adaptive",
    dropout_p: float = 0.0,
) -> tuple[Tensor, State]:
    """Attend to everything the state has kept and to the chunk itself, causally.

    The result equals the matching rows of ``msra_attention`` over the whole sequence. The logits take
    n x (n + 2·B·L) numbers a head, so long inputs are better passed in pieces.

    Args:
        q: Queries of the chunk ``[b, H, n, d]``; the other tensors likewise cover the chunk only, and are otherwise as
            in ``msra_attention``.
        k: Keys ``[b, G, n, d]``.
        v: Values ``[b, G, n, d]``.
        state: From ``empty_state`` or an earlier call; not changed.
        geometry: The layout of the levels, the same in all calls.
        level_bias: ``[b, H, n, L]``.
        pool_query: ``[G, d]``.
        key_maps: ``[L - 1, G, d, d]``.
        value_maps: ``[L - 1, G, d, d]``.
        rope_base: Base of the rotary embedding; ``None`` means no rotation.
        key_padding_mask: True for real tokens ``[b, n]``, boolean.
        feature_fusion: How levels become one.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        The output ``[b, H, n, d]`` and the new state.
    """
    heads, width, device = q.shape[1], q.shape[-1], q.device
    start, stop = state["position"], state["position"] + q.shape[-2]
    query = apply_rotary(q, cell_positions(start, stop - start, 1, device), rope_base) * width**-0.5
    query_positions = torch.arange(start, stop, device=device).unsqueeze(-1)
    parts = []
    new_state: State = {"position": stop, "keys": [], "values": [], "log_mass": []}
    new = token_cells(k, v, key_padding_mask)
    for level in range(geometry.num_levels):
        first = _first_kept(geometry, level, start)
        cells = _append(Cells(state["keys"][level], state["values"][level], state["log_mass"][level]), new)
        if cells.num_cells > 0:
            positions = cell_positions(first, cells.num_cells, geometry.span(level), device)
            rotated = cells._replace(keys=apply_rotary(cells.keys, positions, rope_base)).for_heads(heads)
            indices = torch.arange(first, first + cells.num_cells, device=device)
            visible = geometry.visible(query_positions, indices, level, causal=True)
            bias = cells.log_mass.unsqueeze(-2).masked_fill(~visible, MASKED).unsqueeze(1)  # [b, 1, n, m]
            part = attention_part(query, rotated.keys, rotated.values, bias, dropout_p=dropout_p)
            lse = part.lse if level_bias is None else part.lse + level_bias[..., level]
            parts.append(AttentionPart(part.output, lse))

        kept = _first_kept(geometry, level, stop) - first
        # Copies, so that the state does not keep the cells it has let go of alive.
        for name, tensor in cells.slice(kept, cells.num_cells)._asdict().items():
            new_state[name].append(tensor.clone())
        if level + 1 < geometry.num_levels:
            done, total = start // geometry.span(level + 1), stop // geometry.span(level + 1)
            children = cells.slice(*(geometry.pool_factor * count - first for count in (done, total)))
            new = pool_cells(
                children,
                geometry.pool_factor,
                pool_query=pool_query,
                key_map=None if key_maps is None else key_maps[level],
                value_map=None if value_maps is None else value_maps[level],
            )
    return fuse_levels(parts, feature_fusion, may_be_blind=True), new_state


def _first_kept(geometry: Geometry, level: int, position: int) -> int:
    """Return the index of the first cell that the query at ``position``, or a later one, may still see."""
    return max(0, position // geometry.block_length(level) - 1) * geometry.block_size


def _append(old: Cells, new: Cells) -> Cells:
    """Return the cells of ``old`` followed by those of ``new``, in the dtype of ``new``."""
    log_mass = new.log_mass.expand(old.log_mass.shape[0], -1)
    return Cells(
        torch.cat([old.keys.to(new.keys.dtype), new.keys], dim=-2),
        torch.cat([old.values.to(new.values.dtype), new.values], dim=-2),
        torch.cat([old.log_mass.to(log_mass.dtype), log_mass], dim=-1),
    )
