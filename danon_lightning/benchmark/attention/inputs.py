"""Random inputs of an attention core."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """What a core is given, float32, with batch 1.

    Attributes:
        x: Input of the block ``[1, n, H·d]``.
        q: Queries ``[1, H, n, d]``.
        k: Keys ``[1, H, n, d]``.
        v: Values ``[1, H, n, d]``.
        log_decay: Logarithm of decays, for linear attention ``[1, H, n]``.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor

    @classmethod
    def random(cls, length: int, *, heads: int, head_dim: int, device: str, seed: int = 0) -> "Inputs":
        """The same ones for the same arguments."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        q, k, v = (normal(1, heads, length, head_dim) for _ in range(3))
        x = normal(1, length, heads * head_dim)
        # About 0.98 in the mean: a memory of some fifty tokens.
        return cls(x, q, k, v, F.logsigmoid(normal(1, heads, length) + 4.0))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.x, self.q, self.k, self.v, self.log_decay

    @property
    def num_bytes(self) -> int:
        """Their size."""
        return sum(tensor.nbytes for tensor in self.tensors)
