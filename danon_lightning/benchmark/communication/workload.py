"""The gradients that are exchanged: many, in several buckets, and at next to no cost of computation."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Each matrix fills a bucket of its own.
MATRICES = 6
# Sides are multiples of this, so that no matrix is small enough to be left uncompressed.
_SIDE_STEP = 64


@dataclass(frozen=True)
class Workload:
    """Float32 gradients of :data:`MATRICES` square matrices, and the layout of the ranks that exchange them.

    Attributes:
        nodes: Number of nodes.
        ranks_per_node: Number of ranks on each.
        side: Rows, and columns, of each matrix.
    """

    nodes: int
    ranks_per_node: int
    side: int

    @classmethod
    def of_size(cls, nodes: int, ranks_per_node: int, elements: float) -> "Workload":
        """The workload whose number of elements is nearest to ``elements``."""
        side = max(1, round(math.sqrt(elements / MATRICES) / _SIDE_STEP)) * _SIDE_STEP
        return cls(nodes, ranks_per_node, side)

    @property
    def elements(self) -> int:
        """Number of gradient elements."""
        return MATRICES * self.side**2

    @property
    def bucket_mb(self) -> float:
        """DDP's ``bucket_cap_mb`` with which each matrix is a bucket."""
        return 4 * self.side**2 / 2**20

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node


class GivenGradients(nn.Module):
    """Matrices whose gradients are given: the same at each step, other ones on each rank.

    A real layer of this size would spend more time on its gradient than a fast link takes to exchange it.
    """

    def __init__(self, workload: Workload, rank: int) -> None:
        """Fill the matrices with zeros and draw the gradients from the rank's number."""
        super().__init__()
        shape = (workload.side, workload.side)
        generator = torch.Generator().manual_seed(rank)
        self.matrices = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for _ in range(MATRICES))
        self.gradients = [torch.randn(shape, generator=generator) for _ in range(MATRICES)]

    def forward(self) -> Tensor:
        """A scalar to call ``backward`` on."""
        pairs = zip(self.matrices, self.gradients, strict=True)
        return torch.stack([_Given.apply(matrix, gradient) for matrix, gradient in pairs]).sum()


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return matrix.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None
