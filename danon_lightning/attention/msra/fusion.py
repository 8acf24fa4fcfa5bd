"""How the outputs of the levels become one.

The default, "adaptive", is one softmax over the visible cells of all levels. The modules here are the alternatives:
they receive the outcome of a softmax per level and combine them.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danon_lightning.attention.layers import NormalLinear
from danon_lightning.attention.merging import AttentionPart, has_visible_keys, merge_parts

__all__ = ["ConcatFusion", "FeatureFusion", "LevelFusion", "WeightedFusion", "fuse_levels"]

# Takes the outputs of the levels [b, H, n, l, d], zero where a query sees no cell of a level, and whether it sees one
# [b, H, n, l], boolean; returns [b, H, n, d]. The number of levels l may be smaller on a short sequence.
LevelFusion: TypeAlias = Callable[[Tensor, Tensor], Tensor]
FeatureFusion: TypeAlias = Literal["adaptive"] | LevelFusion

GATE_WIDTH = 16


def fuse_levels(parts: Sequence[AttentionPart], feature_fusion: FeatureFusion, *, may_be_blind: bool) -> Tensor:
    """Combine the levels.

    Args:
        parts: One part a level, output ``[b, H, n, d]`` and lse ``[b, H, n]``, biases of the levels included.
        feature_fusion: ``"adaptive"`` or a function of the outputs.
        may_be_blind: Whether there may be rows that see no cell at all, because of padding; they become zero.

    Returns:
        ``[b, H, n, d]``.
    """
    if feature_fusion == "adaptive":
        merged = merge_parts(parts)
        output, seen = merged.output, has_visible_keys(merged.lse) if may_be_blind else None
    else:
        available = torch.stack([has_visible_keys(part.lse) for part in parts], dim=-1)
        outputs = torch.stack([part.output for part in parts], dim=-2)
        output = feature_fusion(outputs.masked_fill(~available.unsqueeze(-1), 0.0), available)
        seen = available.any(dim=-1) if may_be_blind else None
    return output if seen is None else output.masked_fill(~seen.unsqueeze(-1), 0.0)


class WeightedFusion(nn.Module):
    """Weights softmax_l(vᵀ tanh(W_h h_l + W_x x + b)) over the levels a query sees; equal at first, as v is zero.

    Args:
        hidden_size: Model width D.
        num_heads: Query heads H.
        head_dim: Head width d.
        std: Standard deviation of the initial weights of W_h and W_x.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, *, std: float) -> None:
        """Create the weights."""
        super().__init__()
        self.from_level = NormalLinear(head_dim, GATE_WIDTH, bias=False, std=std)
        self.from_input = NormalLinear(hidden_size, num_heads * GATE_WIDTH, std=std)
        self.score = nn.Parameter(torch.empty(num_heads, GATE_WIDTH))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set v to zero; the linear layers set their own weights."""
        nn.init.zeros_(self.score)

    def forward(self, outputs: Tensor, available: Tensor, x: Tensor) -> Tensor:
        """Fuse the levels.

        Args:
            outputs: Outputs of the levels ``[b, H, n, l, d]``.
            available: Whether the query sees the level ``[b, H, n, l]``, boolean.
            x: Normalised input of the block ``[b, n, D]``.

        Returns:
            ``[b, H, n, d]``.
        """
        context = self.from_input(x).unflatten(-1, (-1, GATE_WIDTH)).transpose(1, 2)  # [b, H, n, a]
        hidden = torch.tanh(self.from_level(outputs) + context.unsqueeze(-2))
        scores = (hidden * self.score[:, None, None, :]).sum(dim=-1)
        # Finite, so that a row without any level stays free of NaN.
        scores = scores.masked_fill(~available, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1).to(outputs.dtype)
        return (weights.unsqueeze(-1) * outputs).sum(dim=-2)


class ConcatFusion(nn.Module):
    """Outputs of all levels side by side, projected back to the width of a head; levels out of sight count as zero.

    Args:
        num_levels: Number of levels L.
        head_dim: Head width d.
        std: Standard deviation of the initial weights.
    """

    def __init__(self, num_levels: int, head_dim: int, *, std: float) -> None:
        """Create the projection, which the heads share."""
        super().__init__()
        self.projection = NormalLinear(num_levels * head_dim, head_dim, bias=False, std=std)

    def forward(self, outputs: Tensor, available: Tensor) -> Tensor:
        """Fuse the levels.

        Args:
            outputs: Outputs of the levels ``[b, H, n, l, d]``, zero where not available.
            available: Not needed, since what is not available is zero.

        Returns:
            ``[b, H, n, d]``.
        """
        flat = outputs.flatten(-2)
        return F.linear(flat, self.projection.weight[:, : flat.shape[-1]])
