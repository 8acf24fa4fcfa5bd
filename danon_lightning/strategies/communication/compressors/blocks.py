"""What the codes that share a scale between neighbouring elements have in common."""

import torch
from torch import Tensor

# Below this a scale is subnormal and too coarse to divide by: such a block is sent as zeros.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def num_blocks(numel: int, block_size: int) -> int:
    """Blocks of ``numel`` elements; the last may be shorter."""
    return -(-numel // block_size)


def whole_words(num_bytes: int) -> int:
    """``num_bytes`` rounded up to a multiple of four."""
    return -(-num_bytes // 4) * 4


def as_blocks(values: Tensor, block_size: int) -> Tensor:
    """``[n]`` as ``[num_blocks, block_size]``, the last filled up with zeros; a view where nothing is missing."""
    missing = -values.numel() % block_size
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, block_size)


def usable_scale(scale: Tensor) -> Tensor:
    """``scale``, but zero where it is subnormal and NaN where it is not finite: that spoils its whole block."""
    scale = torch.where(scale < _SMALLEST_SCALE, 0.0, scale)
    return torch.where(torch.isfinite(scale), scale, torch.nan)


def write_scaled(decoded: Tensor, out: Tensor, add: bool) -> None:
    """Put decoded blocks ``[num_blocks, block_size]`` into ``out`` ``[n]``, or add them."""
    flat = decoded.flatten()[: out.numel()]
    if add:
        out.add_(flat)
    else:
        out.copy_(flat)
