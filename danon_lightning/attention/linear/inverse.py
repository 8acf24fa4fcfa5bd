"""The inverse of triangular matrices, by products of their blocks.

Solving for many right-hand sides at once is a chain of small dependent steps; products with the inverse are none, and
the transposed system needs nothing else.
"""

import torch
from torch import Tensor

__all__ = ["unit_lower_inverse"]

# On a CPU the solver of small triangular systems is slower than the products that replace it, down to about this size.
# Accelerators rather have few calls.
SMALLEST_ON_CPU = 16
SMALLEST_ON_ACCELERATORS = 64


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """Return (I + L)⁻¹, L being what is below the diagonal; the rest is not read.

    Substitution inside the smallest blocks, and from there on [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]]: as
    accurate as substitution where the inverse is not much larger than the matrix, unlike the series in powers of L,
    whose terms can be astronomic where tokens repeat and still cancel.

    Args:
        lower: ``[N, m, m]``, float32 or float64.

    Returns:
        ``[N, m, m]``, zero above the diagonal.

    Reference:
        Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 14.2 (method of blocks).
    """
    size = lower.shape[-1]
    smallest = SMALLEST_ON_CPU if lower.device.type == "cpu" else SMALLEST_ON_ACCELERATORS
    if size <= smallest or size % 2:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower)
        return torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
    half = size // 2
    ahead, behind = slice(half), slice(half, size)
    blocks = unit_lower_inverse(torch.cat([lower[:, ahead, ahead], lower[:, behind, behind]]))
    first, second = blocks.chunk(2)
    below = second @ (lower[:, behind, ahead] @ first)
    inverse = torch.zeros_like(lower)
    inverse[:, ahead, ahead] = first
    inverse[:, behind, behind] = second
    inverse[:, behind, ahead] = below.neg_()
    return inverse
