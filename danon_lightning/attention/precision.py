"""Keeping autocast away from what needs the precision it has."""

import contextlib
from contextlib import AbstractContextManager

import torch

__all__ = ["without_autocast"]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products keep the dtype of their operands, on devices without autocast too."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
