"""Shorter floating-point numbers."""

import torch
from torch import Tensor

from danon_lightning.strategies.communication.compressors.base import BlockCompressor


class CastCompressor(BlockCompressor):
    """Each value rounded to a shorter floating-point type; subclasses say which.

    Wire format: the values themselves, two bytes each. Being of constant size, a "block" is a single value.
    """

    dtype: torch.dtype
    block_size = 1
    block_bytes = 2

    def encode(self, blocks: Tensor) -> Tensor:
        """Code float32 ``[m, 1]`` as uint8 ``[m, 2]``."""
        return blocks.to(self.dtype).view(torch.uint8)

    def decode(self, payload: Tensor) -> Tensor:
        """Restore float32 ``[m, 1]``."""
        return payload.view(self.dtype).float()


class Fp16Compressor(CastCompressor):
    """IEEE half precision: 11 significant bits.

    Error bound: |x̂ − x| ≤ 2⁻¹¹·|x| + 2⁻²⁵. Values beyond 65,504 become Inf, on every rank: use bf16, or scale the loss
    down, if gradients come near that.

    Reference:
        IEEE Std 754-2019, binary16.
    """

    name = "fp16"
    dtype = torch.float16


class Bf16Compressor(CastCompressor):
    """Brain floating point: 8 significant bits, the range of float32.

    Error bound: |x̂ − x| ≤ 2⁻⁸·|x| for normal numbers.

    Reference:
        Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training", 2019 (arXiv:1905.12322).
    """

    name = "bf16"
    dtype = torch.bfloat16
