"""Four-bit codes with one scale a block."""

import torch
from torch import Tensor

from danon_lightning.strategies.communication.compressors.base import BlockCompressor
from danon_lightning.strategies.communication.compressors.int8 import block_scale

_LARGEST_CODE = 7


class Int4Compressor(BlockCompressor):
    """Linear quantization to four bits, block by block, rounding to nearest.

    Wire format of a block: ``block_size`` codes c + 8 of four bits, two a byte (the even element in the low half), then
    one float32 scale s = max|x| / 7; x̂ = c · s. That is 1/2 + 4/block_size bytes an element.

    Error bound: |x̂ − x| ≤ max|x| / 14 over the block, up to float32 rounding (and 8.3e-38 for blocks of subnormal
    size). A block with NaN or Inf decodes to non-finite values throughout. In a reduction over M groups the error of an
    element of the sum is at most (Σ_m max|x_m| + max|Σ_m x̂_m|) / 14 ≤ (2 + 1/14) · Σ_m max|x_m| / 14 over its block.

    Args:
        block_size: Elements that share a scale, a multiple of 8. Shorter than for eight bits, because a single large
            value costs the others of its block more.

    Raises:
        ValueError: If ``block_size`` is not a positive multiple of 8.

    Reference:
        Dettmers and Zettlemoyer, "The case for 4-bit precision: k-bit Inference Scaling Laws", ICML 2023
        (arXiv:2212.09720), for blocks of 64.
    """

    name = "int4"

    def __init__(self, block_size: int = 64) -> None:
        """See the class."""
        if block_size < 8 or block_size % 8:
            # The scale is read as a float32 in place, which needs four-byte alignment.
            raise ValueError(f"block_size={block_size} must be a positive multiple of 8, for instance 64")
        self.block_size = block_size
        self._code_bytes = block_size // 2
        self.block_bytes = self._code_bytes + 4

    def encode(self, blocks: Tensor) -> Tensor:
        """Code float32 ``[m, block_size]`` as uint8 ``[m, block_size / 2 + 4]``."""
        scale = block_scale(blocks, _LARGEST_CODE)
        codes = (blocks / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
        codes = codes.add_(8).nan_to_num_(8.0).to(torch.uint8)  # what a NaN becomes does not matter: its scale is NaN
        payload = torch.empty(len(blocks), self.block_bytes, dtype=torch.uint8, device=blocks.device)
        payload[:, : self._code_bytes] = codes[:, 0::2] | (codes[:, 1::2] << 4)
        payload.view(torch.float32)[:, self._code_bytes // 4 :] = scale
        return payload

    def decode(self, payload: Tensor) -> Tensor:
        """Restore float32 ``[m, block_size]``."""
        pairs = payload[:, : self._code_bytes]
        codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)
        scale = payload.view(torch.float32)[:, self._code_bytes // 4 :]
        return (codes.float() - 8) * scale
