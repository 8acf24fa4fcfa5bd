"""Memory that is used again and again: to get it from the system each time costs more than to work in it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Scratch"]


class Scratch:
    """Tensors by name, each in the place of the one that was taken under that name before."""

    def __init__(self) -> None:
        """Begin without any."""
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor with anything in it.

        Args:
            name: What it is for.
            shape: Its shape.
            dtype: Its dtype.
            device: Where it lies; always the same.
        """
        size = math.prod(shape)
        held = self._held.pop(name, None)
        if held is None or held.dtype != dtype or held.numel() < size:
            held = None  # given back before there is another one
            held = torch.empty(size, dtype=dtype, device=device)
        self._held[name] = held
        return held[:size].view(*shape)
