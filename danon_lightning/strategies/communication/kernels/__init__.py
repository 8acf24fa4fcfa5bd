"""Small C++ loops for CPUs, compiled on first use, whose results equal eager torch's to the bit.

Without a compiler, on other systems than Linux, on other devices, or with ``DANON_KERNELS=0`` in the environment, torch
does the same in more passes over memory. Ranks with and without kernels can therefore train together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from danon_lightning.strategies.communication.kernels import loading
from danon_lightning.strategies.communication.kernels.loading import address, addresses, library_for


def available() -> bool:
    """Whether compiled kernels serve CPU tensors in this process. The first call may compile them, for seconds."""
    return loading.library() is not None


def copy(out: Tensor, source: Tensor) -> None:
    """Copy ``source [n]`` to ``out [n]``, past the caches: for what this core does not read again soon.

    Args:
        out: Any type.
        source: Any type, on the same device.
    """
    loops = library_for(out, source) if out.dtype == source.dtype == torch.float32 else None
    if loops is not None:
        loops.danon_copy(address(out), address(source), out.numel())
    else:
        out.copy_(source)


def add_scaled(out: Tensor, sources: Sequence[Tensor], scale: float) -> bool | Tensor:
    """Write ``(sources[0] + sources[1] + …) · scale`` to ``out``, added in this order in float32.

    Args:
        out: Float32 ``[n]``. It may be the memory of ``sources[0]``, but of no other source.
        sources: At least one tensor ``[n]`` of any floating-point type, on the device of ``out``.
        scale: A factor, rounded to float32.

    Returns:
        Whether all of ``out`` is finite: a bool for CPU tensors; elsewhere a bool tensor without dimensions, for which
        the host has not waited.
    """
    loops = library_for(out, *sources) if all(source.dtype == torch.float32 for source in sources) else None
    if loops is not None:
        return bool(loops.danon_add_scaled(address(out), addresses(sources), len(sources), out.numel(), scale))
    out.copy_(sources[0])
    for source in sources[1:]:
        out.add_(source)
    return all_finite(out.mul_(scale))


def all_finite(values: Tensor) -> bool | Tensor:
    """Whether all of ``values`` (any floating-point type) is finite.

    Returns:
        As for :func:`add_scaled`.
    """
    if values.device.type != "cpu":
        return torch.isfinite(values).all()
    # A sum takes a fraction of the time of a look at each; it is finite unless an element is not, or it overflows.
    return bool(values.sum().isfinite()) or bool(torch.isfinite(values).all())


__all__ = ["add_scaled", "address", "addresses", "all_finite", "available", "copy", "library_for"]
