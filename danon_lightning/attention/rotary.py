"""Rotary position embedding at integer or fractional positions.

Reference:
    Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
"""

import torch
from torch import Tensor

__all__ = ["apply_rotary", "cell_positions"]


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
    if base is None:
        return x
    width = x.shape[-1]
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=positions.dtype) / width
    angles = positions.unsqueeze(-1) * base**-exponents  # [n, d/2]
    table_dtype = torch.promote_types(x.dtype, torch.float32)
    cosine, sine = angles.cos().to(table_dtype), angles.sin().to(table_dtype)
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return rotated.to(x.dtype)
