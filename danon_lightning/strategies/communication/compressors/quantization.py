"""Linear quantization with one scale a block: what int8 and int4 share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from danon_lightning.strategies.communication import kernels
from danon_lightning.strategies.communication.compressors.base import Compressor, Context
from danon_lightning.strategies.communication.compressors.blocks import (
    as_blocks,
    num_blocks,
    usable_scale,
    whole_words,
    write_scaled,
)


class LinearQuantizer(Compressor):
    """Integers c = round(x · (1/s)) with |c| ≤ ``largest_code``; x̂ = c · s. Here s = max|x| / ``largest_code`` over the
    block, and 1/s is rounded first: to multiply takes half as long as to divide.

    Wire format: the float32 scales of all blocks, then the codes of the real elements, then zeros up to a multiple of
    four bytes. The last block may be shorter than the others; its scale is that of its real elements.

    Rounding is to nearest, ties to even, or stochastic: up with the probability of the part cut off, so that E[x̂] = x
    (up to float32 rounding), for twice the greatest error.

    Subclasses set ``largest_code`` and ``codes_per_byte``, and say how codes become bytes.
    """

    largest_code: ClassVar[int]
    codes_per_byte: ClassVar[int]

    def __init__(self, block_size: int, stochastic: bool) -> None:
        """Refuses block sizes whose codes do not fill whole 32-bit words."""
        multiple = 4 * self.codes_per_byte
        if block_size < multiple or block_size % multiple:
            raise ValueError(f"block_size={block_size} must be a positive multiple of {multiple}, for instance 256")
        self.block_size = self.alignment = block_size
        self.stochastic = stochastic

    @abstractmethod
    def _pack(self, codes: Tensor) -> Tensor:
        """Integral float32 ``[n]`` as uint8 ``[ceil(n / codes_per_byte)]``."""

    @abstractmethod
    def _unpack(self, packed: Tensor, numel: int) -> Tensor:
        """The reverse, as float32 ``[numel]``."""

    @override
    def payload_bytes(self, numel: int, step: int) -> int:
        """Four bytes a block, and the codes."""
        return 4 * num_blocks(numel, self.block_size) + whole_words(-(-numel // self.codes_per_byte))

    @override
    def encode(self, values: Tensor, payload: Tensor, context: Context) -> None:
        """Quantize."""
        noise = self._noise(values, context)
        if self._encode_compiled(values, None, 0.0, None, noise, payload):
            return
        numel, blocks = values.numel(), as_blocks(values, self.block_size)
        # NaN and Inf pass through both. To take both costs less than to write |x| to memory.
        largest = torch.maximum(blocks.amax(dim=1, keepdim=True), -blocks.amin(dim=1, keepdim=True))
        scale = usable_scale(largest / self.largest_code)
        codes = blocks * torch.where(scale > 0, 1 / scale, 0.0)
        if noise is None:
            codes.round_()
        else:
            codes.add_(as_blocks(noise, self.block_size)).floor_()
        # What becomes of a block whose scale is NaN does not matter: it decodes to NaN.
        codes.clamp_(-self.largest_code, self.largest_code).nan_to_num_(0.0)
        packed = self._pack(codes.flatten()[:numel])
        start, stop = self._codes(numel)
        payload[:start].view(torch.float32).copy_(scale.flatten())
        payload[start:stop].copy_(packed)
        payload[stop:].zero_()

    @override
    def encode_with_feedback(
        self, values: Tensor, residual: Tensor, decay: float, new_residual: Tensor, payload: Tensor, context: Context
    ) -> None:
        """See the base class; compiled, it takes one pass."""
        if kernels.library_for(values, residual, new_residual, payload) is None:
            super().encode_with_feedback(values, residual, decay, new_residual, payload, context)
        else:
            noise = self._noise(values, context)
            self._encode_compiled(values, residual, decay, new_residual, noise, payload)

    @override
    def encode_sum(self, sources: Sequence[Tensor], scale: float, payload: Tensor, context: Context) -> "bool | Tensor":
        """See the base class; compiled, the sum is not written to memory."""
        loops = kernels.library_for(payload, *sources) if sources[0].dtype == torch.float32 else None
        if loops is None:
            return super().encode_sum(sources, scale, payload, context)
        noise = self._noise(sources[0], context)
        numel = sources[0].numel()
        start, stop = self._codes(numel)
        finite = loops.danon_quantize_sum(
            *(self.largest_code, kernels.addresses(sources), len(sources), scale),
            *(kernels.address(noise), numel, self.block_size),
            *(kernels.address(payload), kernels.address(payload, start)),
        )
        payload[stop:].zero_()
        return bool(finite)

    @override
    def decode(self, payload: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Multiply codes by their scales."""
        numel = out.numel()
        start, stop = self._codes(numel)
        loops = kernels.library_for(payload, out)
        if loops is not None:
            at = kernels.address(payload), kernels.address(payload, start)
            loops.danon_dequantize(self.largest_code, *at, numel, self.block_size, add, kernels.address(out))
            return
        codes = as_blocks(self._unpack(payload[start:stop], numel), self.block_size)
        write_scaled(codes.mul_(payload[:start].view(torch.float32)[:, None]), out, add)

    def _encode_compiled(
        self,
        values: Tensor,
        residual: Tensor | None,
        decay: float,
        new_residual: Tensor | None,
        noise: Tensor | None,
        payload: Tensor,
    ) -> bool:
        loops = kernels.library_for(values, residual, new_residual, noise, payload)
        if loops is None:
            return False
        start, stop = self._codes(values.numel())
        loops.danon_quantize(
            self.largest_code,
            *(kernels.address(values), kernels.address(residual), decay, kernels.address(new_residual)),
            *(kernels.address(noise), values.numel(), self.block_size),
            *(kernels.address(payload), kernels.address(payload, start)),
        )
        payload[stop:].zero_()
        return True

    def _codes(self, numel: int) -> tuple[int, int]:
        """Where in the payload the codes are."""
        start = 4 * num_blocks(numel, self.block_size)
        return start, start + -(-numel // self.codes_per_byte)

    def _noise(self, values: Tensor, context: Context) -> Tensor | None:
        """Uniform numbers in [0, 1), or None where rounding is to nearest."""
        if not self.stochastic:
            return None
        return torch.rand(values.shape, generator=context.generator(values.device), device=values.device)
