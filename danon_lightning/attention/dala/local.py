"""The local window: how its logits fall off with the distance, for each head and block."""

import torch
from torch import Tensor

from danon_lightning.attention.merging import MASKED
from danon_lightning.attention.precision import without_autocast

__all__ = ["distance_coefficients", "distance_powers", "local_bias"]


def distance_coefficients(distance_decay: Tensor, window_width: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Return what the distance, its square and the mask are multiplied with.

    Args:
        distance_decay: λ ``[H]``.
        window_width: w, a number or of shape ``[]``, ``[H]`` or ``[H, blocks]``.
        dtype: Dtype of the result.

    Returns:
        -λ, -1 / (2w²) and 1, ``[H, blocks, 3]``; one block stands for all where the width is the same in all.
    """
    width = torch.as_tensor(window_width, dtype=dtype, device=distance_decay.device)
    if width.dim() < 2:
        width = width.expand(len(distance_decay)).unsqueeze(-1)
    slope = distance_decay.to(dtype).unsqueeze(-1).expand_as(width)
    return torch.stack([-slope, -0.5 / width.square(), torch.ones_like(width)], dim=-1)


def local_bias(coefficients: Tensor, distances: Tensor) -> Tensor:
    """Return -λΔ - Δ² / (2w²), and ``MASKED`` where Δ < 0.

    As a product of matrices, so that the gradients of λ and w are products too, without a tensor of the size of the
    bias for each power of the distance.

    Args:
        coefficients: From ``distance_coefficients`` ``[..., 3]``.
        distances: Δ, positions of queries minus positions of keys ``[m, w]``, integer.

    Returns:
        ``[..., m, w]``.
    """
    # Biases of dozens would lose their fraction in bfloat16.
    with without_autocast(coefficients.device):
        return (coefficients @ distance_powers(distances, coefficients.dtype)).unflatten(-1, distances.shape)


def distance_powers(distances: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what ``distance_coefficients`` are multiplied with ``[3, m·w]``: Δ, Δ², and ``MASKED`` where Δ < 0."""
    past = distances.clamp(min=0).to(dtype)
    future = torch.where(distances < 0, MASKED, 0.0).to(past)
    return torch.stack([past, past.square(), future]).flatten(1)
