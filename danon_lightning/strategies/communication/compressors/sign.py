"""One bit an element, with one scale a block."""

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


class SignCompressor(Compressor):
    """The sign of each element, and the mean magnitude of each block. Made for error feedback.

    Wire format: one float32 scale s = mean|x| for each block, over its real elements, then one bit for each element:
    bit i mod 8, from the lowest, of byte ⌊i / 8⌋ is the sign bit of element i; zeros up to a multiple of four bytes.
    x̂ = −s where it is set, else s. That is 1/8 + 4/block_size bytes an element.

    The mean is taken by halves, so that its bits are the same wherever it is computed: of |x| / block_size (exact, but
    for subnormal numbers; the sum cannot overflow), filled up with zeros to a block, the second half is added to the
    first until one number is left.

    Error bound: |x̂ − x| ≤ max(s, |x| − s). A block with a mean below 1.2e-38 is sent as zeros, and one with NaN or Inf
    decodes to NaN throughout.

    Contraction: ‖x − x̂‖² = ‖x‖² − ‖x‖₁² / d ≤ (1 − δ)·‖x‖² over a block of d elements, with δ = 1/d at least (one
    element is all there is), 2/π = 0.64 for a normal distribution, and 1 where all magnitudes are equal.

    Args:
        block_size: Elements that share a scale, a power of two, at least 32.

    Raises:
        ValueError: If ``block_size`` is not such a number.

    Reference:
        Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of
        Speech DNNs", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
        Schemes", ICML 2019 (arXiv:1901.09847), for the scale and the proof.
    """

    name = "sign"
    needs_error_feedback = True

    def __init__(self, block_size: int = 2048) -> None:
        """See the class."""
        if block_size < 32 or block_size & (block_size - 1):
            raise ValueError(f"block_size={block_size} must be a power of two and at least 32, for instance 2048")
        self.block_size = self.alignment = block_size

    @override
    def payload_bytes(self, numel: int, step: int) -> int:
        """Four bytes a block, and the bits."""
        return 4 * num_blocks(numel, self.block_size) + whole_words(-(-numel // 8))

    @override
    def encode(self, values: Tensor, payload: Tensor, context: Context) -> None:
        """Take signs and means."""
        if self._encode_compiled(values, None, 0.0, None, payload):
            return
        numel, blocks = values.numel(), as_blocks(values, self.block_size)
        scale = self._scale(blocks, numel)
        # The sign of a NaN means nothing and is not sent.
        bits = (torch.signbit(blocks) & torch.isfinite(scale)).flatten()[:numel]
        octets = as_blocks(bits.to(torch.uint8), 8) << torch.arange(8, dtype=torch.uint8, device=values.device)
        start, stop = self._bits(numel)
        payload[:start].view(torch.float32).copy_(scale.flatten())
        payload[start:stop].copy_(octets.sum(dim=1, dtype=torch.uint8))
        payload[stop:].zero_()

    @override
    def encode_with_feedback(
        self, values: Tensor, residual: Tensor, decay: float, new_residual: Tensor, payload: Tensor, context: Context
    ) -> None:
        """See the base class; compiled, it takes one pass."""
        if not self._encode_compiled(values, residual, decay, new_residual, payload):
            super().encode_with_feedback(values, residual, decay, new_residual, payload, context)

    @override
    def decode(self, payload: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Give each scale its sign."""
        numel = out.numel()
        start, stop = self._bits(numel)
        loops = kernels.library_for(payload, out)
        if loops is not None:
            scales, words = kernels.address(payload), kernels.address(payload, start)
            loops.danon_decode_signs(scales, words, numel, self.block_size, add, kernels.address(out))
            return
        shifts = torch.arange(8, dtype=torch.uint8, device=payload.device)
        bits = (payload[start:stop, None] >> shifts).bitwise_and_(1).flatten()[:numel]
        scale = payload[:start].view(torch.float32)[:, None]
        write_scaled(torch.where(as_blocks(bits, self.block_size).bool(), -scale, scale), out, add)

    def _encode_compiled(
        self, values: Tensor, residual: Tensor | None, decay: float, new_residual: Tensor | None, payload: Tensor
    ) -> bool:
        loops = kernels.library_for(values, residual, new_residual, payload)
        if loops is None:
            return False
        loops.danon_encode_signs(
            *(kernels.address(values), kernels.address(residual), decay, kernels.address(new_residual)),
            *(values.numel(), self.block_size),
            *(kernels.address(payload), kernels.address(payload, self._bits(values.numel())[0])),
        )
        return True

    def _scale(self, blocks: Tensor, numel: int) -> Tensor:
        """Float32 ``[num_blocks, 1]``."""
        sums = blocks.abs() * (1 / self.block_size)
        while sums.shape[1] > 1:
            half = sums.shape[1] // 2
            sums = sums[:, :half] + sums[:, half:]
        in_last = numel - (len(blocks) - 1) * self.block_size
        sums[-1] *= self.block_size / in_last  # for all others the quotient is 1
        return usable_scale(sums)

    def _bits(self, numel: int) -> tuple[int, int]:
        """Where in the payload the bits are."""
        start = 4 * num_blocks(numel, self.block_size)
        return start, start + -(-numel // 8)
