"""Low-rank approximation of gradient matrices."""

from collections.abc import Generator

import torch
from torch import Tensor
from typing_extensions import override

from danon_lightning.strategies.communication.compressors.base import Context, LinearCompressor


class PowerSGDCompressor(LinearCompressor):
    """Sends two thin factors of each gradient matrix, found by one step of power iteration that continues the last one.

    A parameter ``[rows, …]`` is a matrix M ``[rows, cols]``. With Q ``[cols, r]`` of the step before (random at first),

    1. P = Σ M·Q over the ranks, and P̂ its orthonormal basis;
    2. Q = Σ Mᵀ·P̂ over the ranks; the decoded sum is P̂·Qᵀ.

    Wire format: float32 P, then float32 Q: r·(rows + cols) numbers in place of rows·cols. Parameters for which that is
    not at most half are sent dense.

    Error: P̂·Qᵀ is the projection of ΣM onto the columns of P̂, so ‖ΣM − P̂Qᵀ‖² = ‖ΣM‖² − ‖Q‖² ≤ ‖ΣM‖²; the contraction
    δ = ‖Q‖²/‖ΣM‖² ≥ 0 tends to the share of the r largest singular values where ΣM changes slowly. Each rank keeps
    M − P̂·(Mᵀ·P̂)ᵀ, its own part of what was left out.

    P̂ is computed on every node from the same bits of P. The linear algebra gives the same bits where nodes have the
    same kind of processor; between different kinds, replicas may drift apart by rounding errors.

    Args:
        rank: Columns of the factors, r.

    Raises:
        ValueError: If ``rank`` is not positive.

    Reference:
        Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", NeurIPS 2019
        (arXiv:1905.13727), algorithms 1 and 2.
    """

    name = "powersgd"
    whole_parameters = True
    num_rounds = 2

    def __init__(self, rank: int = 4) -> None:
        """See the class."""
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1; 2 to 8 are usual, higher is more exact")
        self.rank = rank

    @override
    def code_numel(self, shape: torch.Size) -> int | None:
        """Numbers in both factors, or None if they are no saving."""
        rows, cols = _matrix(shape)
        numel = self._rank(shape) * (rows + cols)
        return numel if 2 * numel <= rows * cols else None

    @override
    def rounds(self, values: Tensor, context: Context, *, feedback: bool) -> Generator[Tensor, Tensor, Tensor]:
        """Two rounds: P, then Q."""
        matrix = values.view(_matrix(values.shape))
        start = context.state.get("q")
        if start is None:
            generator = torch.Generator().manual_seed(context.shared_seed)
            start = torch.randn(matrix.shape[1], self._rank(values.shape), generator=generator).to(values.device)
        assert isinstance(start, Tensor)
        left = _orthonormal((yield matrix @ start))
        mine = matrix.T @ left
        right = yield mine
        # Zero (of a parameter that was not used) would be a start from which there is no way.
        context.new_state["q"] = torch.where(right.any(), right, start)
        if feedback:
            matrix.addmm_(left, mine.T, alpha=-1)
        return torch.cat([left.flatten(), right.flatten()])

    @override
    def decode(self, code: Tensor, out: Tensor, context: Context) -> None:
        """Multiply the factors."""
        rows, cols = _matrix(out.shape)
        rank = self._rank(out.shape)
        left, right = code[: rows * rank].view(rows, rank), code[rows * rank :].view(cols, rank)
        torch.mm(left, right.T, out=out.view(rows, cols))

    def _rank(self, shape: torch.Size) -> int:
        return min(self.rank, *_matrix(shape))


def _matrix(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1:].numel()


def _orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of ``matrix``; where these are dependent, any that complete them."""
    if not matrix.isfinite().all():
        return torch.full_like(matrix, torch.nan)  # LAPACK refuses
    return torch.linalg.qr(matrix).Q.contiguous()
