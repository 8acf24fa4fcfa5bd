"""Eight-bit codes with one scale a block."""

import torch
from torch import Tensor

from danon_lightning.strategies.communication.compressors.base import BlockCompressor

_LARGEST_CODE = 127
# Below this a scale is subnormal and too coarse to divide by: such a block (all |x| < 1.5e-36) is sent as zeros.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Int8Compressor(BlockCompressor):
    """Linear quantization to int8, block by block, rounding to nearest.

    Wire format of a block: ``block_size`` int8 codes c, then one float32 scale s = max|x| / 127; x̂ = c · s. That is
    1 + 4/block_size bytes an element, in one message.

    Error bound: |x̂ − x| ≤ max|x| / 254 over the block, up to float32 rounding (and 1.5e-36 for blocks of subnormal
    size). A block with NaN or Inf decodes to non-finite values throughout, on every rank. In a reduction over M groups
    the M contributions are coded, summed in float32 and coded once more, so the error of an element of the sum is at
    most (Σ_m max|x_m| + max|Σ_m x̂_m|) / 254 ≤ (2 + 1/254) · Σ_m max|x_m| / 254 over its block.

    Args:
        block_size: Elements that share a scale, a multiple of 4.

    Raises:
        ValueError: If ``block_size`` is not a positive multiple of 4.

    Reference:
        Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016 (arXiv:1511.04561).
    """

    name = "int8"

    def __init__(self, block_size: int = 256) -> None:
        """See the class."""
        if block_size < 4 or block_size % 4:
            # The scale is read as a float32 in place, which needs four-byte alignment.
            raise ValueError(f"block_size={block_size} must be a positive multiple of 4, for instance 256")
        self.block_size = block_size
        self.block_bytes = block_size + 4

    def encode(self, blocks: Tensor) -> Tensor:
        """Code float32 ``[m, block_size]`` as uint8 ``[m, block_size + 4]``."""
        scale = block_scale(blocks, _LARGEST_CODE)
        divisor = torch.where(scale == 0, torch.inf, scale)
        codes = (blocks / divisor).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
        payload = torch.empty(len(blocks), self.block_bytes, dtype=torch.uint8, device=blocks.device)
        payload[:, : self.block_size].view(torch.int8).copy_(codes)
        payload.view(torch.float32)[:, self.block_size // 4 :].copy_(scale)
        return payload

    def decode(self, payload: Tensor) -> Tensor:
        """Restore float32 ``[m, block_size]``."""
        scale = payload.view(torch.float32)[:, self.block_size // 4 :]
        return payload[:, : self.block_size].view(torch.int8) * scale


def block_scale(blocks: Tensor, largest_code: int) -> Tensor:
    """Worth of one step of the code in each block: float32 ``[m, 1]``, non-finite where a value of the block is."""
    scale = blocks.abs().amax(dim=1, keepdim=True) / largest_code  # NaN and Inf pass through amax
    return torch.where(scale < _SMALLEST_SCALE, 0.0, scale)
