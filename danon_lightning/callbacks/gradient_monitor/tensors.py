"""Statistics of many tensors in few operations, none of which waits for a device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def values_of(gradient: Tensor) -> Tensor:
    """What there is to count in a gradient: of a sparse one its values, of a complex one real and imaginary parts."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """2-norm of each tensor: one call for all of a data type. Those of 16 bits are added up in float32."""
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        indices = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
        wider = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        norms = torch._foreach_norm([tensors[index] for index in indices], 2, wider)
        found.update(zip(indices, norms, strict=True))
    return [found[index] for index in range(len(tensors))]


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """float64, wherever there is such a thing: squares of large norms do not fit float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def sums(numbers: Sequence[Tensor], layers: Tensor, size: int, *, squared: bool = False) -> Tensor:
    """Add scalars up by layer.

    Args:
        numbers: Scalars, on any devices.
        layers: The layer of each, as an integer; the result is on its device.
        size: Number of layers.
        squared: Whether to add up their squares.

    Returns:
        [size].
    """
    device = layers.device
    dtype = accumulator_dtype(device)
    total = torch.zeros(size, dtype=dtype, device=device)
    if numbers:
        stacked = torch.stack([number.to(device) for number in numbers]).to(dtype)
        total.index_add_(0, layers, stacked.square() if squared else stacked)
    return total


def nonzero_counts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Number of elements other than zero of each, one after another: no call counts exactly in many tensors at once."""
    return [torch.count_nonzero(tensor.bool()) for tensor in tensors]  # half the time of counting numbers


def nonfinite_counts(tensors: Sequence[Tensor], norms: Sequence[Tensor]) -> list[Tensor]:
    """Number of infinite or undefined elements of each.

    Args:
        tensors: One after another: counting takes a copy of each.
        norms: Theirs. On the host, where that does not wait for anything, a finite norm spares the counting.
    """
    nothing = torch.zeros((), dtype=torch.int64)
    counts = []
    for tensor, norm in zip(tensors, norms, strict=True):
        if tensor.device.type == "cpu" and bool(norm.isfinite()):
            counts.append(nothing)
        else:
            counts.append(torch.count_nonzero(tensor * 0))  # 0 · inf and 0 · NaN are NaN, which is not zero
    return counts
