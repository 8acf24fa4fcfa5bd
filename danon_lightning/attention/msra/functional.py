"""Multi-scale recursive attention (MSRA) in its fast, parallel form.

Queries of one block share a window of cells at each level, so a level is one batched product of dense tiles; there is
no loop over blocks and never a matrix of n x n logits. The cost is O(n·B·L) with L = O(log n) levels.
"""

from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.full import full_attention
from danon_lightning.attention.merging import MASKED, AttentionPart, attention_part
from danon_lightning.attention.msra.fusion import FeatureFusion, fuse_levels
from danon_lightning.attention.msra.geometry import Geometry
from danon_lightning.attention.pooling import Cells, build_pyramid, token_cells
from danon_lightning.attention.rotary import apply_rotary, cell_positions

__all__ = ["MSRAStats", "msra_attention"]


class MSRAStats(NamedTuple):
    """What a query attended to; detached.

    Attributes:
        level_weights: Share of the attention mass at each level, as if all levels shared one softmax ``[b, H, n, L]``.
        lse: Log-sum-exp of all visible logits ``[b, H, n]``.
    """

    level_weights: Tensor
    lse: Tensor


@overload
def msra_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    pool_factor: int,
    num_levels: int | Literal["auto"] = ...,
    level_bias: Tensor | None = ...,
    pool_query: Tensor | None = ...,
    key_maps: Tensor | None = ...,
    value_maps: Tensor | None = ...,
    rope_base: float | None = ...,
    causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    feature_fusion: FeatureFusion = ...,
    dropout_p: float = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def msra_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    pool_factor: int,
    num_levels: int | Literal["auto"] = ...,
    level_bias: Tensor | None = ...,
    pool_query: Tensor | None = ...,
    key_maps: Tensor | None = ...,
    value_maps: Tensor | None = ...,
    rope_base: float | None = ...,
    causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    feature_fusion: FeatureFusion = ...,
    dropout_p: float = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, MSRAStats]: ...


def msra_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    pool_factor: int,
    num_levels: int | Literal["auto"] = "auto",
    level_bias: Tensor | None = None,
    pool_query: Tensor | None = None,
    key_maps: Tensor | None = None,
    value_maps: Tensor | None = None,
    rope_base: float | None = 10000.0,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    feature_fusion: FeatureFusion = "adaptive",
    dropout_p: float = 0.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, MSRAStats]:
    """Attend to near tokens one by one and to far ones through summaries that grow with the distance.

    A cell of level l stands for r^l tokens. Its logit is q·k/√d + log(real tokens in it) + the bias of its level, with
    k rotated at the centre of the cell; one softmax runs over all visible cells of all levels. Which cells are visible
    is explained in ``danon_lightning.attention.msra.geometry``, how they are made in
    ``danon_lightning.attention.pooling``.

    Args:
        q: Queries ``[b, H, n, d]``, neither rotated nor scaled.
        k: Keys ``[b, G, n, d]``, H divisible by G.
        v: Values ``[b, G, n, dv]``.
        block_size: Cells B in a block; a query sees between one and two blocks a level.
        pool_factor: Cells r of one level that a cell of the next one summarises; it divides ``block_size``.
        num_levels: Number of levels L; ``"auto"`` takes the least with which every token reaches every other one.
            With fewer, tokens further back than two blocks of the top level are not seen.
        level_bias: Added to the logits of each level ``[b, H, n, L]``.
        pool_query: Direction that decides which children of a cell count more ``[G, d]``; ``None``: by mass alone.
        key_maps: Linear maps of the keys of each level above the tokens ``[L - 1, G, d, d]``; ``None``: identity.
        value_maps: The same for the values ``[L - 1, G, dv, dv]``.
        rope_base: Base of the rotary embedding; ``None`` means no rotation.
        causal: Whether a query sees the past only.
        key_padding_mask: True for real tokens ``[b, n]``, boolean; ``None`` means that all are.
        feature_fusion: ``"adaptive"`` is the above. Otherwise a function that takes the outputs of a softmax per level
            ``[b, H, n, l, d]`` and whether the query sees the level ``[b, H, n, l]``, for the l <= L levels that a
            sequence of this length has, and returns ``[b, H, n, d]``; ``level_bias`` then has no effect.
        dropout_p: Probability of dropping an attention weight.
        return_stats: Whether to return statistics too.

    Returns:
        The output ``[b, H, n, dv]`` in the dtype of ``v``, zero in rows that see no real token; with ``return_stats``
        also an ``MSRAStats``.

    Raises:
        ValueError: If shapes do not fit each other or a setting is out of range.
    """
    geometry = Geometry.resolve(block_size, pool_factor, num_levels, q.shape[-2])
    _check_shapes(q, k, v, geometry, level_bias, pool_query, key_maps, value_maps, key_padding_mask)
    batch, heads, length, width = q.shape
    if length <= 2 * block_size and feature_fusion == "adaptive" and not return_stats:
        # Two blocks see each other token by token: this is full attention, for which there are faster kernels.
        positions = cell_positions(0, length, 1, q.device)
        query, key = apply_rotary(q, positions, rope_base), apply_rotary(k, positions, rope_base)
        return full_attention(query, key, v, causal=causal, key_padding_mask=key_padding_mask, dropout_p=dropout_p)
    levels = build_pyramid(
        token_cells(k, v, key_padding_mask),
        pool_factor,
        geometry.active_levels(length),
        pool_query=pool_query,
        key_maps=key_maps,
        value_maps=value_maps,
    )
    query = apply_rotary(q, cell_positions(0, length, 1, q.device), rope_base) * width**-0.5
    parts = []
    for level, cells in enumerate(levels):
        positions = cell_positions(0, cells.num_cells, geometry.span(level), q.device)
        cells = cells._replace(keys=apply_rotary(cells.keys, positions, rope_base)).for_heads(heads)
        part = _attend_level(query, cells, level, geometry, causal=causal, dropout_p=dropout_p)
        parts.append(part if level_bias is None else part._replace(lse=part.lse + level_bias[..., level]))
    output = fuse_levels(parts, feature_fusion, may_be_blind=key_padding_mask is not None)
    if not return_stats:
        return output
    lses = torch.stack([part.lse for part in parts], dim=-1).detach()
    unused = geometry.num_levels - len(parts)
    return output, MSRAStats(F.pad(torch.softmax(lses, dim=-1), (0, unused)), torch.logsumexp(lses, dim=-1))


