"""The softmax part of DALA for some blocks of queries: what they need of the sequence, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from danon_lightning.attention.dala.blocks import Blocks
from danon_lightning.attention.dala.head_by_head import Far, Near, attend_head_by_head, gradients_head_by_head
from danon_lightning.attention.dala.local import local_bias
from danon_lightning.attention.dala.memory import add_to_tokens, take_tokens
from danon_lightning.attention.joint import Joint, KeySet, joint_attention
from danon_lightning.attention.merging import MASKED
from danon_lightning.attention.recompute import Piece, PieceWork
from danon_lightning.attention.rotary import cell_positions, rotary_tables, rotate
from danon_lightning.attention.scratch import Scratch
from danon_lightning.attention.windows import padded, windows

__all__ = ["SoftmaxWork"]


class SoftmaxWork(PieceWork):
    """Attention of some blocks of queries.

    Args:
        blocks: How the sequence is cut.
        tokens: The tokens that each block remembers ``[b, blocks, m]``; ``None``: nothing is remembered.
        biased: Whether the memory has a bias.
        rope_base: Base of the rotary embedding.
        dropout_p: Probability of dropping an attention weight.
        seed: With the same seed, the same weights are dropped.
    """

    resumes = True

    def __init__(
        self, blocks: Blocks, tokens: Tensor | None, biased: bool, rope_base: float | None, dropout_p: float, seed: int
    ) -> None:
        """Remember them."""
        self.blocks, self.tokens, self.biased, self.rope_base = blocks, tokens, biased, rope_base
        self.dropout_p, self.seed = dropout_p, seed
        self.scratch = Scratch()

    def take(self, tensors: Sequence[Tensor], start: int, stop: int) -> Sequence[Tensor]:
        """Return queries, with the block before keys, values and masses, and what the memory holds."""
        parts = self._views(tensors, start, stop)
        if self.tokens is None:
            return parts
        here = self.tokens[:, self.blocks.holding(start, stop)]
        return [*parts, *(take_tokens(x, here, tensors[0].shape[1]) for x in tensors[1:3])]

    def give(self, totals: Sequence[Tensor], start: int, stop: int, grads: Sequence[Tensor]) -> None:
        """Undo ``take`` for gradients."""
        parts = self._views(totals, start, stop)
        for view, grad in zip(parts, grads, strict=False):
            view += grad
        if self.tokens is not None:
            here = self.tokens[:, self.blocks.holding(start, stop)]
            for total, grad in zip(totals[1:3], grads[len(parts) :], strict=True):
                add_to_tokens(total, here, grad)

    def _views(self, tensors: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        """Return what is a piece of the tensors."""
        q, k, v, mass, coefficients, *rest = tensors
        here, window = self.blocks.holding(start, stop), slice(max(0, start - self.blocks.size), stop)
        parts = [q[:, :, start:stop], *(x[:, :, window] for x in (k, v, mass))]
        parts.append(coefficients[:, here] if coefficients.shape[1] > 1 else coefficients)
        if self.biased:
            parts.append(rest.pop(0)[:, :, start:stop])
        if self.tokens is not None:
            parts.append(rest.pop(0)[:, :, here])
        return parts

    def run_without_graph(self, tensors: Sequence[Tensor], start: int, stop: int, state: Tensor | None) -> Piece:
        """Attend to window and memory, in memory that is used again for the next piece where that is faster."""
        if not self._head_by_head(tensors[0]):
            return super().run_without_graph(tensors, start, stop, state)
        near, far = self._near_and_far(self._views(tensors, start, stop), tensors, start, stop)
        joint = attend_head_by_head(near, far, stop - start, self.scratch)
        return Piece(tuple(joint))

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
    ) -> None:
        """Add what some blocks contribute to the gradients, in the same memory."""
        q = tensors[0]
        if not self._head_by_head(q):
            super().backward(tensors, totals, start, stop, state, known, grad_output, grad_state)
            return
        assert grad_output is not None
        views = [x.detach().requires_grad_() for x in self._views(tensors, start, stop)]
        with torch.enable_grad():
            near, far = self._near_and_far(views, tensors, start, stop)
        with torch.no_grad():
            found = gradients_head_by_head(near, far, Joint(*known), grad_output, totals[1:3], self.scratch)
        grads = torch.autograd.grad([x for x, _ in found], views, [grad for _, grad in found], materialize_grads=True)
        for view, grad in zip(self._views(totals, start, stop), grads, strict=True):
            view += grad

    def _head_by_head(self, q: Tensor) -> bool:
        """Tell whether one head after the other is faster, and implemented."""
        return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and self.dropout_p == 0.0

    def _near_and_far(
        self, views: Sequence[Tensor], tensors: Sequence[Tensor], start: int, stop: int
    ) -> tuple[Near, Far | None]:
        """Return window and memory of some blocks, as one head after the other needs them."""
        q, k, v, mass, coefficients, *rest = views
        preference = rest.pop(0) if self.biased else None
        near = Near(*self._window(start, q, k, v, mass), coefficients)
        if self.tokens is None:
            return near, None
        tokens = self.tokens[:, self.blocks.holding(start, stop)]
        return near, Far(self._scaled(q), tensors[1], tensors[2], tokens, rest[0], preference)

    def run(
        self, start: int, stop: int, operands: Sequence[Tensor], state: Tensor | None, known: Sequence[Tensor] | None
    ) -> Piece:
        """Attend to window and memory."""
        q, k, v, mass, coefficients, *rest = operands
        preference = rest.pop(0) if self.biased else None
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        query, key, value, masses, distances = self._window(start, q, k, v, mass)
        sets = [KeySet(query, key, value, local_bias(coefficients, distances).unsqueeze(0) + masses)]
        if self.tokens is not None:
            masses, keys, values = rest
            sets.append(KeySet(self._scaled(q), keys, values, masses.unsqueeze(3), preference))
        known = None if known is None else Joint(*known)
        joint = joint_attention(sets, q.shape[2], dropout_p=self.dropout_p, seed=self.seed + start, known=known)
        return Piece(tuple(joint))

    def _scaled(self, q: Tensor) -> Tensor:
        """Return the queries of the memory, block by block."""
        size = self.blocks.size
        return (padded(q, 0, -q.shape[2] % size) * q.shape[-1] ** -0.5).unflatten(2, (-1, size))

    def _window(
        self, start: int, q: Tensor, k: Tensor, v: Tensor, mass: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys, values and masses of the own block and the one before, and the distances in it.

        The first block fills up the one before it.
        """
        size, width = self.blocks.size, q.shape[-1]
        count, tokens = -(-q.shape[2] // size), q.shape[2]
        first = max(0, start - size)
        positions = cell_positions(first, k.shape[2], 1, q.device)
        tables = rotary_tables(positions, width, self.rope_base, q.dtype)
        scale = width**-0.5
        query = q * scale if tables is None else rotate(q, tables[:, -tokens:] * scale)
        key = k if tables is None else rotate(k, tables)
        wide = size if self.blocks.count == 1 else 2 * size
        before, after = wide - size - (start - first), count * size - tokens
        query = padded(query, 0, after).unflatten(2, (count, size))
        key, value = (windows(padded(x, before, after), count, size, wide) for x in (key, v))
        masses = windows(padded(mass.unsqueeze(-1), before, after, MASKED), count, size, wide)  # [b, 1, c, w, 1]
        columns = torch.arange(wide, device=q.device)
        return query, key, value, masses.mT, columns[-size:].unsqueeze(-1) - columns
