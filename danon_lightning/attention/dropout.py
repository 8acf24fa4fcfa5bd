"""Dropout that is the same each time, for what is computed again in the backward pass."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Keep", "dropout_factors"]

# Gives the factors of attention weights of a shape and dtype.
Keep: TypeAlias = Callable[[torch.Size, torch.dtype], Tensor]


def dropout_factors(dropout_p: float, seed: int, device: torch.device) -> Keep:
    """Return a function that gives what attention weights are multiplied with, the same in every pass of this seed."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def keep(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        kept = torch.rand(shape, device=device, generator=generator) >= dropout_p
        return kept.to(dtype).div_(1.0 - dropout_p)

    return keep
