"""The largest elements, and where they are."""

import ctypes
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from danon_lightning.strategies.communication import kernels
from danon_lightning.strategies.communication.compressors.base import Compressor, Context

_SAMPLE = 8192  # elements looked at for a new threshold
_SMALLEST_THRESHOLD = 1e-38  # also with nothing but zeros
# Error feedback piles values up just below the threshold, so the correction must be slow. Even so, gradients that
# hardly change from step to step make the number that passes swing (between 0.6 and 1.8 times k where signal and noise
# are of one size): a threshold that strayed so far is given up for a new sample.
_EXPONENT = 0.04
_TRUSTED_FILL = (0.7, 1.4)
_POISONED = -1


class TopKCompressor(Compressor):
    """Sends k = ⌈density · n⌉ of n elements, none of them below a threshold. Made for error feedback.

    The threshold is estimated from every (n / 8192)-th element, kept for the next step, corrected by the share of
    elements that passed it, and estimated anew when that strays too far from k. The search begins at another place each
    step, so that where more than k elements pass, none waits for ever. A fresh exact selection would take longer than
    the transfer it saves. Outside of CPUs, choosing a threshold makes the host wait for the device.

    Wire format: int32 count c ≤ k, int32 zero, k int32 indices relative to the region, k float32 values; what lies
    beyond c is zero. That is 8 + 8k bytes. Where k ≥ n / 2 the message is 8 bytes and all n values, exact and shorter.
    The count of a region with a NaN or Inf is −1: it decodes to NaN throughout.

    Error: what is sent is exact. Where all elements that passed the threshold were sent,
    ‖x − C(x)‖² ≤ (1 − δ)·‖x‖² with δ = c/n, and c = k in a region of at most 8192 elements with a fresh threshold and
    without ties. Where more passed, c = k of them are sent, whichever come first: that costs at most what these k could
    have been larger, and what is left comes back through error feedback. There is no bound for a single step then.

    Args:
        density: Share of the elements that is sent, in (0, 1].
        warmup_steps: Exchanges over which the density falls exponentially from ``warmup_density`` to ``density``.
        warmup_density: Density at the first exchange, if there are warm-up steps.

    Raises:
        ValueError: If a density lies outside (0, 1], ``warmup_steps`` is negative, or warm-up would begin below
            ``density``.

    Reference:
        Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017 (arXiv:1704.05021); Lin et
        al., "Deep Gradient Compression", ICLR 2018 (arXiv:1712.01887), for thresholds from samples and the warm-up.
    """

    name = "topk"
    exchange: ClassVar[Literal["reduce", "gather"]] = "gather"
    needs_error_feedback = True

    def __init__(self, density: float = 0.01, warmup_steps: int = 0, warmup_density: float = 0.25) -> None:
        """See the class."""
        for argument, value in (("density", density), ("warmup_density", warmup_density)):
            if not 0 < value <= 1:
                raise ValueError(f"{argument}={value} must lie in (0, 1]: it is the share of elements to send, as 0.01")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} must be 0 (no warm-up) or a number of exchanges")
        if warmup_steps and warmup_density < density:
            raise ValueError(f"warmup_density={warmup_density} must be at least density={density}, where warm-up ends")
        self.density = density
        self.warmup_steps = warmup_steps
        self.warmup_density = warmup_density

    def density_at(self, step: int) -> float:
        """Share of the elements that is sent at exchange number ``step``, counted from 0."""
        if step >= self.warmup_steps:
            return self.density
        return self.density * math.pow(self.warmup_density / self.density, 1 - step / self.warmup_steps)

    @override
    def payload_bytes(self, numel: int, step: int) -> int:
        """Eight bytes an element sent and eight beside, or all values where that is less."""
        return 8 + min(8 * self._k(numel, step), 4 * numel)

    @override
    def prefers_dense(self, step: int, groups: int) -> bool:
        """From about 1 + 1 / (4 · density) senders on, receiving all their messages takes longer than a reduction."""
        return 4 * self.density_at(step) * (groups - 1) >= 1

    @override
    def encode(self, values: Tensor, payload: Tensor, context: Context) -> None:
        """Select, without a residual. ``context.state["threshold"]`` is the one to begin with, if any."""
        self._encode(values, None, 0.0, None, payload, context)

    @override
    def encode_with_feedback(
        self, values: Tensor, residual: Tensor, decay: float, new_residual: Tensor, payload: Tensor, context: Context
    ) -> None:
        """Select; the new residual is zero where an element was sent, and untouched elsewhere."""
        self._encode(values, residual, decay, new_residual, payload, context)

    @override
    def decode(self, payload: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Scatter.

        Raises:
            ValueError: If the message is damaged: its count or an index is out of bounds.
        """
        numel, count = out.numel(), int(payload[:4].view(torch.int32))
        if not add:
            out.zero_()
        if count == _POISONED:
            out.fill_(torch.nan)
            return
        if payload.numel() == 8 + 4 * numel:
            out.add_(payload[8:].view(torch.float32))
            return
        k = (payload.numel() - 8) // 8
        if not 0 <= count <= k:
            raise ValueError(f"damaged Top-K message: it holds {count} elements of at most {k}")
        indices, numbers = payload[8 : 8 + 4 * k].view(torch.int32)[:count], payload[8 + 4 * k :].view(torch.float32)
        loops = kernels.library_for(payload, out)
        if loops is not None:
            at, of = kernels.address(payload, 8), kernels.address(payload, 8 + 4 * k)
            intact = bool(loops.danon_scatter_add(at, of, count, numel, kernels.address(out)))
        else:
            intact = not bool(((indices < 0) | (indices >= numel)).any())
            if intact:
                out.index_add_(0, indices.long(), numbers[:count])
        if not intact:
            raise ValueError(f"damaged Top-K message: an index lies outside the region's {numel} elements")

    def _k(self, numel: int, step: int) -> int:
        return max(1, math.ceil(self.density_at(step) * numel))

    def _encode(
        self,
        values: Tensor,
        residual: Tensor | None,
        decay: float,
        new_residual: Tensor | None,
        payload: Tensor,
        context: Context,
    ) -> None:
        numel, k = values.numel(), self._k(values.numel(), context.step)
        payload.zero_()
        if 2 * k >= numel:
            finite = _send_all(values, residual, decay, new_residual, payload)
        else:
            threshold = _rounded(context.state.get("threshold") or _sampled_threshold(values, residual, decay, k))
            passed = _select(values, residual, decay, new_residual, payload, threshold, _start(context.step, numel), k)
            finite = passed is not None
            if passed is not None and _TRUSTED_FILL[0] < passed / k < _TRUSTED_FILL[1]:
                context.new_state["threshold"] = threshold * (passed / k) ** _EXPONENT
        if not finite:
            payload.zero_()
            payload[:4].view(torch.int32).fill_(_POISONED)
            if new_residual is not None:
                new_residual.fill_(torch.nan)


def _rounded(threshold: Tensor | float) -> float:
    """The threshold as a float32, by which all implementations compare."""
    return ctypes.c_float(max(float(threshold), _SMALLEST_THRESHOLD)).value


def _start(step: int, numel: int) -> int:
    """Where the search begins: multiples of the golden ratio spread over the region. A multiple of 16, for speed."""
    fraction = step * 0x9E3779B1 % 2**32  # of 2^32
    return (fraction * numel >> 32) // 16 * 16


def _sampled_threshold(values: Tensor, residual: Tensor | None, decay: float, k: int) -> float:
    """The magnitude that about k elements reach."""
    numel = values.numel()
    # Odd: every 2^i-th element would be from a few columns of a matrix only.
    stride = max(1, numel // _SAMPLE) | 1
    sample = values[::stride]
    if residual is not None:
        sample = residual[::stride] * decay + sample
    rank = math.ceil(k * sample.numel() / numel)
    return float(sample.abs().kthvalue(sample.numel() - rank + 1).values)


def _send_all(
    values: Tensor, residual: Tensor | None, decay: float, new_residual: Tensor | None, payload: Tensor
) -> bool:
    """Fill the message with all values; return whether they are finite."""
    numbers = payload[8:].view(torch.float32)
    numbers.copy_(values if residual is None else residual * decay + values)
    payload[:4].view(torch.int32).fill_(values.numel())
    if new_residual is not None:
        new_residual.zero_()
    return bool(kernels.all_finite(numbers))


def _select(
    values: Tensor,
    residual: Tensor | None,
    decay: float,
    new_residual: Tensor | None,
    payload: Tensor,
    threshold: float,
    start: int,
    k: int,
) -> int | None:
    """Fill the message with the first k elements that pass; return how many would, or None if not all are finite."""
    loops = kernels.library_for(values, residual, new_residual, payload)
    if loops is not None:
        passed = ctypes.c_int64()
        count = loops.danon_select(
            *(kernels.address(values), kernels.address(residual), decay, kernels.address(new_residual)),
            *(values.numel(), threshold, start, k),
            *(kernels.address(payload, 8), kernels.address(payload, 8 + 4 * k), ctypes.byref(passed)),
        )
        payload[:4].view(torch.int32).fill_(count)
        return None if count < 0 else passed.value
    total = values if residual is None else residual * decay + values
    passing = (total.abs() >= threshold).nonzero().flatten()
    split = int((passing < start).sum())
    chosen = torch.cat([passing[split:], passing[:split]])[:k]
    count = len(chosen)
    payload[:4].view(torch.int32).fill_(count)
    payload[8 : 8 + 4 * k].view(torch.int32)[:count] = chosen.to(torch.int32)
    payload[8 + 4 * k :].view(torch.float32)[:count] = total[chosen]
    if new_residual is not None:
        new_residual.copy_(total)
        new_residual[chosen] = 0
    return len(passing) if kernels.all_finite(total) else None