def _attend_level(
    query: Tensor, cells: Cells, level: int, geometry: Geometry, *, causal: bool, dropout_p: float
) -> AttentionPart:
    """Attend to the cells of one level, their keys rotated and repeated for the query heads."""
    length, size = query.shape[-2], geometry.block_size
    # Queries of one group see the same cells: a single token at level 0, above it a block of the level below.
    group = 1 if level == 0 else geometry.block_length(level - 1)
    blocks = -(-length // geometry.block_length(level))
    groups = geometry.block_length(level) // group if blocks > 1 else -(-length // group)
    # The cells at the end of the own block are too near for every query of a causal level.
    own = size - 2 * size // geometry.pool_factor if level > 0 and causal else size
    keys, values = (_windows(x, blocks, size, own, causal=causal) for x in (cells.keys, cells.values))
    log_mass = _windows(cells.log_mass.unsqueeze(-1), blocks, size, own, causal=causal, fill=MASKED).squeeze(-1)

    # The pattern repeats from block to block. A window starts one block early, if there is an earlier block at all.
    first_block = 1 if blocks > 1 else 0
    in_block = torch.arange(groups, device=query.device) * group
    visible = geometry.visible(
        first_block * geometry.block_length(level) + in_block.unsqueeze(-1),
        torch.arange(keys.shape[-2], device=query.device),
        level,
        causal=causal,
    )
    bias = log_mass.unsqueeze(-2).masked_fill(~visible, MASKED).unsqueeze(1)  # [b or 1, 1, blocks, groups, w]

    padded = F.pad(query, (0, 0, 0, blocks * groups * group - length))
    part = attention_part(padded.unflatten(-2, (blocks, -1)), keys, values, bias, dropout_p=dropout_p)
    return AttentionPart(part.output.flatten(-3, -2)[..., :length, :], part.lse.flatten(-2)[..., :length])


def _windows(x: Tensor, blocks: int, size: int, own: int, *, causal: bool, fill: float = 0.0) -> Tensor:
    """Return for each block its neighbourhood: the block before, the first ``own`` cells of it, the block after.

    Args:
        x: Cells ``[..., m, d]``, m at most ``blocks * size``.
        blocks: Number of blocks.
        size: Cells in a block.
        own: Cells of the own block that are needed.
        causal: ``True`` leaves the block after out.
        fill: What stands in for cells outside of ``x``.

    Returns:
        ``[..., blocks, w, d]``. A single block has no neighbours and is not padded.
    """
    if blocks == 1:
        return x[..., :own, :].unsqueeze(-3)
    outside = 1 if causal else 2
    padded = F.pad(x, (0, 0, size, (blocks + outside - 1) * size - x.shape[-2]), value=fill)
    padded = padded.unflatten(-2, (blocks + outside, size))
    pieces = [padded[..., :blocks, :, :], padded[..., 1 : blocks + 1, :own, :]]
    if not causal:
        pieces.append(padded[..., 2:, :, :])
    return torch.cat(pieces, dim=-2)


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    level_bias: Tensor | None,
    pool_query: Tensor | None,
    key_maps: Tensor | None,
    value_maps: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    """Raise unless the shapes fit each other."""
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q has shape {list(q.shape)}; it must be [batch, heads, tokens, width], none of them zero")
    batch, heads, length, width = q.shape
    if k.dim() != 4 or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"k has shape {list(k.shape)}, but q has shape {list(q.shape)}; k must have a number of heads that divides "
            "that of q"
        )
    groups, value_width = k.shape[1], v.shape[-1]
    upper = geometry.num_levels - 1
    expected = {
        "k": (k, (batch, groups, length, width)),
        "v": (v, (batch, groups, length, value_width)),
        "level_bias": (level_bias, (batch, heads, length, geometry.num_levels)),
        "pool_query": (pool_query, (groups, width)),
        "key_maps": (key_maps, (upper, groups, width, width)),
        "value_maps": (value_maps, (upper, groups, value_width, value_width)),
        "key_padding_mask": (key_padding_mask, (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but q has shape {list(q.shape)} and there are "
                f"{geometry.num_levels} levels; {name} must have shape {list(shape)}"
            )
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise ValueError(f"key_padding_mask has dtype {key_padding_mask.dtype}; it must be torch.bool, True for tokens")
