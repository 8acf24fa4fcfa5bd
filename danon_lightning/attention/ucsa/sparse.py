"""The softmax of UCSA over all that queries may read, and its gradient.

Forward and backward go over the sequence stretch by stretch, and over a stretch piece by piece: a piece is small enough
for the cache of a processor core, and a stretch has enough queries for many of them to choose the same block. What is
computed on the way is not kept: the weights of any set of keys follow from the log-sum-exp of all sets, so that the
backward pass computes them anew, as flash attention does, and memory stays linear in the number of tokens.

Reference:
    Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from danon_lightning.attention.merging import MASKED, has_visible_keys
from danon_lightning.attention.precision import without_autocast
from danon_lightning.attention.scratch import Scratch
from danon_lightning.attention.ucsa.expanded import ExpandedBlocks
from danon_lightning.attention.ucsa.layout import Layout
from danon_lightning.attention.ucsa.piece import Piece
from danon_lightning.attention.ucsa.sources import Sources

__all__ = ["Attended", "sparse_attention"]

# Queries of a piece, that choose at once, and scores of theirs: few enough to stay in the cache of a processor core. In
# a tree there is more to do for a piece than to score, so that larger ones pay.
QUERIES_AT_ONCE = 4096
SCORES_AT_ONCE, SCORES_AT_ONCE_IN_TREES = 1 << 20, 1 << 21
QUERIES_AT_ONCE_ON_ACCELERATORS = 1 << 17
# Queries of a stretch, that read blocks at once: more of them share a block, fewer need less memory.
READERS_AT_ONCE = 1 << 14
READERS_AT_ONCE_ON_ACCELERATORS = 1 << 17


@dataclass
class Attended:
    """What queries attended to; all but ``output`` is detached.

    Attributes:
        output: ``[N, R, n, d]``, zero for queries that see nothing.
        lse: Log-sum-exp of all logits ``[N, R, n]``.
        near_lse: That of the sinks and the window alone, if asked for.
        cells_lse: That of the cells alone, if asked for.
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
    # Whether to tell apart what is near, cells and blocks.
    shares: bool
    # Which of the distinct tensors each of the sources is: windows and blocks may be the same.
    index: list[int]

    def fill(self, tensors: Sequence[Tensor]) -> Sources:
        """Return the sources with distinct tensors put in."""
        return self.sources.with_differentiable([tensors[i] for i in self.index])

    def stretches(self, query: Tensor) -> Iterator["_Stretch"]:
        """Yield all stretches of the queries ``[N, R, n, d]``."""
        on_cpu = query.device.type == "cpu"
        queries = QUERIES_AT_ONCE_ON_ACCELERATORS
        if on_cpu:
            scores = SCORES_AT_ONCE_IN_TREES if len(self.sources.levels) > 1 else SCORES_AT_ONCE
            queries = min(QUERIES_AT_ONCE, scores // max(1, self.sources.levels[-1].keys.shape[1]))
        readers = READERS_AT_ONCE if on_cpu else READERS_AT_ONCE_ON_ACCELERATORS
        seed = self.seed
        for rows, tokens in _cut(self.layout, query.shape, self.start, readers, sinks_apart=False):
            shape = query[rows, :, tokens].shape
            pieces = list(_cut(self.layout, shape, self.start + tokens.start, queries))
            yield _Stretch(self, rows, tokens, pieces, seed)
            seed += len(pieces) + 1


def _cut(
    layout: Layout, shape: Sequence[int], start: int, budget: int, *, sinks_apart: bool = True
) -> Iterator[tuple[slice, slice]]:
    """Yield rows and tokens of parts of so many queries ``[N, R, n, d]``, sinks in parts of their own if so wished."""
    rows, repeats, length = shape[:3]
    size, sinks = layout.block_size, max(0, min(layout.num_sinks - start, length))
    rows_at_once = max(1, budget // (repeats * length))
    tokens_at_once = max(1, budget // (repeats * size)) * size
    borders = [0, *range(tokens_at_once, sinks, tokens_at_once)]
    # From here on parts end where blocks do.
    first = sinks + (tokens_at_once - (start + sinks - layout.num_sinks) % size if sinks < length else 0)
    borders += [sinks] * (sinks_apart and 0 < sinks < length) + list(range(first, length, tokens_at_once)) + [length]
    for row in range(0, rows, rows_at_once):
        for begin, end in zip(borders, borders[1:], strict=False):
            yield slice(row, min(row + rows_at_once, rows)), slice(begin, end)


@dataclass
class _Stretch:
    """Queries that read blocks together, and the pieces in which they choose them."""

    job: _Job
    rows: slice
    tokens: slice
    pieces: list[tuple[slice, slice]]
    seed: int

    def piece(self, sources: Sources, query: Tensor, index: int, chosen: list[Tensor] | None) -> Piece:
        """Return a piece of the queries ``[N, R, m, d]`` of the stretch, and what they may read."""
        (rows, tokens), job = self.pieces[index], self.job
        return Piece(
            sources.rows(rows.start, rows.stop),
            job.layout,
            query[rows, :, tokens],
            job.start + self.tokens.start + tokens.start,
            dropout_p=job.dropout_p,
            seed=self.seed + index,
            chosen=chosen,
        )

    def blocks(self, sources: Sources, query: Tensor, chosen: Tensor) -> ExpandedBlocks:
        """Return what the queries read of the blocks that they chose ``[N, R, m, k]``."""
        return ExpandedBlocks(sources, query, chosen, dropout_p=self.job.dropout_p, seed=self.seed + len(self.pieces))


class _SparseAttention(torch.autograd.Function):
    """Attention to sources; the gradient of anything but the output is zero."""

    @staticmethod
    def forward(ctx: Any, job: _Job, query: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        precise = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[:-1], dtype=precise, device=query.device)
        near_lse, cells_lse = (torch.empty_like(lse) if job.shares else lse.new_empty(0) for _ in range(2))
        count = job.layout.num_selected
        blocks = torch.empty(*query.shape[:-1], count, dtype=torch.int32, device=query.device)
        ctx.job, ctx.chosen, scratch = job, [], Scratch()
        with without_autocast(query.device):
            sources = job.fill(tensors).with_judges(job.layout.tree_factor)
            for stretch in job.stretches(query):
                here = stretch.rows, slice(None), stretch.tokens
                readable, asking = sources.rows(stretch.rows.start, stretch.rows.stop), query[here]
                exact = output[here] if output.dtype == precise else output[here].to(precise)
                for index, (rows, tokens) in enumerate(stretch.pieces):
                    piece = stretch.piece(readable, asking, index, None)
                    found = piece.forward()
                    exact[rows, :, tokens] = found.output.unflatten(1, (piece.repeats, piece.length))
                    found_blocks = F.pad(found.blocks, (0, count - found.blocks.shape[-1]), value=-1)
                    parts = [(lse, found.lse), (blocks, found_blocks)]
                    if job.shares:
                        parts += [(near_lse, _joined(found.near_lses, found.lse))]
                        parts += [(cells_lse, _joined(found.cells_lses, found.lse))]
                    for total, part in parts:
                        total[here][rows, :, tokens] = part.unflatten(1, (piece.repeats, piece.length))
                    if any(ctx.needs_input_grad):
                        ctx.chosen.append([x.to(torch.int32) for x in found.chosen])
                stretch.blocks(readable, asking, blocks[here]).merge(exact, lse[here], scratch)
                if output.dtype != precise:
                    output[here] = exact
        ctx.save_for_backward(query, output, lse, blocks, *tensors)
        ctx.mark_non_differentiable(lse, near_lse, cells_lse, blocks)
        return output, lse, near_lse, cells_lse, blocks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        query, output, lse, blocks, *tensors = ctx.saved_tensors
        job: _Job = ctx.job
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in tensors]
        grad_query = torch.empty_like(query)
        chosen, scratch = iter(ctx.chosen), Scratch()
        with without_autocast(query.device):
            sources, totals = job.fill(tensors), job.fill(grads)
            for stretch in job.stretches(query):
                here = stretch.rows, slice(None), stretch.tokens
                readable, sums = (x.rows(stretch.rows.start, stretch.rows.stop) for x in (sources, totals))
                asking, upstream, known = query[here], grad[here], lse[here]
                shift = torch.linalg.vecdot(upstream.to(known.dtype), output[here].to(known.dtype))
                # Queries that see nothing give all weights the value exp(-inf).
                known = known.masked_fill(~has_visible_keys(known), float("inf"))
                expanded = stretch.blocks(readable, asking, blocks[here])
                total = expanded.backward(upstream, known, shift, sums, scratch)
                for index, (rows, tokens) in enumerate(stretch.pieces):
                    part = rows, slice(None), tokens
                    piece = stretch.piece(readable, asking, index, next(chosen))
                    found = piece.backward(upstream[part], known[part], shift[part], sums.rows(rows.start, rows.stop))
                    grad_query[here][part] = found if total is None else total[part].add_(found)
        return None, grad_query, *(x.to(tensor.dtype) for x, tensor in zip(grads, tensors, strict=True))


def _joined(lses: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the log-sum-exp of several."""
    return torch.logsumexp(torch.stack([torch.full_like(like, MASKED), *lses]), dim=0)


@torch.compiler.disable
def sparse_attention(
    query: Tensor,
    sources: Sources,
    layout: Layout,
    *,
    start: int = 0,
    dropout_p: float = 0.0,
    shares: bool = False,
) -> Attended:
    """Attend to sources.

    Args:
        query: Rotated and scaled ``[N, R, n, d]``.
        sources: What there is to read.
        layout: Who sees what.
        start: Position of the first query.
        dropout_p: Probability of dropping an attention weight.
        shares: Whether ``near_lse`` and ``cells_lse`` are asked for.
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
    job = _Job(sources.with_differentiable([x.detach() for x in every]), layout, start, dropout_p, seed, shares, index)
    return Attended(*_SparseAttention.apply(job, query, *tensors))
