"""Eight-bit codes with one scale a block."""

import torch
from torch import Tensor
from typing_extensions import override

from danon_lightning.strategies.communication.compressors.quantization import LinearQuantizer


class Int8Compressor(LinearQuantizer):
    """Linear quantization to int8, block by block.

    Wire format: one float32 scale s = max|x| / 127 for each block, then one int8 code c for each element; x̂ = c · s.
    That is 1 + 4/block_size bytes an element.

    Error bound: |x̂ − x| ≤ max|x| / 254 over the block, up to float32 rounding (and 1.5e-36 for blocks of subnormal
    size); twice that with stochastic rounding. A block with NaN or Inf decodes to NaN throughout, on every rank. In a
    reduction over M groups the M contributions are coded, summed in float32 and coded once more, so the error of an
    element of the sum is at most (Σ_m max|x_m| + max|Σ_m x̂_m|) / 254 ≤ (2 + 1/254) · Σ_m max|x_m| / 254 over its block.

    Contraction: ‖x − x̂‖² ≤ (1 − δ)·‖x‖² with δ = 1 − block_size / 254², that is 0.996 (on average over the rounding,
    where that is stochastic): the greatest element alone is 254 times as large as any error.

    Args:
        block_size: Elements that share a scale, a multiple of 4.
        stochastic: Whether to round up or down by chance, right on average: E[x̂] = x.

    Raises:
        ValueError: If ``block_size`` is not a positive multiple of 4.

    Reference:
        Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016 (arXiv:1511.04561); stochastic
        rounding: Alistarh et al., "QSGD", NeurIPS 2017 (arXiv:1610.02132).
    """

    name = "int8"
    largest_code = 127
    codes_per_byte = 1

    def __init__(self, block_size: int = 256, stochastic: bool = False) -> None:
        """See the class."""
        super().__init__(block_size, stochastic)

    @override
    def _pack(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int8).view(torch.uint8)

    @override
    def _unpack(self, packed: Tensor, numel: int) -> Tensor:
        return packed.view(torch.int8).float()
