"""The healthy check: all norms of a step, read from the device at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Named: TypeAlias = tuple[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """What was read in a step.

    Attributes:
        names: Of the parameters that have a gradient.
        norms: L2 norms of their gradients, ``[parameters]``: NaN or Inf where a gradient is not finite.
        losses: Of the backward passes of the step, in their order.
        weights: Largest absolute values of parameters by name; empty in steps in which they are not read.
        inputs: L2 norms of the tensors of a batch by path; empty in steps in which they are not read.
    """

    names: tuple[str, ...]
    norms: NDArray[np.float64]
    losses: tuple[float, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, float] = field(default_factory=dict)

    @property
    def total_norm(self) -> float:
        """L2 norm of all gradients together."""
        return float(np.sqrt(np.square(self.norms).sum()))

    @property
    def gradients_finite(self) -> bool:
        """Whether all norms are finite. (A norm can overflow where gradients do not: :func:`not_finite` tells.)"""
        return bool(np.isfinite(self.norms).all())

    @property
    def losses_finite(self) -> bool:
        """Whether all losses are finite."""
        return bool(np.isfinite(self.losses).all())


def read(
    gradients: Sequence[Named],
    losses: Sequence[Tensor] = (),
    *,
    weights: Sequence[Named] = (),
    inputs: Sequence[Named] = (),
    scale: float = 1.0,
) -> Reading:
    """Take norms with one fused operation for each kind of tensor, and read all of them at once.

    Args:
        gradients: Of any shape, on any device; what is sharded (a DTensor) counts with the part that lies here.
        losses: Scalars, or tensors that are summed.
        weights: To take the largest absolute value of.
        inputs: To take the norm of.
        scale: By which gradients and losses are still multiplied, for a gradient scaler.
    """
    tensors = _norms([tensor for _, tensor in gradients])
    tensors += [_scalar(loss) for loss in losses]
    tensors += _largest([tensor for _, tensor in weights])
    tensors += _norms([tensor for _, tensor in inputs])
    values = _read(tensors)
    ends = np.cumsum([len(gradients), len(losses), len(weights)])
    norms, of_losses, of_weights, of_inputs = np.split(values, ends)
    return Reading(
        names=tuple(name for name, _ in gradients),
        norms=norms / scale,
        losses=tuple((of_losses / scale).tolist()),
        weights=dict(zip([name for name, _ in weights], of_weights.tolist(), strict=True)),
        inputs=dict(zip([name for name, _ in inputs], of_inputs.tolist(), strict=True)),
    )


def not_finite(tensors: Iterable[Named]) -> list[str]:
    """Names of the tensors that hold NaN or Inf. One read; slower than norms, for when something is wrong."""
    named = [(name, _plain(tensor)) for name, tensor in tensors]
    flags = _read([torch.isfinite(tensor).all().float() for _, tensor in named])
    return [name for (name, _), flag in zip(named, flags, strict=True) if not flag]


def _plain(tensor: Tensor) -> Tensor:
    """The numbers that lie here."""
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norms, in the order given; of half precision in float32, which they would overflow."""
    plain = [_plain(tensor) for tensor in tensors]
    result: list[Tensor] = plain.copy()
    for is_half in (True, False):
        for device in {tensor.device for tensor in plain}:
            which = [i for i, t in enumerate(plain) if t.device == device and (t.itemsize <= 2) == is_half]
            if which:
                dtype = torch.float32 if is_half else None
                for i, norm in zip(which, torch._foreach_norm([plain[i] for i in which], 2, dtype), strict=True):
                    result[i] = norm
    return result


def _largest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Largest absolute values; NaN if there is one."""
    plain = [_plain(tensor) for tensor in tensors]
    if any(tensor.is_cuda for tensor in plain):
        return [norm for t in plain for norm in torch._foreach_norm([t if t.numel() else t.new_zeros(1)], torch.inf)]
    # On the CPU the fused norm is ten times slower than two extremes.
    extremes = [torch.aminmax(t if t.numel() else t.new_zeros(1)) for t in plain]
    return [torch.maximum(-low, high) for low, high in extremes]


def _scalar(loss: Tensor) -> Tensor:
    loss = _plain(loss)
    return loss if loss.dim() == 0 else loss.sum()


def _read(tensors: Sequence[Tensor]) -> NDArray[np.float64]:
    """All scalars in one copy to the host, ``[len(tensors)]``."""
    if not tensors:
        return np.empty(0)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    device = tensors[0].device
    exact = any(dtype is torch.float64 for _, dtype in kinds)
    dtype = torch.float64 if exact else torch.float32
    stacked = [torch.stack([tensors[i] for i in which]).to(device, dtype) for which in kinds.values()]
    order = [i for which in kinds.values() for i in which]
    values = np.empty(len(tensors))
    values[order] = (stacked[0] if len(stacked) == 1 else torch.cat(stacked)).cpu().numpy()
    return values
