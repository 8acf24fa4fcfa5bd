"""Rotary position embedding at integer or fractional positions.

Reference:
    Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from danon_lightning.attention.recompute import is_traced

__all__ = ["apply_rotary", "cell_positions", "rotary_tables", "rotate"]


def cell_positions(first: int, count: int, span: int, device: torch.device) -> Tensor:
    """Return the centres, in tokens, of ``count`` consecutive cells of ``span`` tokens each.

    Args:
        first: Index of the first cell; the cell ``j`` holds the tokens from ``j * span`` on.
        count: Number of cells.
        span: Tokens a cell holds; 1 gives the positions of the tokens themselves.
        device: Where the result lives.

    Returns:
        Positions ``[count]``, float64 (float32 on devices without float64).
    """
    # In float32 the angle of position one million is off by some hundredths of a radian.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.arange(first, first + count, device=device, dtype=dtype) * span + (span - 1) / 2


def rotary_tables(positions: Tensor, width: int, base: float | None, dtype: torch.dtype) -> Tensor | None:
    """Return the cosines of the angles of each position, and the sines, for ``rotate``, which takes them scaled too.

    Args:
        positions: Positions ``[n]`` in tokens; they may be fractional.
        width: Width d of what is rotated.
        base: Base of the geometric series of wavelengths.
        dtype: Dtype of what is rotated; tables are in float32 at least.

    Returns:
        ``[2, n, d/2]``; ``None`` without a base.
    """
    if base is None:
        return None
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=positions.dtype) / width
    angles = positions.unsqueeze(-1) * base**-exponents  # [n, d/2]
    return torch.stack([angles.cos(), angles.sin()]).to(torch.promote_types(dtype, torch.float32))


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Rotate the channels of ``x [..., n, d]`` by ``rotary_tables``."""
    if is_traced(x):
        (cosine, sine), (first, second) = tables, x.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1).to(x.dtype)
    rotated: Tensor = _Rotation.apply(x, tables)
    return rotated


class _Rotation(torch.autograd.Function):
    """The rotation in three passes; the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tables: Tensor) -> Tensor:
        ctx.save_for_backward(tables)
        return _rotated(x, *tables)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tables,) = ctx.saved_tensors
        return _rotated(grad, tables[0], -tables[1]), None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    rotated = x * cosine.repeat(1, 2)
    for half, other, factor in zip(rotated.chunk(2, dim=-1), reversed(x.chunk(2, dim=-1)), (-sine, sine), strict=True):
        half.addcmul_(other, factor)
    return rotated.to(x.dtype)


def apply_rotary(x: Tensor, positions: Tensor, base: float | None) -> Tensor:
    """Rotate channel pairs of ``x`` by angles proportional to the position.

    Channel ``c`` of the first half of the head is paired with channel ``c`` of the second half, so that the product of
    a rotated query and a rotated key depends on the difference of their positions only.

    Args:
        x: Queries or keys ``[..., n, d]``, any floating dtype, d even.
        positions: Positions ``[n]`` in tokens; they may be fractional.
        base: Base of the geometric series of wavelengths; ``None`` returns ``x`` unchanged.

    Returns:
        The rotated tensor, shape and dtype of ``x``.
    """
    tables = rotary_tables(positions, x.shape[-1], base, x.dtype)
    return x if tables is None else rotate(x, tables)
