"""What compressed sequences are made of: which tokens share a cell, what a cell holds, and what is lost."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CompressedSequence",
    "CompressionStats",
    "energy_retained",
    "even_assignment",
    "quantize_rows",
    "set_apart",
    "tendency_of",
]


class CompressedSequence(NamedTuple):
    """Cells, and which tokens they stand for.

    Attributes:
        cells: ``[b, L', D]``, in the order of the mean positions of their tokens; int8 where ``scales`` are given.
        assignment: The cell of each token ``[b, L]``, int64.
        scales: What the rows of int8 cells are to be multiplied with ``[b, L', 1]``.
    """

    cells: Tensor
    assignment: Tensor
    scales: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the cells."""
        return self.cells.shape

    @property
    def nbytes(self) -> int:
        """Bytes of cells and scales; the assignment is not counted, since even division needs none."""
        return self.cells.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def dequantized(self) -> Tensor:
        """Return the cells in floating point ``[b, L', D]``."""
        return self.cells if self.scales is None else self.cells * self.scales


class CompressionStats(NamedTuple):
    """What a compression kept, measured.

    Attributes:
        ratio: Number of cells over number of tokens.
        energy_retained: 1 − ‖x − x̂‖² / ‖x‖², where x̂ is the expanded sequence.
        bytes_ratio: Bytes of the cells over bytes of the tokens.
    """

    ratio: float
    energy_retained: float
    bytes_ratio: float


def even_assignment(length: int, num_cells: int, device: torch.device) -> Tensor:
    """Return the cell ``[1, length]`` of each token if neighbours share cells whose sizes differ by one at most."""
    return (torch.arange(length, device=device) * num_cells // length).unsqueeze(0)


@torch.no_grad()
def set_apart(x: Tensor, assignment: Tensor, num_cells: int, threshold: float) -> Tensor:
    """Give important tokens cells of their own, at most half of all, and divide the rest evenly over the others.

    Args:
        x: Tokens ``[b, L, D]``.
        assignment: The cell of each token ``[b, L]`` if none were important.
        num_cells: Number of cells L', at most L.
        threshold: Tokens count as important from this distance on, between a token and the mean of its cell, in units
            of the root mean square length of the tokens of its sequence.

    Returns:
        The cell of each token ``[b, L]``; none is empty.
    """
    batch, length, _ = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    index = assignment.unsqueeze(-1).expand_as(wide)
    zeros = wide.new_zeros(batch, num_cells, x.shape[2])
    means = zeros.scatter_reduce(1, index, wide, "mean", include_self=False).gather(1, index)
    usual = wide.square().sum(dim=-1).mean(dim=1, keepdim=True).sqrt()
    importance = (wide - means).norm(dim=-1) / usual.clamp_min(torch.finfo(usual.dtype).tiny)
    rank = importance.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    alone = (importance > threshold) & (rank < num_cells // 2)
    singles = alone.sum(dim=1, keepdim=True)
    order_of_rest = (~alone).cumsum(dim=1) - 1
    shared = order_of_rest * (num_cells - singles) // (length - singles).clamp_min(1)
    cell = torch.where(alone, num_cells - singles + alone.cumsum(dim=1) - 1, shared)
    # Number the cells by their middles, so that neighbours stay neighbours.
    return middles(cell, num_cells).argsort(dim=1, stable=True).argsort(dim=1).gather(1, cell)


def middles(assignment: Tensor, num_cells: int) -> Tensor:
    """Return the mean position ``[b, L']`` of the tokens of each cell, given the assignment ``[b, L]``."""
    batch, length = assignment.shape
    position = torch.arange(length, device=assignment.device, dtype=torch.float32).expand(batch, -1)
    start = position.new_zeros(batch, num_cells)
    return start.scatter_reduce(1, assignment, position, "mean", include_self=False)


def tendency_of(cells: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
    """Return how cells change with the position, and how far tokens are behind the middles of their cells.

    Args:
        cells: ``[b, L', D]``, floating point.
        assignment: The cell of each token ``[b, L]``.

    Returns:
        The difference of the neighbours of each cell over the tokens between their middles ``[b, L', D]``, and the
        distance of each token ``[b, L]``, float32; the distances in a cell add up to zero.
    """
    centre = middles(assignment, cells.shape[1])
    # A cell at an end is its own neighbour there. Cells around one that is set apart may have the same middle.
    outer = torch.cat([centre[:, :1], centre, centre[:, -1:]], dim=1)
    spacing = (outer[:, 2:] - outer[:, :-2]).clamp_min(1.0)
    padded = F.pad(cells, (0, 0, 1, 1), mode="replicate")
    position = torch.arange(assignment.shape[1], device=assignment.device, dtype=centre.dtype)
    distance = position - centre.gather(1, assignment)
    return (padded[:, 2:] - padded[:, :-2]) / spacing.unsqueeze(-1).to(cells.dtype), distance


def energy_retained(x: Tensor, other: Tensor) -> Tensor:
    """Return 1 − ‖x − other‖² / ‖x‖², a scalar in float32 or float64; 1 if both are zero."""
    x, other = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (x, other))
    return 1 - (x - other).square().sum() / x.square().sum().clamp_min(torch.finfo(x.dtype).tiny)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round to int8, with a scale for each row.

    Args:
        x: ``[..., D]``, floating point.

    Returns:
        Integers ``[..., D]``, int8 in [-127, 127], and the scales ``[..., 1]`` in the dtype of ``x``.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(dim=-1, keepdim=True)
    # Rounded to the dtype it is kept in first, so that quantizing and restoring use the same number.
    scales = (largest / 127).to(x.dtype)
    steps = wide / scales.to(wide.dtype).clamp_min(torch.finfo(wide.dtype).tiny)
    return steps.round().clamp(-127, 127).to(torch.int8), scales
