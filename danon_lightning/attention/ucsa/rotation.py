"""Rotating queries and keys of a whole sequence, piece by piece, with the same angles."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from danon_lightning.attention.recompute import is_traced
from danon_lightning.attention.rotary import apply_rotary, cell_positions, rotary_tables, rotate

__all__ = ["rotate_sequence"]

# Tokens rotated at once: few enough for what this needs on the way to stay in the cache of a processor core.
ROTATED_AT_ONCE = 1 << 10
ROTATED_AT_ONCE_ON_ACCELERATORS = 1 << 16


def rotate_sequence(q: Tensor, k: Tensor, rope_base: float | None) -> tuple[Tensor, Tensor]:
    """Return queries rotated by their positions and scaled by 1/√d, and keys rotated likewise.

    Args:
        q: ``[b, H, n, d]``.
        k: ``[b, G, n, d]``.
        rope_base: Base of the rotary embedding; ``None`` means no rotation.
    """
    scale = q.shape[-1] ** -0.5
    if rope_base is None:
        return q * scale, k
    if is_traced(q):
        positions = cell_positions(0, q.shape[-2], 1, q.device)
        return apply_rotary(q, positions, rope_base) * scale, apply_rotary(k, positions, rope_base)
    query, key = _Rotation.apply(rope_base, (scale, 1.0), q, k)
    return query, key


class _Rotation(torch.autograd.Function):
    """The gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, rope_base: float, scales: Sequence[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.rope_base, ctx.scales = rope_base, scales
        return _rotated(tensors, rope_base, scales, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_rotated(grads, ctx.rope_base, ctx.scales, back=True)


def _rotated(tensors: Sequence[Tensor], rope_base: float, scales: Sequence[float], *, back: bool) -> tuple[Tensor, ...]:
    """Rotate tensors ``[., ., n, d]`` by their positions, or back, and scale them."""
    x = tensors[0]
    count = ROTATED_AT_ONCE if x.device.type == "cpu" else ROTATED_AT_ONCE_ON_ACCELERATORS
    results = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors)
    for start in range(0, x.shape[-2], count):
        here = slice(start, start + count)
        positions = cell_positions(start, x[:, :, here].shape[-2], 1, x.device)
        tables = rotary_tables(positions, x.shape[-1], rope_base, x.dtype)
        assert tables is not None
        if back:
            tables[1].neg_()
        for tensor, result, scale in zip(tensors, results, scales, strict=True):
            result[:, :, here] = rotate(tensor[:, :, here], tables if scale == 1.0 else tables * scale)
    return results
