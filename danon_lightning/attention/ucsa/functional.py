"""Unified compressed sparse attention (UCSA) in its fast, parallel form.

Near tokens are dense products; blocks that queries choose are gathered in tiles of queries that chose the same one, so
that these are dense products too. With a tree over the blocks a query costs O(k·r·T + k·S), whatever the length.
"""

from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.checks import check_rotation
from danon_lightning.attention.full import full_attention
from danon_lightning.attention.precision import without_autocast
from danon_lightning.attention.rotary import apply_rotary, cell_positions
from danon_lightning.attention.ucsa.arguments import check_tensors
from danon_lightning.attention.ucsa.cells import SelectionBias, block_cells, block_errors, parent_cells
from danon_lightning.attention.ucsa.layout import Layout
from danon_lightning.attention.ucsa.rotation import rotate_sequence
from danon_lightning.attention.ucsa.sources import CELLS_ABREAST, Sources, level_of
from danon_lightning.attention.ucsa.sparse import Attended, sparse_attention

__all__ = ["UCSAStats", "ucsa_attention"]

# Of fewer queries that read everything, what they gain is less than it takes to put two results together.
LEAST_DENSE_SHARE = 1 / 32


class UCSAStats(NamedTuple):
    """What a query attended to; detached.

    Attributes:
        selected_blocks: The blocks read token by token beyond the window ``[b, H, n, k]``, int32, in no particular
            order, -1 where there are fewer.
        selected_weight: Share of the attention mass on them ``[b, H, n]``.
        near_weight: Share on the sinks and the window ``[b, H, n]``.
        cell_weight: Share on summaries ``[b, H, n]``.
        lse: Log-sum-exp of all visible logits ``[b, H, n]``.
        block_errors: What the mean value of each block leaves out ``[b, G, blocks]``; see ``block_errors``.
    """

    selected_blocks: Tensor
    selected_weight: Tensor
    near_weight: Tensor
    cell_weight: Tensor
    lse: Tensor
    block_errors: Tensor


@overload
def ucsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    num_selected: int,
    window_blocks: int,
    num_sinks: int,
    tree_levels: int = ...,
    tree_factor: int = ...,
    rope_base: float | None = ...,
    causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    error_tolerance: float = ...,
    selection_bias: SelectionBias = ...,
    dropout_p: float = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def ucsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    num_selected: int,
    window_blocks: int,
    num_sinks: int,
    tree_levels: int = ...,
    tree_factor: int = ...,
    rope_base: float | None = ...,
    causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    error_tolerance: float = ...,
    selection_bias: SelectionBias = ...,
    dropout_p: float = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, UCSAStats]: ...


def ucsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    num_selected: int,
    window_blocks: int,
    num_sinks: int,
    tree_levels: int = 1,
    tree_factor: int = 16,
    rope_base: float | None = 10000.0,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    error_tolerance: float = 0.0,
    selection_bias: SelectionBias = None,
    dropout_p: float = 0.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, UCSAStats]:
    """Attend to sinks, a window, the most promising blocks, and to summaries of all others, in one softmax.

    The first g tokens are sinks, read by every query that may see them. What follows is cut in blocks of S tokens. The
    query i of block c = ⌊(i - g)/S⌋ (sinks count to block 0) reads token by token the blocks c - w … c up to its own
    position, or c - w … c + w if not causal; the blocks outside of this window are cells of level 0 of a tree, and a
    cell of level l holds r^l of them.

    The tree is searched from level T - 1 down. Candidates of the uppermost level are its cells wholly outside of the
    window; candidates of a level below are the children of the cells expanded above, and those children of cells that
    the window cuts that lie outside of it. The k candidates with the largest score are expanded, of equal ones those
    later in the sequence; the rest stay in the softmax as summaries. Blocks that are expanded are read token by token.
    So every token is covered exactly once.

    The score of a cell is an upper bound of the logits of its tokens (Quest), from the largest and the smallest value
    of every channel of its rotated keys: Σ_c max(q_c·max_c, q_c·min_c)/√d, plus ``selection_bias``. Tokens have the
    logit q·k/√d, q and k rotated. Summaries are the means of keys and values, the key rotated at the centre of the
    (filled up) cell: their logit is q·k̄/√d + log(real tokens). Selection has no gradient.

    Args:
        q: Queries ``[b, H, n, d]``, neither rotated nor scaled.
        k: Keys ``[b, G, n, d]``, H divisible by G.
        v: Values ``[b, G, n, d]``.
        block_size: Tokens S in a block.
        num_selected: Cells k that a query expands at each level; 0 reads nothing beyond the window token by token.
        window_blocks: Blocks w before the own one in the window, and after it unless causal.
        num_sinks: Tokens g at the start that every query reads.
        tree_levels: Levels T of cells. A query scores about n / (S·r^(T-1)) cells at the uppermost level.
        tree_factor: Cells r of one level that a cell of the next one holds.
        rope_base: Base of the rotary embedding; ``None`` means no rotation.
        causal: Whether a query sees the past only.
        key_padding_mask: True for real tokens ``[b, n]``, boolean; ``None`` means that all are.
        error_tolerance: Blocks whose error e = ‖v - v̄‖/‖v‖ (``block_errors``) is smaller are read as summaries only; a
            cell all of whose blocks are such is not expanded.
        selection_bias: Added to the scores of blocks ``[b, G or H, blocks]``, blocks = ⌈(n - g)/S⌉; or a function that
            makes it of the errors ``[b, G, blocks]``, such as ``compensate_errors`` with all but the errors bound. A
            cell has the largest bias of its non-empty children.
        dropout_p: Probability of dropping an attention weight.
        return_stats: Whether to return statistics too.

    Returns:
        The output ``[b, H, n, d]`` in the dtype of ``v``, zero in rows that see no real token; with ``return_stats``
        also a ``UCSAStats``.

    Raises:
        ValueError: If shapes do not fit each other or a setting is out of range.

    Reference:
        Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024.
    """
    layout = Layout(block_size, num_selected, window_blocks, num_sinks, tree_levels, tree_factor, causal)
    length = q.shape[-2] if q.dim() > 1 else 0
    check_tensors(
        q,
        k,
        v,
        layout.num_blocks(length),
        key_padding_mask=key_padding_mask,
        selection_bias=selection_bias,
        error_tolerance=error_tolerance,
    )
    check_rotation(q, rope_base)
    # Where everything is read token by token, this is full attention, for which there are faster kernels.
    dense = 0 if return_stats else layout.reading_everything(length, expandable=error_tolerance == 0.0)
    if dense == length:
        positions = cell_positions(0, length, 1, q.device)
        query, key = apply_rotary(q, positions, rope_base), apply_rotary(k, positions, rope_base)
        return full_attention(query, key, v, causal=causal, key_padding_mask=key_padding_mask, dropout_p=dropout_p)
    if q.is_meta:
        # How much work there is depends on the values.
        return _without_values(q, v, layout, return_stats)
    batch, groups, k = q.shape[0], k.shape[1], k.to(q.dtype)
    query, rotated = rotate_sequence(q, k, rope_base)
    dense = dense if dense >= LEAST_DENSE_SHARE * length else 0
    first, query = query.split([dense, length - dense], dim=2)
    query = query.unflatten(1, (groups, -1)).flatten(0, 1)
    sources = _make_sources(
        k, rotated, v.to(q.dtype), layout, rope_base, key_padding_mask, error_tolerance, selection_bias
    )
    attended = sparse_attention(query, sources, layout, start=dense, dropout_p=dropout_p, shares=return_stats)
    output = attended.output.unflatten(0, (batch, groups)).flatten(1, 2).to(v.dtype)
    if dense:
        key, value = rotated[:, :, :dense], v[:, :, :dense].to(q.dtype)
        mask = None if key_padding_mask is None else key_padding_mask[:, :dense]
        with without_autocast(q.device):
            read = full_attention(first, key, value, key_padding_mask=mask, dropout_p=dropout_p, scale=1.0)
        return torch.cat([read.to(v.dtype), output], dim=2)
    if not return_stats:
        return output
    errors = block_errors(v, block_size=block_size, num_sinks=num_sinks, key_padding_mask=key_padding_mask)
    return output, _make_stats(attended, batch, errors)


