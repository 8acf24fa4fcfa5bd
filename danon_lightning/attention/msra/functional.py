"""Multi-scale recursive attention (MSRA) in its fast, parallel form.

Queries of one block share a window of cells at each level, so a level is batched products of dense tiles, and there is
never a matrix of n x n logits. The cost is O(n·B·L) with L = O(log n) levels; the work goes on a piece of the sequence
at a time, through all levels, so that logits stay in the cache.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.checks import check_heads, check_mask, check_queries, check_shapes
from danon_lightning.attention.full import full_attention
from danon_lightning.attention.merging import MASKED, AttentionPart, attention_part
from danon_lightning.attention.msra.fusion import FeatureFusion, fuse_levels
from danon_lightning.attention.msra.geometry import Geometry
from danon_lightning.attention.pieces import tokens_at_once
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
    # Levels that are fused by functions of the user are handed to them whole.
    piece = _piece_length(geometry, q.device) if feature_fusion == "adaptive" else length
    queries = query.split(piece, dim=-2)
    attended = []
    for level, cells in enumerate(levels):
        positions = cell_positions(0, cells.num_cells, geometry.span(level), q.device)
        cells = cells._replace(keys=apply_rotary(cells.keys, positions, rope_base)).for_heads(heads)
        attended.append(_attend_level(queries, cells, level, geometry, length, causal=causal, dropout_p=dropout_p))
    biases = [None] * len(queries) if level_bias is None else level_bias.split(piece, dim=-2)
    outputs, lses = [], []
    for bias, *parts in zip(biases, *attended, strict=True):
        if bias is not None:
            parts = [part._replace(lse=part.lse + bias[..., level]) for level, part in enumerate(parts)]
        outputs.append(fuse_levels(parts, feature_fusion, may_be_blind=key_padding_mask is not None))
        if return_stats:
            lses.append(torch.stack([part.lse for part in parts], dim=-1).detach())
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)
    if not return_stats:
        return output
    lse = torch.cat(lses, dim=-2)
    unused = geometry.num_levels - len(levels)
    return output, MSRAStats(F.pad(torch.softmax(lse, dim=-1), (0, unused)), torch.logsumexp(lse, dim=-1))


def _piece_length(geometry: Geometry, device: torch.device) -> int:
    """Return the number of tokens to work on at once: blocks of some level, so that borders meet those of blocks."""
    limit = tokens_at_once(device)
    level = 0
    while level + 1 < geometry.num_levels and geometry.block_length(level + 1) <= limit:
        level += 1
    block = geometry.block_length(level)
    return block * max(1, limit // block) if level + 1 == geometry.num_levels else block


def _attend_level(
    queries: Sequence[Tensor],
    cells: Cells,
    level: int,
    geometry: Geometry,
    length: int,
    *,
    causal: bool,
    dropout_p: float,
) -> Iterator[AttentionPart]:
    """Attend to the cells of one level, their keys rotated and repeated for the query heads, piece by piece.

    A piece consists of whole blocks of the level, or lies within one.
    """
    size, block = geometry.block_size, geometry.block_length(level)
    # Queries of one group see the same cells: a single token at level 0, above it a block of the level below.
    group = 1 if level == 0 else geometry.block_length(level - 1)
    blocks = -(-length // block)
    # The cells at the end of the own block are too near for every query of a causal level.
    own = size - 2 * size // geometry.pool_factor if level > 0 and causal else size
    keys, values, masses = (
        _windows(x, blocks, size, own, causal=causal, fill=fill)
        for x, fill in ((cells.keys, 0.0), (cells.values, 0.0), (cells.log_mass.unsqueeze(-1), MASKED))
    )
    at_once = -(-queries[0].shape[-2] // block)  # blocks
    # A split and not slices: each of many slices would fill up its gradient with zeros to the whole length.
    windows = list(
        zip(
            keys.split(at_once, dim=-3),
            values.split(at_once, dim=-3),
            masses.squeeze(-1).split(at_once, dim=-2),
            strict=True,
        )
    )
    columns = torch.arange(keys.shape[-2], device=keys.device)
    start = 0
    for query in queries:
        key, value, mass = windows[start // block // at_once]
        count, tokens = key.shape[-3], query.shape[-2]
        # In tokens of a block, of which all have the same pattern, but not fewer than there are.
        rows = -(-(tokens if count == 1 else block) // group)
        padded = F.pad(query, (0, 0, 0, count * rows * group - tokens)) if tokens > group else query
        # A window starts one block early, if there is an earlier block at all.
        first = start % block + (block if blocks > 1 else 0)
        positions = first + torch.arange(rows, device=keys.device) * group
        visible = geometry.visible(positions.unsqueeze(-1), columns, level, causal=causal)
        bias = mass.unsqueeze(-2).masked_fill(~visible, MASKED).unsqueeze(1)  # [b or 1, 1, blocks, rows, w]
        part = attention_part(padded.unflatten(-2, (count, -1)), key, value, bias, dropout_p=dropout_p)
        yield AttentionPart(part.output.flatten(-3, -2)[..., :tokens, :], part.lse.flatten(-2)[..., :tokens])
        start += tokens


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
    check_queries(q)
    batch, heads, length, width = q.shape
    check_heads(q, k)
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
    check_shapes(expected, f"q has shape {list(q.shape)} and there are {geometry.num_levels} levels")
    check_mask(key_padding_mask)
