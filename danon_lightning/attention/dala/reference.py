"""DALA's softmax written as its definition reads: one softmax over an explicit matrix of n queries x n keys.

It shares no code with the fast form, costs O(n²) and exists to check it, in float64.
"""

import math

import torch
from torch import Tensor

__all__ = ["dala_attention_reference"]


def dala_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_importance: Tensor,
    block_size: int,
    memory_size: int,
    distance_decay: Tensor,
    window_width: Tensor | float,
    importance_threshold: float = 0.0,
    recency: float = 1e-3,
    memory_bias: Tensor | None = None,
    selection_bias: Tensor | None = None,
    rope_base: float | None = 10000.0,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Compute ``dala_attention`` naively; see there for the arguments.

    Returns:
        ``[b, H, n, d]``.
    """
    batch, heads, length, width = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    real = torch.ones(batch, length, dtype=torch.bool) if key_padding_mask is None else key_padding_mask.cpu()
    blocks = -(-length // block_size)
    widths = torch.as_tensor(window_width, dtype=q.dtype, device=q.device)
    widths = widths.unsqueeze(-1) if widths.dim() == 1 else widths
    widths = widths.expand(heads, blocks).repeat_interleave(block_size, dim=1)[:, :length]

    position = torch.arange(length, device=q.device)
    distance = (position[:, None] - position[None, :]).to(q.dtype)
    near = _rotate(q, rope_base) @ _rotate(k, rope_base).transpose(-1, -2) / width**0.5
    near = near - distance_decay[:, None, None] * distance - distance**2 / (2 * widths[..., None] ** 2)
    far = q @ k.transpose(-1, -2) / width**0.5
    if memory_bias is not None:
        far = far + memory_bias[..., None]

    local, remembered = torch.zeros(2, batch, length, length, dtype=torch.bool)
    for row in range(batch):
        scores = [log_importance[row, j].item() + recency * j for j in range(length)]
        if selection_bias is not None:
            scores = [score + selection_bias[row, j].item() for j, score in enumerate(scores)]
        worthy = [real[row, j] and math.exp(log_importance[row, j].item()) >= importance_threshold for j in position]
        for i in range(length):
            start = max(0, (i // block_size - 1) * block_size)
            local[row, i, start : i + 1] = real[row, start : i + 1]
            old = sorted((j for j in range(start) if worthy[j]), key=lambda j: (scores[j], j), reverse=True)
            remembered[row, i, old[:memory_size]] = True
    local, remembered = (x.unsqueeze(1).to(q.device) for x in (local, remembered))
    logits = torch.where(local, near, far) + log_importance[:, None, None, :]
    logits = logits.masked_fill(~(local | remembered), float("-inf"))
    blind = (logits == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(logits.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0) @ v


def _rotate(x: Tensor, base: float | None) -> Tensor:
    """Rotate channel pairs (c, c + d/2) as complex numbers."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    frequencies = torch.tensor([base ** (-c / half) for c in range(half)], dtype=x.dtype, device=x.device)
    angles = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
