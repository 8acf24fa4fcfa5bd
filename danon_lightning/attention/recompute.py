"""Long sequences piece by piece, of which the backward pass computes again what it needs.

What a piece takes stays in the cache of a processor core, and is memory that the piece before has used: neither time
nor memory goes into results between that are as long as the sequence. The price is that what is not kept is computed
twice where there is a backward pass.

Reference:
    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from danon_lightning.attention.precision import without_autocast

__all__ = ["Piece", "PieceWork", "Scan", "in_pieces", "is_traced"]

# Just below the largest block that lets the allocator of glibc adapt, 32 MiB with what it adds.
LARGEST_TELLING_BLOCK = 2**25 - 2**16


class Piece(NamedTuple):
    """What comes out of a piece.

    Attributes:
        results: ``[b, ., t, ...]`` for its t tokens, of which the first one has a gradient.
        state: The new state.
        kept: What makes it shorter to run the piece again for the backward pass.
    """

    results: tuple[Tensor, ...]
    state: Tensor | None = None
    kept: tuple[Tensor, ...] = ()


class PieceWork:
    """What is done to each piece; it must do the same whenever it is run."""

    # Whether the backward pass starts from the results.
    resumes = False

    def take(self, tensors: Sequence[Tensor], start: int, stop: int) -> Sequence[Tensor]:
        """Return what the tokens from ``start`` to ``stop`` need of the tensors."""
        raise NotImplementedError

    def totals(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return what the gradients of the tensors are to be gathered in."""
        # Some of them are sums of many small ones.
        return [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors]

    def give(self, totals: Sequence[Tensor], start: int, stop: int, grads: Sequence[Tensor]) -> None:
        """Add gradients of what ``take`` returned to those of the tensors; this does where it returned views."""
        for view, grad in zip(self.take(totals, start, stop), grads, strict=True):
            view += grad

    def run_without_graph(self, tensors: Sequence[Tensor], start: int, stop: int, state: Tensor | None) -> Piece:
        """Do what ``run`` does with what ``take`` returns, where nothing has a gradient."""
        return self.run(start, stop, self.take(tensors, start, stop), state, None)

    def run(
        self, start: int, stop: int, operands: Sequence[Tensor], state: Tensor | None, known: Sequence[Tensor] | None
    ) -> Piece:
        """Compute.

        Args:
            start: First token.
            stop: End of the tokens.
            operands: What ``take`` returned.
            state: What came before.
            known: What this very piece has returned before, if it is run for the backward pass: its results, if it
                ``resumes``, and what it has kept.
        """
        raise NotImplementedError

    def backward(
        self,
        tensors: Sequence[Tensor],
        totals: Sequence[Tensor],
        start: int,
        stop: int,
        state: Tensor | None,
        known: Sequence[Tensor],
        grad_output: Tensor | None,
        grad_state: Tensor | None,
    ) -> Tensor | None:
        """Add what a piece contributes to the gradients: this runs it again, with a graph.

        Args:
            tensors: All that it read.
            totals: Their gradients so far, added to.
            start: First token.
            stop: End of the tokens.
            state: As in ``run``.
            known: As in ``run``.
            grad_output: Gradient of the first result.
            grad_state: Gradient of the new state.

        Returns:
            The gradient of ``state``.
        """
        state = None if state is None else state.detach().requires_grad_()
        operands = [x.detach().requires_grad_() for x in self.take(tensors, start, stop)]
        with torch.enable_grad():
            piece = self.run(start, stop, operands, state, known)
        found = [(piece.results[0], grad_output), (piece.state, grad_state)]
        wanted = [(x, grad) for x, grad in found if x is not None and grad is not None]
        sources = operands if state is None else [*operands, state]
        grads = torch.autograd.grad(
            [x for x, _ in wanted], sources, [grad for _, grad in wanted], materialize_grads=True
        )
        self.give(totals, start, stop, grads[: len(operands)])
        return None if state is None else grads[-1]


