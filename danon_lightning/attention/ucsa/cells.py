"""Blocks and the tree above them: what they are summarised by, and what they could hold at most.

A cell is read by the mean of its keys and values. Whether it is worth expanding is judged by extremes instead: with the
largest and the smallest value of every channel of its rotated keys, no token of it can have a logit above
Σ_c max(q_c·max_c, q_c·min_c)/√d.

Reference:
    Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.merging import MASKED
from danon_lightning.attention.pooling import Cells as Summaries
from danon_lightning.attention.pooling import pool_cells, token_cells
from danon_lightning.attention.rotary import apply_rotary, cell_positions
from danon_lightning.attention.ucsa.layout import Layout

__all__ = [
    "Cells",
    "SelectionBias",
    "block_cells",
    "block_errors",
    "compensate_errors",
    "parent_cells",
    "rotate_centres",
]

SelectionBias: TypeAlias = Tensor | Callable[[Tensor], Tensor] | None


class Cells(NamedTuple):
    """Consecutive cells of one level.

    Attributes:
        means: Mean keys, not rotated ``[b, G, m, d]``.
        keys: Mean keys, rotated at the centre of the cell ``[b, G, m, d]``.
        values: Mean values ``[b, G, m, d]``.
        log_mass: Logarithm of the number of real tokens ``[b or 1, m]``, ``MASKED`` for cells without any.
        upper: Largest value of each channel of the rotated keys of tokens ``[b, G, m, d]``, detached like all below.
        lower: The smallest ``[b, G, m, d]``.
        bias: Added to the score in the selection ``[b, G or H, m]``, or ``None``.
        expandable: Which cells may be expanded ``[b or 1, G or 1, m]``, boolean; ``None`` if all may.
    """

    means: Tensor
    keys: Tensor
    values: Tensor
    log_mass: Tensor
    upper: Tensor
    lower: Tensor
    bias: Tensor | None
    expandable: Tensor | None


def block_errors(v: Tensor, *, block_size: int, num_sinks: int = 0, key_padding_mask: Tensor | None = None) -> Tensor:
    """Return what the mean value of a block leaves out, relative to the values: e = ‖v - v̄‖ / ‖v‖.

    Args:
        v: Values ``[b, G, n, d]``.
        block_size: Tokens S in a block; the last block may have fewer.
        num_sinks: Tokens before the first block.
        key_padding_mask: True for real tokens ``[b, n]``, boolean; the others do not count.

    Returns:
        Frobenius norms ``[b, G, blocks]``, detached, float32 or float64; zero for blocks that hold nothing.
    """
    layout = Layout(block_size, 0, 0, num_sinks)
    values = v.detach()[:, :, num_sinks:].to(torch.promote_types(v.dtype, torch.float32))
    blocks, missing = layout.num_blocks(v.shape[-2]), -max(0, v.shape[-2] - num_sinks) % block_size
    values = F.pad(values, (0, 0, 0, missing)).unflatten(-2, (blocks, block_size))
    real = (
        torch.ones(1, v.shape[-2], dtype=torch.bool, device=v.device) if key_padding_mask is None else key_padding_mask
    )
    real = F.pad(real[:, num_sinks:], (0, missing)).unflatten(-1, (blocks, block_size))[:, None, :, :, None]
    values = values.masked_fill(~real, 0.0)
    mean = values.sum(dim=-2, keepdim=True) / real.sum(dim=-2, keepdim=True).clamp(min=1)
    lost = (values - mean).masked_fill(~real, 0.0).square().sum(dim=(-2, -1))
    total = values.square().sum(dim=(-2, -1))
    return (lost / torch.where(total > 0, total, 1.0)).sqrt()


def compensate_errors(errors: Tensor, *, mean: Tensor | float, spread: Tensor | float, threshold: float) -> Tensor:
    """Return the bonus in the selection of blocks whose summary is unusually poor: log(1 + e/μ) where e > μ + α·sd.

    Args:
        errors: e ``[..., blocks]``, from ``block_errors``.
        mean: μ, positive: usually a running mean of the errors.
        spread: sd, their standard deviation.
        threshold: α, how many standard deviations are unusual.

    Returns:
        A ``selection_bias``, shape of ``errors``.
    """
    mean, spread = (torch.as_tensor(x, dtype=errors.dtype, device=errors.device) for x in (mean, spread))
    return torch.where(errors > mean + threshold * spread, torch.log1p(errors / mean), 0.0)


def block_cells(
    keys: Tensor,
    rotated: Tensor,
    values: Tensor,
    real: Tensor | None,
    *,
    first: int,
    layout: Layout,
    rope_base: float | None,
    error_tolerance: float,
    selection_bias: SelectionBias,
) -> Cells:
    """Summarise whole blocks.

    Args:
        keys: Keys, not rotated ``[b, G, m·S, d]``.
        rotated: The same, rotated by their positions.
        values: ``[b, G, m·S, d]``.
        real: True for real tokens ``[b or 1, m·S]``; ``None`` means that all are.
        first: Index of the first block.
        layout: Where blocks lie.
        rope_base: Base of the rotary embedding.
        error_tolerance: Blocks with a smaller error may not be expanded.
        selection_bias: ``[b, G or H, m]``, or a function that makes it of the errors ``[b, G, m]``.
    """
    size = layout.block_size
    if real is None:
        mean_keys, mean_values = (x.unflatten(-2, (-1, size)).mean(dim=-2) for x in (keys, values))
        precise = torch.promote_types(keys.dtype, torch.float32)
        masses = torch.full((1, keys.shape[-2] // size), math.log(size), dtype=precise, device=keys.device)
        summaries = Summaries(mean_keys, mean_values, masses)
    else:
        summaries = pool_cells(token_cells(keys, values, real), size)
    tokens = rotated.detach().unflatten(-2, (-1, size))
    if real is None:
        upper, lower = tokens.amax(dim=-2), tokens.amin(dim=-2)
    else:
        padded = ~real.unflatten(-1, (-1, size))[:, None, :, :, None]
        upper, lower = _extremes(tokens.masked_fill(padded, float("-inf")), tokens.masked_fill(padded, float("inf")))
    expandable = None if real is None else (summaries.log_mass > MASKED / 2).unsqueeze(1)
    if error_tolerance > 0.0 or callable(selection_bias):
        errors = block_errors(values, block_size=size, key_padding_mask=None if real is None else real)
        if error_tolerance > 0.0:
            worth_it = errors >= error_tolerance
            expandable = worth_it if expandable is None else expandable & worth_it
        selection_bias = selection_bias(errors) if callable(selection_bias) else selection_bias
    bias = None if selection_bias is None else selection_bias.detach().to(summaries.log_mass.dtype)
    centred = rotate_centres(summaries.keys, first, 0, layout, rope_base)
    return Cells(summaries.keys, centred, summaries.values, summaries.log_mass, upper, lower, bias, expandable)


def parent_cells(children: Cells, *, first: int, level: int, layout: Layout, rope_base: float | None) -> Cells:
    """Summarise every r neighbouring cells in one; a last incomplete group gives a cell too.

    Args:
        children: Cells of the level below; the first is the first child of its parent.
        first: Index of the first parent.
        level: Level of the parents.
        layout: Where cells lie.
        rope_base: Base of the rotary embedding.
    """
    factor = layout.tree_factor
    summaries = pool_cells(Summaries(children.means, children.values, children.log_mass), factor)
    missing = -children.means.shape[-2] % factor
    empty = F.pad(children.log_mass <= MASKED / 2, (0, missing), value=True).unflatten(-1, (-1, factor))
    upper, lower = (F.pad(x, (0, 0, 0, missing)).unflatten(-2, (-1, factor)) for x in (children.upper, children.lower))
    upper, lower = _extremes(
        upper.masked_fill(empty[:, None, :, :, None], float("-inf")),
        lower.masked_fill(empty[:, None, :, :, None], float("inf")),
    )
    bias = children.bias
    if bias is not None:
        # The best child decides: the score of a cell stays an upper bound of those of its children.
        bias = F.pad(bias, (0, missing), value=float("-inf")).unflatten(-1, (-1, factor))
        bias = bias.masked_fill(empty.unsqueeze(1), float("-inf")).amax(dim=-1).clamp(min=MASKED)
    expandable = children.expandable
    if expandable is not None:
        expandable = F.pad(expandable, (0, missing)).unflatten(-1, (-1, factor)).any(dim=-1)
    centred = rotate_centres(summaries.keys, first, level, layout, rope_base)
    return Cells(summaries.keys, centred, summaries.values, summaries.log_mass, upper, lower, bias, expandable)


def _extremes(upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Return the extremes over the last dimension but one, zero where there is nothing but infinity."""
    upper, lower = upper.amax(dim=-2), lower.amin(dim=-2)
    return upper.masked_fill(upper == float("-inf"), 0.0), lower.masked_fill(lower == float("inf"), 0.0)


def rotate_centres(means: Tensor, first: int, level: int, layout: Layout, rope_base: float | None) -> Tensor:
    """Rotate summaries by the positions of the centres of their cells.

    Args:
        means: Mean keys of consecutive cells ``[b, G, m, d]``.
        first: Index of the first cell.
        level: Their level.
        layout: Where cells lie.
        rope_base: Base of the rotary embedding; ``None`` means no rotation.
    """
    centres = cell_positions(first, means.shape[-2], layout.span(level), means.device) + layout.num_sinks
    return apply_rotary(means, centres, rope_base)
