"""How much a token matters to those that come long after it."""

import torch.nn.functional as F
from torch import Tensor, nn

from danon_lightning.attention.layers import NormalLinear, ZeroLinear

__all__ = ["ImportanceNetwork"]


class ImportanceNetwork(nn.Module):
    """A small network that gives each token an importance between 0 and 1, one half at first.

    Args:
        dim: Width D of a token.
        hidden_dim: Width of the layer between.
        std: Standard deviation of the initial weights.
    """

    def __init__(self, dim: int, hidden_dim: int = 16, *, std: float = 0.02) -> None:
        """Create the layers."""
        super().__init__()
        self.inner = NormalLinear(dim, hidden_dim, std=std)
        self.score = ZeroLinear(hidden_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithm of the importance, as accurate near zero importance as anywhere.

        Args:
            x: Tokens ``[..., D]``.

        Returns:
            ln σ(score) ``[...]``, at most 0.

        Raises:
            ValueError: If the tokens have another width.
        """
        if x.shape[-1:] != (self.inner.in_features,):
            raise ValueError(f"x has shape {list(x.shape)}; it must be [..., {self.inner.in_features}]")
        return self.continued(self.inner(x))

    def continued(self, inner: Tensor) -> Tensor:
        """Return what ``forward`` does, given what the layer ``inner`` gives ``[..., hidden_dim]``."""
        return F.logsigmoid(self.score(F.gelu(inner)).squeeze(-1))
