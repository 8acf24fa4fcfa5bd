"""A random choice of elements, the same on all ranks."""

import math
from collections.abc import Generator

import torch
from torch import Tensor
from typing_extensions import override

from danon_lightning.strategies.communication.compressors.base import Context, LinearCompressor


class RandomKCompressor(LinearCompressor):
    """Sends k = ⌈density · n⌉ of n elements, drawn anew at each step and alike on all ranks, so no index travels.

    Elements are drawn by strata: the region is cut into k runs of equal length (up to one element), and each run gives
    one, every element of it with the same probability. That takes O(k), and no element is drawn twice.

    Wire format: k float32 values. They are summed over the ranks in place of the gradient.

    Error: with error feedback a part of the gradient is sent unchanged, and E‖x − C(x)‖² ≤ (1 − δ)·‖x‖² with
    δ = 1/⌈n/k⌉. Without it each value is multiplied by the length of its run: then E[C(x)] = x (unbiased), at a
    variance of up to ⌈n/k⌉ − 1 times x².

    Args:
        density: Share of the elements that is sent, in (0, 1].

    Raises:
        ValueError: If ``density`` lies outside (0, 1].

    Reference:
        Wangni et al., "Gradient Sparsification for Communication-Efficient Distributed Optimization", NeurIPS 2018
        (arXiv:1710.09854); with error feedback: Stich et al., "Sparsified SGD with Memory", NeurIPS 2018
        (arXiv:1809.07599).
    """

    name = "randomk"
    num_rounds = 1

    def __init__(self, density: float = 0.01) -> None:
        """See the class."""
        if not 0 < density <= 1:
            raise ValueError(f"density={density} must lie in (0, 1]: it is the share of elements to send, such as 0.01")
        self.density = density

    @override
    def code_numel(self, shape: torch.Size) -> int | None:
        """Number of elements that are drawn."""
        numel = shape.numel()
        return max(1, math.ceil(self.density * numel))

    @override
    def rounds(self, values: Tensor, context: Context, *, feedback: bool) -> Generator[Tensor, Tensor, Tensor]:
        """One round: the drawn values."""
        flat = values.view(-1)
        chosen, runs = self._draw(flat, context)
        mine = flat[chosen]
        if not feedback:
            return (yield mine * runs)
        flat[chosen] = 0
        return (yield mine)

    @override
    def decode(self, code: Tensor, out: Tensor, context: Context) -> None:
        """Put the values back; zero elsewhere."""
        flat = out.view(-1)
        chosen, _ = self._draw(flat, context)
        flat.zero_()
        flat[chosen] = code

    def _draw(self, flat: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Indices of the drawn elements and the lengths of their runs, both ``[k]``."""
        k = self.code_numel(flat.shape)
        assert k is not None
        # Integers throughout: rounding must not make runs meet. Drawn on the CPU, where all devices agree.
        edges = torch.arange(k + 1, dtype=torch.int64) * flat.numel() // k
        runs = edges.diff()
        uniform = torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(context.shared_seed))
        chosen = edges[:-1] + (uniform * runs).long()
        return chosen.to(flat.device), runs.to(flat.device, flat.dtype)
