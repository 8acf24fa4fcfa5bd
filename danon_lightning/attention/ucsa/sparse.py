"""The softmax of UCSA over all that queries may read, and its gradient.

Forward and backward go over the sequence piece by piece. What a piece computes on the way is not kept: the weights of
any set of keys follow from the log-sum-exp of all sets, so that the backward pass computes them anew, as flash
attention does, and memory stays linear in the number of tokens.

Reference:
    Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from danon_lightning.attention.precision import without_autocast
from danon_lightning.attention.ucsa.layout import Layout
from danon_lightning.attention.ucsa.piece import Piece
from danon_lightning.attention.ucsa.sources import Sources

__all__ = ["Attended", "sparse_attention"]

# Queries worked on at once: more of them share a block, fewer need less memory.
QUERIES_AT_ONCE = 8192
QUERIES_AT_ONCE_ON_ACCELERATORS = 1 << 17


@dataclass
class Attended:
    """What queries attended to; all but ``output`` is detached.

    Attributes:
        output: ``[N, R, n, d]``, zero for queries that see nothing.
        lse: Log-sum-exp of all logits ``[N, R, n]``.
        near_lse: That of the sinks and the window alone.
        cells_lse: That of the cells alone.
        blocks: The blocks read token by token ``[N, R, n, k]``, -1 where there are fewer.
    """

    output: Tensor
    lse: Tensor
    near_lse: Tensor
    cells_lse: Tensor
    blocks: Tensor


@dataclass
class _Job:
    """What the two passes share beside differentiable tensors."""

    sources: Sources
    layout: Layout
    start: int
    dropout_p: float
    seed: int
    # Which of the distinct tensors each of the sources is: windows and blocks may be the same.
    index: list[int]

    def fill(self, tensors: Sequence[Tensor]) -> Sources:
        """Return the sources with distinct tensors put in."""
        return self.sources.with_differentiable([tensors[i] for i in self.index])

    def cut(self, query: Tensor) -> Iterator[tuple[slice, slice]]:
        """Yield rows and tokens ``[N, R, n, d]`` of all pieces; none holds both sinks and other tokens."""
        rows, repeats, length, _ = query.shape
        budget = QUERIES_AT_ONCE if query.device.type == "cpu" else QUERIES_AT_ONCE_ON_ACCELERATORS
        size, sinks = self.layout.block_size, max(0, min(self.layout.num_sinks - self.start, length))
        rows_at_once = max(1, budget // (repeats * length))
        tokens_at_once = max(1, budget // (repeats * size)) * size
        borders = [0, *range(tokens_at_once, sinks, tokens_at_once)]
        # From here on pieces end where blocks do.
        first = sinks + (tokens_at_once - (self.start + sinks - self.layout.num_sinks) % size if sinks < length else 0)
        borders += [sinks] * (0 < sinks < length) + list(range(first, length, tokens_at_once)) + [length]
        for row in range(0, rows, rows_at_once):
            for start, stop in zip(borders, borders[1:], strict=False):
                yield slice(row, row + rows_at_once), slice(start, stop)


class _SparseAttention(torch.autograd.Function):
    """Attention to sources; the gradient of anything but the output is zero."""

    @staticmethod
    def forward(ctx: Any, job: _Job, query: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        sources = job.fill(tensors)
        precise = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse, near_lse, cells_lse = torch.empty(3, *query.shape[:-1], dtype=precise, device=query.device)
        count = job.layout.num_selected
        blocks = torch.empty(*query.shape[:-1], count, dtype=torch.int32, device=query.device)
        ctx.job, ctx.chosen = job, []
        with without_autocast(query.device):
            for index, (rows, tokens) in enumerate(job.cut(query)):
                piece = _piece(job, sources, query, rows, tokens, index, None)
                found = piece.forward()
                heads = (piece.repeats, piece.length)
                output[rows, :, tokens] = found.output.unflatten(1, heads)
                for total, part in ((lse, found.lse), (near_lse, found.near_lse), (cells_lse, found.cells_lse)):
                    total[rows, :, tokens] = part.unflatten(1, heads)
                blocks[rows, :, tokens] = -1
                blocks[rows, :, tokens, : found.blocks.shape[-1]] = found.blocks.unflatten(1, heads).int()
                if any(ctx.needs_input_grad):
                    ctx.chosen.append([x.to(torch.int32) for x in found.chosen])
        ctx.save_for_backward(query, output, lse, *tensors)
        ctx.mark_non_differentiable(lse, near_lse, cells_lse, blocks)
        return output, lse, near_lse, cells_lse, blocks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        query, output, lse, *tensors = ctx.saved_tensors
        job: _Job = ctx.job
        sources = job.fill(tensors)
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in tensors]
        totals = job.fill(grads)
        grad_query = torch.empty_like(query)
        with without_autocast(query.device):
            for index, (rows, tokens) in enumerate(job.cut(query)):
                piece = _piece(job, sources, query, rows, tokens, index, ctx.chosen[index])
                grad_query[rows, :, tokens] = piece.backward(
                    grad[rows, :, tokens],
                    output[rows, :, tokens],
                    lse[rows, :, tokens],
                    totals.rows(rows.start, rows.stop),
                ).to(query.dtype)
        return None, grad_query, *(x.to(tensor.dtype) for x, tensor in zip(grads, tensors, strict=True))


def _piece(
    job: _Job, sources: Sources, query: Tensor, rows: slice, tokens: slice, index: int, chosen: list[Tensor] | None
) -> Piece:
    return Piece(
        sources.rows(rows.start, rows.stop),
        job.layout,
        query[rows, :, tokens],
        job.start + tokens.start,
        dropout_p=job.dropout_p,
        seed=job.seed + index,
        chosen=chosen,
    )


@torch.compiler.disable
def sparse_attention(
    query: Tensor, sources: Sources, layout: Layout, *, start: int = 0, dropout_p: float = 0.0
) -> Attended:
    """Attend to sources.

    Args:
        query: Rotated and scaled ``[N, R, n, d]``.
        sources: What there is to read.
        layout: Who sees what.
        start: Position of the first query.
        dropout_p: Probability of dropping an attention weight.
    """
    seed = int(torch.randint(1 << 62, ())) if dropout_p > 0.0 else 0
    every = sources.differentiable()
    tensors: list[Tensor] = []
    index = []
    for tensor in every:
        same = [i for i, x in enumerate(tensors) if x is tensor]
        index.append(same[0] if same else len(tensors))
        tensors += [] if same else [tensor]
    # What the passes share must not hold the graph.
    job = _Job(sources.with_differentiable([x.detach() for x in every]), layout, start, dropout_p, seed, index)
    return Attended(*_SparseAttention.apply(job, query, *tensors))