def _make_sources(
    k: Tensor,
    rotated: Tensor,
    v: Tensor,
    layout: Layout,
    rope_base: float | None,
    key_padding_mask: Tensor | None,
    error_tolerance: float,
    selection_bias: SelectionBias,
) -> Sources:
    """Cut a sequence in sinks and blocks, and build the tree."""
    batch, groups, length, _ = k.shape
    sinks, blocks = min(layout.num_sinks, length), layout.num_blocks(length)
    missing = blocks * layout.block_size - (length - sinks)
    # Split, so that gradients of both parts are put together in one pass.
    (_, keys), (sink_keys, trunk_keys), (sink_values, trunk_values) = (
        x.split([sinks, length - sinks], dim=-2) for x in (k, rotated, v)
    )
    if missing:
        keys, trunk_keys, trunk_values = (F.pad(x, (0, 0, 0, missing)) for x in (keys, trunk_keys, trunk_values))
    real = sink_hidden = hidden = None
    if key_padding_mask is not None or (missing and not layout.causal):
        # A causal query never comes to see what fills up the last block.
        mask = torch.ones(batch, length, dtype=torch.bool, device=k.device)
        mask = mask if key_padding_mask is None else key_padding_mask
        real = F.pad(mask[:, sinks:], (0, missing))
        sink_hidden = ~mask[:, :sinks].repeat_interleave(groups, dim=0)
        hidden = ~real.repeat_interleave(groups, dim=0).unflatten(1, (blocks, layout.block_size))
    cells = [
        block_cells(
            keys,
            trunk_keys,
            trunk_values,
            real,
            first=0,
            layout=layout,
            rope_base=rope_base,
            error_tolerance=error_tolerance,
            selection_bias=selection_bias,
        )
    ]
    for level in range(1, layout.tree_levels):
        cells.append(parent_cells(cells[-1], first=0, level=level, layout=layout, rope_base=rope_base))
    multiples = [layout.tree_factor] * (layout.tree_levels - 1) + [CELLS_ABREAST]
    trunk = [x.flatten(0, 1).unflatten(1, (blocks, layout.block_size)) for x in (trunk_keys, trunk_values)]
    return Sources(
        sink_keys.flatten(0, 1),
        sink_values.flatten(0, 1),
        sink_hidden,
        trunk[0],
        trunk[1],
        hidden,
        0,
        trunk[0],
        trunk[1],
        hidden,
        None,
        tuple(
            level_of(x, groups, multiple, causal=layout.causal) for x, multiple in zip(cells, multiples, strict=True)
        ),
    )


def _make_stats(attended: Attended, batch: int, errors: Tensor) -> UCSAStats:
    """Turn log-sum-exps of rows into shares of heads."""
    lse, near, cells, blocks = (
        x.unflatten(0, (batch, -1)).flatten(1, 2)
        for x in (attended.lse, attended.near_lse, attended.cells_lse, attended.blocks)
    )
    near_weight, cell_weight = (near - lse).exp(), (cells - lse).exp()
    chose = (blocks >= 0).any(dim=-1)
    selected_weight = (1.0 - near_weight - cell_weight).clamp(min=0.0).masked_fill(~chose, 0.0)
    return UCSAStats(blocks, selected_weight, near_weight, cell_weight, lse, errors)


def _without_values(q: Tensor, v: Tensor, layout: Layout, return_stats: bool) -> Tensor | tuple[Tensor, UCSAStats]:
    """Return results without values, on the meta device."""
    output = torch.empty_like(q, dtype=v.dtype)
    if not return_stats:
        return output
    share = torch.empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    blocks = torch.empty(*q.shape[:-1], layout.num_selected, dtype=torch.int32, device=q.device)
    errors = torch.empty(*v.shape[:2], layout.num_blocks(v.shape[-2]), dtype=share.dtype, device=q.device)
    return output, UCSAStats(blocks, share, share, share, share, errors)
