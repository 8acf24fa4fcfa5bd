"""Multi-scale recursive attention (MSRA) in its fast, parallel form.

Queries of one block share a window of cells at each level, so a level is batched products of dense tiles, and there is
never a matrix of n x n logits. The cost is O(n·B·L) with L = O(log n) levels; the work goes on a piece of the sequence
at a time, through all levels, so that logits stay in the cache.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.checks import (
    check_dtypes,
    check_heads,
    check_mask,
    check_queries,
    check_rotation,
    check_shapes,
)
from danon_lightning.attention.full import full_attention
from danon_lightning.attention.joint import Joint, KeySet, joint_attention
from danon_lightning.attention.merging import MASKED, AttentionPart
from danon_lightning.attention.msra.fusion import FeatureFusion, fuse_levels
from danon_lightning.attention.msra.geometry import Geometry
from danon_lightning.attention.pieces import tokens_at_once
from danon_lightning.attention.pooling import build_pyramid, token_cells
from danon_lightning.attention.recompute import Piece, PieceWork, in_pieces
from danon_lightning.attention.rotary import apply_rotary, cell_positions, rotary_tables, rotate
from danon_lightning.attention.windows import padded, windows

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
        ValueError: If shapes or dtypes do not fit each other or a setting is out of range.
    """
    check_queries(q)
    check_rotation(q, rope_base)
    geometry = Geometry.resolve(block_size, pool_factor, num_levels, q.shape[-2])
    _check_tensors(q, k, v, geometry, level_bias, pool_query, key_maps, value_maps, key_padding_mask)
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
    tensors = [q]
    for level, cells in enumerate(levels):
        keys = cells.keys
        if level > 0:
            keys = apply_rotary(keys, cell_positions(0, cells.num_cells, geometry.span(level), q.device), rope_base)
        tensors += [keys, cells.values, cells.log_mass.unsqueeze(1)]
    if level_bias is not None:
        tensors.append(level_bias)
    seed = int(torch.randint(2**31, ())) if dropout_p > 0.0 else 0
    work = _Work(geometry, len(levels), length, rope_base, causal, dropout_p, seed)
    if feature_fusion == "adaptive":
        (output, lses), _ = in_pieces(work, tensors, length, _piece_length(geometry, q.device))
    else:
        # Functions of the user get the levels whole.
        sets = work.sets(0, work.take(tensors, 0, length))
        parts = [
            joint_attention([keys], length, dropout_p=dropout_p, seed=seed + level) for level, keys in enumerate(sets)
        ]
        lses = torch.cat([part.lses for part in parts], dim=-1)
        levels_seen = [AttentionPart(part.output, part.lse) for part in parts]
        output = fuse_levels(levels_seen, feature_fusion, may_be_blind=key_padding_mask is not None)
    if not return_stats:
        return output
    lses = lses.detach()
    unused = geometry.num_levels - len(levels)
    return output, MSRAStats(F.pad(torch.softmax(lses, dim=-1), (0, unused)), torch.logsumexp(lses, dim=-1))


