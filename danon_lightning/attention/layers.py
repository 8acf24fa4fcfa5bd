"""Linear and embedding layers that know their own initial values.

Each layer can be built on the meta device and initialised later through ``reset_parameters``, with the same outcome.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NormalEmbedding", "NormalLinear", "ZeroLinear", "joint_linear", "keep_in_graph"]


class NormalLinear(nn.Linear):
    """Linear layer with weights from N(0, std²) and a zero bias.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether a bias is added.
        std: Standard deviation of the initial weights.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, std: float) -> None:
        """Create the layer."""
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Set the initial weights."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """Linear layer whose output is zero at first: what it steers starts in its neutral position.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
    """

    def reset_parameters(self) -> None:
        """Set weights and bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class NormalEmbedding(nn.Embedding):
    """Embedding with rows from N(0, std²).

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Width of a row.
        std: Standard deviation of the initial weights.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, std: float) -> None:
        """Create the embedding."""
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Set the initial rows."""
        nn.init.normal_(self.weight, std=self.std)


def joint_linear(x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """Apply several layers to the same input, as one product.

    Narrow layers cost what it takes to read their input, and backward to write its gradient: once instead of each time.

    Args:
        x: ``[..., D]``.
        layers: Layers with a bias.

    Returns:
        What each of them gives.
    """
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


def keep_in_graph(x: Tensor, *unused: Tensor) -> Tensor:
    """Return ``x`` unchanged, in a graph in which the ``unused`` tensors receive zero gradients.

    Distributed data parallel waits for a gradient from every parameter; a step that does not need some of them, such
    as the upper levels of a pyramid on a short sequence, must still produce one.
    """
    # The sum over nothing is zero whatever the tensor holds, and costs nothing.
    for tensor in unused:
        x = x + tensor.reshape(-1)[:0].sum()
    return x
