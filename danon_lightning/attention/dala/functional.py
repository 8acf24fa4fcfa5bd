"""Dynamic adaptive long-range attention (DALA), the softmax part, in its fast, parallel form.

Queries of one block share a window of two blocks and one set of remembered tokens, so both are batched products of
dense tiles. The cost is O(n·(2B + M)); the work goes on a few blocks at a time, so that logits never take more memory
than those of a few blocks where no gradient is wanted.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from danon_lightning.attention.dala.arguments import check_settings, check_tensors
from danon_lightning.attention.dala.blocks import Blocks
from danon_lightning.attention.dala.head_by_head import Far, Near, attend_head_by_head
from danon_lightning.attention.dala.local import distance_coefficients, local_bias
from danon_lightning.attention.dala.memory import add_to_tokens, memory_scores, select_memory, take_tokens
from danon_lightning.attention.joint import Joint, KeySet, joint_attention
from danon_lightning.attention.merging import MASKED
from danon_lightning.attention.recompute import PieceWork, in_pieces
from danon_lightning.attention.rotary import cell_positions, rotary_tables, rotate
from danon_lightning.attention.scratch import Scratch
from danon_lightning.attention.windows import padded, windows

__all__ = ["DALAStats", "dala_attention"]


class DALAStats(NamedTuple):
    """What a query attended to; detached.

    Attributes:
        memory_weight: Share of the attention mass on the importance memory ``[b, H, n]``.
        lse: Log-sum-exp of all visible logits ``[b, H, n]``.
        memory_tokens: The tokens that the queries of each block remember, -1 where there are fewer ``[b, blocks, m]``.
    """

    memory_weight: Tensor
    lse: Tensor
    memory_tokens: Tensor


@overload
def dala_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_importance: Tensor,
    block_size: int,
    memory_size: int,
    distance_decay: Tensor,
    window_width: Tensor | float,
    importance_threshold: float = ...,
    recency: float = ...,
    memory_bias: Tensor | None = ...,
    rope_base: float | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def dala_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_importance: Tensor,
    block_size: int,
    memory_size: int,
    distance_decay: Tensor,
    window_width: Tensor | float,
    importance_threshold: float = ...,
    recency: float = ...,
    memory_bias: Tensor | None = ...,
    rope_base: float | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, DALAStats]: ...


def dala_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_importance: Tensor,
    block_size: int,
    memory_size: int,
    distance_decay: Tensor,
    window_width: Tensor | float,
    importance_threshold: float = 0.0,
    recency: float = 1e-3,
    memory_bias: Tensor | None = None,
    rope_base: float | None = 10000.0,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DALAStats]:
    """Attend, causally, to a local window and to the most important tokens before it, in one softmax.

    Query i of block c = ⌊i/B⌋ sees the tokens j <= i of blocks c - 1 and c with the logit
    q·k/√d + ℓ_j - λ(i - j) - (i - j)²/(2w²), q and k rotated; and of the tokens before block c - 1 the M with the
    largest ℓ_j + ρ·j, of equal ones the later, with the logit q·k/√d + ℓ_j + bias_i, q and k not rotated. The selection
    has no gradient, ℓ has one through the logits.

    Args:
        q: Queries ``[b, H, n, d]``, neither rotated nor scaled.
        k: Keys ``[b, G, n, d]``, H divisible by G.
        v: Values ``[b, G, n, d]``.
        log_importance: ℓ, the logarithm of an importance between 0 and 1, shared by the heads ``[b, n]``.
        block_size: Tokens B in a block.
        memory_size: Tokens M in the memory; 0 leaves the local window alone.
        distance_decay: λ ``[H]``.
        window_width: w, positive: a number or of shape ``[]``, ``[H]`` or ``[H, blocks]``, blocks = ⌈n/B⌉.
        importance_threshold: Tokens of less importance are not remembered; from 0 to 1.
        recency: ρ, what a position adds to the score of a token in the selection.
        memory_bias: Added to all logits of the memory ``[b, H, n]``; ``None`` means zero.
        rope_base: Base of the rotary embedding in the window; ``None`` means no rotation.
        key_padding_mask: True for real tokens ``[b, n]``, boolean; ``None`` means that all are.
        dropout_p: Probability of dropping an attention weight.
        return_stats: Whether to return statistics too.

    Returns:
        The output ``[b, H, n, d]`` in the dtype of ``v``, zero in rows that see no real token; with ``return_stats``
        also a ``DALAStats``.

    Raises:
        ValueError: If shapes do not fit each other or a setting is out of range.
    """
    check_settings(q, block_size, memory_size, importance_threshold)
    blocks = Blocks.of(q.shape[-2], block_size, q.device)
    check_tensors(
        q,
        k,
        v,
        blocks.count,
        log_importance=log_importance,
        distance_decay=distance_decay,
        window_width=window_width,
        memory_bias=memory_bias,
        key_padding_mask=key_padding_mask,
    )
    dtype = torch.promote_types(q.dtype, torch.float32)
    importance = log_importance.to(dtype)
    if key_padding_mask is not None:
        importance = importance.masked_fill(~key_padding_mask, MASKED)
    scores = memory_scores(importance, 0, importance_threshold=importance_threshold, recency=recency)
    memory_tokens = select_memory(scores, block_size, memory_size)
    coefficients = distance_coefficients(distance_decay, window_width, dtype)

    remembered = memory_tokens.shape[-1] > 0
    if remembered:
        # Whole rows are taken of them.
        k, v = k.contiguous(), v.contiguous()
    tensors = [q, k, v, importance.unsqueeze(1), coefficients]
    if memory_bias is not None:
        tensors.append(memory_bias)
    if remembered:
        masses = importance.gather(1, memory_tokens.clamp(min=0).flatten(1)).view(memory_tokens.shape)
        tensors.append(masses.masked_fill(memory_tokens < 0, MASKED).unsqueeze(1))
    seed = int(torch.randint(2**31, ())) if dropout_p > 0.0 else 0
    work = _Work(blocks, memory_tokens if remembered else None, memory_bias is not None, rope_base, dropout_p, seed)
    (output, lses), _ = in_pieces(work, tensors, blocks.length, blocks.at_once * blocks.size)
    if not return_stats:
        return output
    joint = Joint(output, lses.detach())
    weight = (joint.lses[..., -1] - joint.lse).exp() if remembered else torch.zeros_like(joint.lse)
    return output, DALAStats(weight, joint.lse, memory_tokens)


class _Work(PieceWork):
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

    def run_without_graph(
        self, tensors: Sequence[Tensor], start: int, stop: int, state: Tensor | None
    ) -> tuple[tuple[Tensor, ...], None]:
        """Attend to window and memory, in memory that is used again for the next piece where that is faster."""
        q = tensors[0]
        if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.float64) or self.dropout_p > 0.0:
            return self.run(start, stop, self.take(tensors, start, stop), state, None)
        q, k, v, mass, coefficients, *rest = self._views(tensors, start, stop)
        preference = rest.pop(0) if self.biased else None
        near = Near(*self._window(start, q, k, v, mass), coefficients)
        far = None
        if self.tokens is not None:
            tokens = self.tokens[:, self.blocks.holding(start, stop)]
            far = Far(self._scaled(q), tensors[1], tensors[2], tokens, rest[0], preference)
        joint = attend_head_by_head(near, far, q.shape[2], self.scratch)
        return (joint.output, joint.lses), None

    def run(
        self, start: int, stop: int, operands: Sequence[Tensor], state: Tensor | None, known: Sequence[Tensor] | None
    ) -> tuple[tuple[Tensor, ...], None]:
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
        return tuple(joint), None

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