def _piece_length(geometry: Geometry, device: torch.device) -> int:
    """Return the number of tokens to work on at once: blocks of some level, so that borders meet those of blocks."""
    limit = tokens_at_once(device)
    level = 0
    while level + 1 < geometry.num_levels and geometry.block_length(level + 1) <= limit:
        level += 1
    block = geometry.block_length(level)
    return block * max(1, limit // block) if level + 1 == geometry.num_levels else block


class _Work(PieceWork):
    """Attention of a piece of the queries to the cells of all levels.

    A piece consists of whole blocks of a level, or lies within one.

    Args:
        geometry: The layout of the levels.
        num_levels: Levels that there are.
        length: Tokens in the sequence.
        rope_base: Base of the rotary embedding.
        causal: Whether a query sees the past only.
        dropout_p: Probability of dropping an attention weight.
        seed: With the same seed, the same weights are dropped.
    """

    resumes = True

    def __init__(
        self,
        geometry: Geometry,
        num_levels: int,
        length: int,
        rope_base: float | None,
        causal: bool,
        dropout_p: float,
        seed: int,
    ) -> None:
        """Remember them."""
        self.geometry, self.num_levels, self.length = geometry, num_levels, length
        self.rope_base, self.causal, self.dropout_p, self.seed = rope_base, causal, dropout_p, seed

    def take(self, tensors: Sequence[Tensor], start: int, stop: int) -> Sequence[Tensor]:
        """Return queries, and of each level keys, values and masses of the blocks of the piece and beside it."""
        taken = [tensors[0][:, :, start:stop]]
        for level in range(self.num_levels):
            blocks = self._blocks(level, start, stop)
            size = self.geometry.block_size
            here = slice(max(0, blocks.start - 1) * size, (blocks.stop + (not self.causal)) * size)
            taken += [x[:, :, here] for x in tensors[1 + 3 * level : 4 + 3 * level]]
        return taken + [x[:, :, start:stop] for x in tensors[1 + 3 * self.num_levels :]]

    def run(
        self, start: int, stop: int, operands: Sequence[Tensor], state: Tensor | None, known: Sequence[Tensor] | None
    ) -> Piece:
        """Attend."""
        result = None if known is None else Joint(*known)
        sets = self.sets(start, operands)
        joint = joint_attention(sets, stop - start, dropout_p=self.dropout_p, seed=self.seed + start, known=result)
        return Piece(tuple(joint))

    def sets(self, start: int, operands: Sequence[Tensor]) -> list[KeySet]:
        """Return the keys of each level, laid out for the queries from ``start`` on."""
        q, *cells = operands
        level_bias = cells.pop() if len(cells) > 3 * self.num_levels else None
        tokens, width, device = q.shape[2], q.shape[-1], q.device
        first = max(0, self._blocks(0, start, start + tokens).start - 1) * self.geometry.block_size
        positions = cell_positions(first, max(start - first + tokens, cells[0].shape[2]), 1, device)
        tables = rotary_tables(positions, width, self.rope_base, q.dtype)
        if tables is not None:
            q = rotate(q, tables[:, start - first : start - first + tokens])
            cells[0] = rotate(cells[0], tables[:, : cells[0].shape[2]])
        q = q * width**-0.5
        levels = zip(cells[::3], cells[1::3], cells[2::3], strict=True)
        return [self._level(level, start, q, *level_cells, level_bias) for level, level_cells in enumerate(levels)]

    def _blocks(self, level: int, start: int, stop: int) -> slice:
        """Return the blocks of a level that queries lie in."""
        block = self.geometry.block_length(level)
        return slice(start // block, -(-stop // block))

    def _level(
        self, level: int, start: int, query: Tensor, key: Tensor, value: Tensor, mass: Tensor, level_bias: Tensor | None
    ) -> KeySet:
        """Return the keys of one level."""
        geometry, tokens, heads = self.geometry, query.shape[2], query.shape[1]
        size, block = geometry.block_size, geometry.block_length(level)
        blocks = self._blocks(level, start, start + tokens)
        count, alone = blocks.stop - blocks.start, block >= self.length
        before = size if blocks.start == 0 and not alone else 0
        if key.shape[1] != heads:
            key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        neighbours = 0 if alone else 1 if self.causal else 2
        # A window starts one block early, if there is an earlier block at all.
        first = start % block + (0 if alone else block)
        last = first + tokens - 1 if count == 1 else 2 * block - 1
        if level == 0 or not self.causal:
            wide = (1 + neighbours) * size
        else:
            # Cells from here on are too near, even for the last of these queries.
            below, step = last // geometry.block_length(level - 1), size // geometry.pool_factor
            wide = max(1, below - 1) * step
        after = 0 if alone else (count + neighbours) * size - before - key.shape[2]
        key, value = (windows(padded(x, before, after), count, size, wide) for x in (key, value))
        masses = windows(padded(mass.unsqueeze(-1), before, after, MASKED), count, size, wide).mT  # [., 1, c, 1, w]

        # Queries of one group see the same cells: a single token at level 0, above it a block of the level below.
        group = 1 if level == 0 else geometry.block_length(level - 1)
        # In tokens of a block, of which all have the same pattern, but not fewer than there are.
        rows = -(-(tokens if count == 1 else block) // group)
        if tokens > group:
            query = padded(query, 0, count * rows * group - tokens)
        positions = first + torch.arange(rows, device=key.device) * group
        columns = torch.arange(key.shape[-2], device=key.device)
        visible = geometry.visible(positions.unsqueeze(-1), columns, level, causal=self.causal)
        preference = None if level_bias is None else level_bias[..., level]
        return KeySet(query.unflatten(2, (count, -1)), key, value, masses.masked_fill(~visible, MASKED), preference)


def _check_tensors(
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
    """Raise unless the tensors fit each other."""
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
    check_dtypes(q, k, v)
