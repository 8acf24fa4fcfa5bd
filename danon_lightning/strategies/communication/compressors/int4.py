"""Four-bit codes with one scale a block."""

import torch
from torch import Tensor
from typing_extensions import override

from danon_lightning.strategies.communication.compressors.quantization import LinearQuantizer


class Int4Compressor(LinearQuantizer):
    """Linear quantization to four bits, block by block.

    Wire format: one float32 scale s = max|x| / 7 for each block, then a code c + 8 of four bits for each element, two a
    byte (the even element in the low half), zeros up to a multiple of four bytes; x̂ = c · s. That is 1/2 + 4/block_size
    bytes an element.

    Error bound: |x̂ − x| ≤ max|x| / 14 over the block, up to float32 rounding (and 8.3e-38 for blocks of subnormal
    size); twice that with stochastic rounding. A block with NaN or Inf decodes to NaN throughout. In a reduction over M
    groups the error of an element of the sum is at most
    (Σ_m max|x_m| + max|Σ_m x̂_m|) / 14 ≤ (2 + 1/14) · Σ_m max|x_m| / 14 over its block.

    Contraction: ‖x − x̂‖² ≤ (1 − δ)·‖x‖² with δ = 1 − block_size / 14², that is 0.67 for blocks of 64 (on average over
    the rounding, where that is stochastic). Blocks of 196 elements and more have no such guarantee.

    Args:
        block_size: Elements that share a scale, a multiple of 8. Shorter than for eight bits, because a single large
            value costs the others of its block more.
        stochastic: Whether to round up or down by chance, right on average: E[x̂] = x.

    Raises:
        ValueError: If ``block_size`` is not a positive multiple of 8.

    Reference:
        Dettmers and Zettlemoyer, "The case for 4-bit precision: k-bit Inference Scaling Laws", ICML 2023
        (arXiv:2212.09720), for blocks of 64; stochastic rounding: Alistarh et al., "QSGD", NeurIPS 2017
        (arXiv:1610.02132).
    """

    name = "int4"
    largest_code = 7
    codes_per_byte = 2

    def __init__(self, block_size: int = 64, stochastic: bool = False) -> None:
        """See the class."""
        super().__init__(block_size, stochastic)

    @override
    def _pack(self, codes: Tensor) -> Tensor:
        nibbles = codes.add(8).to(torch.uint8)
        if nibbles.numel() % 2:
            nibbles = torch.nn.functional.pad(nibbles, (0, 1))
        return nibbles[0::2] | (nibbles[1::2] << 4)

    @override
    def _unpack(self, packed: Tensor, numel: int) -> Tensor:
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten()[:numel].float() - 8
