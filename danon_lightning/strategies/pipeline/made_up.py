"""Running a block that cannot be run on shapes alone, for the shapes of its results."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from danon_lightning.strategies.pipeline.absent import Absent
from danon_lightning.strategies.pipeline.slots import find_slots
from danon_lightning.strategies.pipeline.torch_internals import flatten, unflatten

# Of parameters; like the usual initializations, so that nothing overflows.
_SCALE = 0.02


def call_with_made_up_values(
    block: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Run a block on random values in the place of absent ones.

    Blocks may look at values (mixtures of experts do). On their own stage that is no problem, since all is there.

    Args:
        block: The block, whose parameters and buffers are absent.
        forward: What runs it.
        args: Its arguments, absent tensors among them.
        kwargs: The others.

    Returns:
        What it returns, and the arguments that it got.
    """
    slots = list(find_slots(block).values())
    kept = [slot.get() for slot in slots]
    leaves, structure = flatten((args, kwargs))
    # A copy is no leaf: like the true one, it may be changed in place.
    made_up = [_random(leaf, 1).clone() if isinstance(leaf, Absent) else leaf for leaf in leaves]
    made_up_args, made_up_kwargs = unflatten(made_up, structure)
    try:
        for slot, tensor in zip(slots, kept, strict=True):
            if isinstance(tensor, Absent):
                made = _random(tensor, _SCALE)
                slot.put(nn.Parameter(made, made.requires_grad) if slot.is_parameter else made)
        return forward(*made_up_args, **made_up_kwargs), (made_up_args, made_up_kwargs)
    finally:
        for slot, tensor in zip(slots, kept, strict=True):
            slot.put(tensor)


def _random(absent: Tensor, scale: float) -> Tensor:
    """Random floating-point numbers, or zeros of another type, like an absent tensor."""
    made = torch.zeros(absent.shape, dtype=absent.dtype, device=absent.device)
    if made.is_floating_point():
        made.normal_(std=scale)
    return made.requires_grad_(absent.requires_grad)