class Scan(PieceWork):
    """Handing a state on along sequences.

    Args:
        step: ``step(state, known, *pieces, *constants)`` returns a piece of the output ``[b, ., t, ...]``, the new
            state, and what is to be ``known`` when this piece comes again for the backward pass; at first, nothing is.
        sequences: How many of the tensors are sequences ``[b, ., n, ...]``; the others are constants.
    """

    def __init__(self, step: Callable[..., tuple[Tensor, Tensor, tuple[Tensor, ...]]], sequences: int) -> None:
        """Remember them."""
        self.step, self.sequences = step, sequences

    def take(self, tensors: Sequence[Tensor], start: int, stop: int) -> Sequence[Tensor]:
        """Return a piece of each sequence, and the constants."""
        return [x[:, :, start:stop] if i < self.sequences else x for i, x in enumerate(tensors)]

    def totals(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return what the gradients are to be gathered in: each token of a sequence gets its own once."""
        return [*map(torch.empty_like, tensors[: self.sequences]), *super().totals(tensors[self.sequences :])]

    def give(self, totals: Sequence[Tensor], start: int, stop: int, grads: Sequence[Tensor]) -> None:
        """Undo ``take`` for gradients."""
        for i, (view, grad) in enumerate(zip(self.take(totals, start, stop), grads, strict=True)):
            if i < self.sequences:
                view.copy_(grad)
            else:
                view += grad

    def run(
        self, start: int, stop: int, operands: Sequence[Tensor], state: Tensor | None, known: Sequence[Tensor] | None
    ) -> Piece:
        """Make the step."""
        output, state, kept = self.step(state, known or (), *operands)
        return Piece((output,), state, kept)


def is_traced(x: Tensor) -> bool:
    """Tell whether a compiler or exporter looks on, or there are no values: then the whole sequence is one piece."""
    return torch.compiler.is_compiling() or x.is_meta


@functools.cache
def _let_memory_be_reused() -> None:
    """Make the C library keep what a piece has freed for the next one, instead of returning it to the system.

    The allocator of glibc adapts: once a block has been freed, blocks up to its size come out of memory that it keeps,
    and of this it keeps twice as much; blocks beyond 32 MiB do not count. Where tensors are either small or longer than
    that, it never learns, and each piece would get all its memory page by page, each page emptied first.
    This block is never touched, so that it takes no memory; elsewhere it does nothing.

    Reference:
        ``man 3 mallopt``, M_MMAP_THRESHOLD.
    """
    torch.empty(LARGEST_TELLING_BLOCK, dtype=torch.uint8)


def in_pieces(
    work: PieceWork,
    tensors: Sequence[Tensor],
    length: int,
    piece: int,
    state: Tensor | None = None,
    *,
    onto: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Work on a sequence piece by piece.

    Args:
        work: What is done to each piece, without autocast.
        tensors: All that it reads and that may need a gradient.
        length: Tokens n in the sequence.
        piece: Tokens in a piece.
        state: The state before the first token, if there is one.
        onto: The first result is added to it; overwritten, unless gradients are wanted.

    Returns:
        The results ``[b, ., n, ...]``, of which the first one has a gradient, and the last state.
    """
    traced = is_traced(tensors[0])
    if tensors[0].device.type == "cpu" and not traced:
        _let_memory_be_reused()
    at_once = traced or (length <= piece and not work.resumes)
    with without_autocast(tensors[0].device):
        if at_once:
            results, state, _ = work.run(0, length, work.take(tensors, 0, length), state, None)
        elif onto is not None and not torch.is_grad_enabled():
            *results, state = _InPieces.apply(work, length, piece, False, state, onto, *tensors)
            return tuple(results), state
        else:
            *results, state = _InPieces.apply(work, length, piece, torch.is_grad_enabled(), state, None, *tensors)
    if onto is not None:
        results = (onto + results[0], *results[1:])
    return tuple(results), state


class _InPieces(torch.autograd.Function):
    """The loop over the pieces, and the one back."""

    @staticmethod
    def forward(
        ctx: Any,
        work: PieceWork,
        length: int,
        piece: int,
        graph: bool,
        state: Tensor | None,
        onto: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        results: tuple[Tensor, ...] = ()
        states, kept = [], []
        for start in range(0, length, piece):
            stop = min(start + piece, length)
            states.append(state)
            outputs, state, keep = work.run_without_graph(tensors, start, stop, state)
            kept.append(keep if graph else ())
            results = results or tuple(
                x.new_empty(*x.shape[:2], length, *x.shape[3:]) if i or onto is None else onto
                for i, x in enumerate(outputs)
            )
            for i, (result, output) in enumerate(zip(results, outputs, strict=True)):
                if i or onto is None:
                    result[:, :, start:stop] = output
                else:
                    result[:, :, start:stop] += output
        ctx.work, ctx.length, ctx.piece = work, length, piece
        groups = [tensors, results if work.resumes else (), () if state is None else states, *kept]
        ctx.counts = [len(group) for group in groups]
        ctx.save_for_backward(*(x for group in groups for x in group))
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return *results, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        work = ctx.work
        saved = iter(ctx.saved_tensors)  # Once: checkpoints of the caller forbid to ask again.
        tensors, results, states, *kept = (tuple(itertools.islice(saved, count)) for count in ctx.counts)
        grad_output, grad_state = grads[0], grads[-1]
        if grad_output is None and grad_state is None:
            return (None,) * (6 + len(tensors))
        totals = work.totals(tensors)
        with without_autocast(tensors[0].device):
            for start in reversed(range(0, ctx.length, ctx.piece)):
                stop = min(start + ctx.piece, ctx.length)
                state = states[start // ctx.piece] if states else None
                known = (*(x[:, :, start:stop] for x in results), *kept[start // ctx.piece])
                grad = None if grad_output is None else grad_output[:, :, start:stop]
                grad_state = work.backward(tensors, totals, start, stop, state, known, grad, grad_state)
        needed = ctx.needs_input_grad[6:]
        returned = [t.to(x.dtype) if need else None for t, x, need in zip(totals, tensors, needed, strict=True)]
        return None, None, None, None, grad_state, None, *returned
