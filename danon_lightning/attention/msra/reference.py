"""MSRA written as its definition reads: one softmax over an explicit matrix of n queries x all cells of all levels.

It shares no code with the fast form, costs O(n²) and exists to check it, in float64.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["msra_attention_reference"]


def msra_attention_reference(
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
    feature_fusion: Literal["adaptive"] | Callable[[Tensor, Tensor], Tensor] = "adaptive",
) -> Tensor:
    """Compute ``msra_attention`` naively; see there for the arguments.

    Returns:
        ``[b, H, n, d]``.
    """
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    if num_levels == "auto":
        num_levels = 1
        while 2 * block_size * pool_factor ** (num_levels - 1) < length:
            num_levels += 1
    real = torch.ones(batch, length, dtype=torch.bool) if key_padding_mask is None else key_padding_mask.cpu()
    rotated_query = _rotate(q, [float(i) for i in range(length)], rope_base)

    logits, values = [], []
    keys, vals, mass = k, v, real.to(k.dtype).to(k.device)
    for level in range(num_levels):
        if level > 0:
            keys, vals, mass = _pool(keys, vals, mass, pool_factor, pool_query)
            if key_maps is not None:
                keys = torch.einsum("gij,bgmj->bgmi", key_maps[level - 1], keys)
            if value_maps is not None:
                vals = torch.einsum("gij,bgmj->bgmi", value_maps[level - 1], vals)
        span, count = pool_factor**level, keys.shape[2]
        rotated = _rotate(keys, [j * span + (span - 1) / 2 for j in range(count)], rope_base)
        scores = rotated_query @ rotated.repeat_interleave(heads // groups, dim=1).transpose(-1, -2) / width**0.5
        scores = scores + torch.where(mass > 0, mass, 1.0).log()[:, None, None, :]
        if level_bias is not None and feature_fusion == "adaptive":
            scores = scores + level_bias[..., level : level + 1]
        seen = [[_sees(i, j, level, block_size, pool_factor, causal) for j in range(count)] for i in range(length)]
        mask = torch.tensor(seen, device=q.device) & (mass > 0)[:, None, None, :]
        logits.append(scores.masked_fill(~mask, float("-inf")))
        values.append(vals.repeat_interleave(heads // groups, dim=1))
    if feature_fusion == "adaptive":
        return _softmax_or_zero(torch.cat(logits, dim=-1)) @ torch.cat(values, dim=2)
    available = torch.stack([(level_logits > float("-inf")).any(dim=-1) for level_logits in logits], dim=-1)
    outputs = [_softmax_or_zero(x) @ y for x, y in zip(logits, values, strict=True)]
    fused = feature_fusion(torch.stack(outputs, dim=-2), available)
    return torch.where(available.any(dim=-1, keepdim=True), fused, 0.0)


def _sees(i: int, j: int, level: int, block_size: int, pool_factor: int, causal: bool) -> bool:
    """Tell whether query i sees cell j of a level, by the borders in tokens."""
    span = pool_factor**level
    start, stop = j * span, (j + 1) * span
    block = block_size * span
    own = i // block
    if level == 0:
        return (own - 1) * block <= j and (j <= i if causal else j < (own + 2) * block)
    block_below = block_size * pool_factor ** (level - 1)
    own_below = i // block_below
    if start >= (own - 1) * block and stop <= (own_below - 1) * block_below:
        return True
    return not causal and start >= (own_below + 2) * block_below and stop <= (own + 2) * block


def _pool(
    keys: Tensor, values: Tensor, mass: Tensor, pool_factor: int, pool_query: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Summarise the cells of one level, cell by cell."""
    pooled_keys, pooled_values, pooled_mass = [], [], []
    for start in range(0, keys.shape[2], pool_factor):
        children = slice(start, start + pool_factor)
        share = mass[:, None, children]
        if pool_query is not None:
            score = torch.einsum("bgrd,gd->bgr", keys[:, :, children], pool_query)
            share = share * torch.exp(score - score.amax(dim=-1, keepdim=True))
        total = share.sum(dim=-1, keepdim=True)
        share = share / torch.where(total > 0, total, 1.0)
        pooled_keys.append((share.unsqueeze(-1) * keys[:, :, children]).sum(dim=2))
        pooled_values.append((share.unsqueeze(-1) * values[:, :, children]).sum(dim=2))
        pooled_mass.append(mass[:, children].sum(dim=1))
    return torch.stack(pooled_keys, dim=2), torch.stack(pooled_values, dim=2), torch.stack(pooled_mass, dim=1)


def _rotate(x: Tensor, positions: list[float], base: float | None) -> Tensor:
    """Rotate channel pairs (c, c + d/2) as complex numbers."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    frequencies = torch.tensor([base ** (-c / half) for c in range(half)], dtype=x.dtype, device=x.device)
    angles = torch.tensor(positions, dtype=x.dtype, device=x.device)[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _softmax_or_zero(logits: Tensor) -> Tensor:
    """Softmax over the last dimension in which rows of minus infinity give zeros."""
    dead = (logits == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(logits.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)
