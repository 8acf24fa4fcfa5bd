"""Shorter floating-point numbers."""

import torch
from torch import Tensor
from typing_extensions import override

from danon_lightning.strategies.communication.compressors.base import Compressor, Context


class CastCompressor(Compressor):
    """Each value rounded to a shorter floating-point type; subclasses say which.

    Wire format: the values themselves, two bytes each.
    """

    dtype: torch.dtype

    @override
    def payload_bytes(self, numel: int, step: int) -> int:
        """Two bytes an element."""
        return 2 * numel

    @override
    def encode(self, values: Tensor, payload: Tensor, context: Context) -> None:
        """Round."""
        payload.view(self.dtype).copy_(values)

    @override
    def decode(self, payload: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Widen."""
        if add:
            out.add_(payload.view(self.dtype))
        else:
            out.copy_(payload.view(self.dtype))


class Fp16Compressor(CastCompressor):
    """IEEE half precision: 11 significant bits.

    Error bound: |x̂ − x| ≤ 2⁻¹¹·|x| + 2⁻²⁵. Values beyond 65,504 become Inf, on every rank: use bf16, or scale the loss
    down, if gradients come near that.

    Contraction: ‖x − x̂‖² ≤ (1 − δ)·‖x‖² with δ = 1 − 2⁻²² where all 6.2e-5 ≤ |x| ≤ 65,504; smaller values may vanish.

    Reference:
        IEEE Std 754-2019, binary16.
    """

    name = "fp16"
    may_overflow = True
    dtype = torch.float16


class Bf16Compressor(CastCompressor):
    """Brain floating point: 8 significant bits, the range of float32.

    Error bound: |x̂ − x| ≤ 2⁻⁸·|x| for normal numbers. (Numbers within 2⁻⁸ of the largest float32 become Inf.)

    Contraction: ‖x − x̂‖² ≤ (1 − δ)·‖x‖² with δ = 1 − 2⁻¹⁶ for normal numbers.

    Reference:
        Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training", 2019 (arXiv:1905.12322).
    """

    name = "bf16"
    dtype = torch.bfloat16
