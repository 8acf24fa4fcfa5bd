"""Overlapping windows of blocks, as views where there is no compiler that would rather copy."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from danon_lightning.attention.recompute import is_traced

__all__ = ["padded", "windows"]


def padded(x: Tensor, before: int, after: int, fill: float = 0.0) -> Tensor:
    """Fill up ``[..., m, d]`` with so many rows before and after; fewer than none after are cut off."""
    return F.pad(x, (0, 0, before, after), value=fill) if before or after else x


def windows(x: Tensor, count: int, size: int, width: int) -> Tensor:
    """Return windows of ``width`` rows, each beginning ``size`` rows after the one before.

    Args:
        x: Rows ``[b, H, m, d]``; m is a multiple of ``size`` and enough for all windows filled up to whole blocks.
        count: Number of windows c.
        size: Rows in a block.
        width: Rows w in a window.

    Returns:
        ``[b, H, c, w, d]``.
    """
    if count == 1:
        return x[:, :, :width].unsqueeze(2)
    if is_traced(x):
        blocks = x.unflatten(2, (-1, size))
        return torch.cat([blocks[:, :, i : i + count, :w] for i, w in _columns(size, width)], dim=3)
    result: Tensor = _Windows.apply(x, count, size, width)
    return result


def _columns(size: int, width: int) -> list[tuple[int, int]]:
    """Return which block of a window holds how many rows of it."""
    return [(i, min(size, width - i * size)) for i in range(-(-width // size))]


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, size: int, width: int) -> Tensor:
        ctx.sizes = x.shape, size, width
        b, h, _, d = x.stride()
        return x.as_strided((*x.shape[:2], count, width, x.shape[3]), (b, h, size * x.stride(2), x.stride(2), d))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, size, width = ctx.sizes
        total = grad.new_zeros(shape)
        blocks = total.unflatten(2, (-1, size))
        for i, w in _columns(size, width):
            blocks[:, :, i : i + grad.shape[2], :w] += grad[:, :, :, i * size : i * size + w]
        return total, None, None, None
