"""One softmax over several sets of keys, with a backward pass that takes each of them by itself."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from danon_lightning.attention.dropout import Keep, dropout_factors
from danon_lightning.attention.exponential import exp_or_zero_
from danon_lightning.attention.merging import (
    AttentionPart,
    attention_part,
    biased_logits,
    has_visible_keys,
)
from danon_lightning.attention.recompute import is_traced

__all__ = ["Joint", "KeySet", "backward_terms", "joint_attention", "laid_out"]


class KeySet(NamedTuple):
    """Keys of a joint softmax, and how queries are laid out to meet them: c blocks of t queries, w keys for each.

    Attributes:
        query: Queries, already scaled ``[b, H, c, t, d]``; all sets have the same rows, in the same order.
        key: Keys ``[b, H, c, w, d]``.
        value: Values ``[b, H, c, w, dv]``.
        bias: Added to the logits ``[b or 1, H or 1, c, R, w]``, float32 or float64, where R divides t: rows that follow
            one another in groups of t / R share a row of the bias. Masked keys carry ``MASKED``.
        preference: Added to all logits of a row ``[b, H, n]``, n at most c·t; ``None`` means zero.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    preference: Tensor | None = None


class Joint(NamedTuple):
    """The result of attending to several sets of keys in one softmax.

    Attributes:
        output: ``[b, H, n, dv]`` in the dtype of the values; zero in rows that see no key.
        lses: Log-sum-exp of the logits of each set ``[b, H, n, sets]``, without a gradient.
    """

    output: Tensor
    lses: Tensor

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of all logits ``[b, H, n]``."""
        return self.lses.squeeze(-1) if self.lses.shape[-1] == 1 else torch.logsumexp(self.lses, dim=-1)


def joint_attention(
    sets: Sequence[KeySet], rows: int, *, dropout_p: float = 0.0, seed: int = 0, known: Joint | None = None
) -> Joint:
    """Attend to several sets of keys in one softmax.

    The backward pass keeps no weights: it computes those of each set again from the log-sum-exp of all of them, and
    needs nothing else of the other sets.

    Args:
        sets: The sets.
        rows: Queries n; what is beyond them fills up the last block.
        dropout_p: Probability of dropping an attention weight.
        seed: With the same seed, the same weights are dropped.
        known: The result, if it is known and only the backward pass is wanted.

    Reference:
        Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", appendix B.
    """
    if is_traced(sets[0].query):
        # Exporters do not trace custom functions that need a gradient, and a compiler fuses the plain form by itself.
        return _attend(sets, rows, partial(attention_part, dropout_p=dropout_p))
    return Joint(*_JointAttention.apply(rows, dropout_p, seed, known, *(x for keys in sets for x in keys)))


class _JointAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: int, dropout_p: float, seed: int, known: Joint | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.dropout_p, ctx.seed = dropout_p, seed
        if known is None:
            sets, attend = _sets(tensors), attention_part
            if dropout_p > 0.0:
                attend = partial(_attend_and_drop, keep=dropout_factors(dropout_p, seed, sets[0].query.device))
            known = _attend(sets, rows, attend)
        ctx.save_for_backward(*tensors, *known)
        ctx.mark_non_differentiable(known.lses)
        return known.output, known.lses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, output, lses = ctx.saved_tensors
        keep = dropout_factors(ctx.dropout_p, ctx.seed, grad.device) if ctx.dropout_p > 0.0 else None
        lse, shift = backward_terms(Joint(output, lses), grad)
        grads: list[Tensor | None] = [None] * 4
        for keys in _sets(tensors):
            grads += _gradients(keys, grad, lse, shift, keep, needs_bias=ctx.needs_input_grad[len(grads) + 3])
        return tuple(grads)


def _sets(tensors: Sequence[Tensor | None]) -> list[KeySet]:
    size = len(KeySet._fields)
    return [KeySet(*tensors[start : start + size]) for start in range(0, len(tensors), size)]  # type: ignore[arg-type]


def _attend(sets: Sequence[KeySet], rows: int, attend: Callable[..., AttentionPart]) -> Joint:
    """Attend to each set and merge."""
    parts, lses = [], []
    for keys in sets:
        part = attend(*keys[:4])
        lse = part.lse.flatten(2)[:, :, :rows]
        parts.append(part.output)
        lses.append(lse if keys.preference is None else lse + keys.preference)
    logs = torch.stack(lses, dim=-1)
    # Of rows that see nothing, nothing is left.
    blind = ~has_visible_keys(logs.amax(dim=-1, keepdim=True))
    shares = torch.softmax(logs, dim=-1).masked_fill(blind, 0.0)
    output = _weighted(parts[0], shares[..., :1])
    for index in range(1, len(parts)):
        # A product and a sum: each is faster on CPUs than addcmul with a factor for each row.
        output = output.add_(_weighted(parts[index], shares[..., index : index + 1]))
    return Joint(output.to(parts[0].dtype), logs)


def _weighted(part: Tensor, share: Tensor) -> Tensor:
    """Return ``part [b, H, c, t, d]``, which may be overwritten, times ``share [b, H, n, 1]``: ``[b, H, n, d]``."""
    rows, blocks = share.shape[2], part.shape[2:4]
    if torch.is_grad_enabled() or part.dtype != share.dtype or rows != blocks[0] * blocks[1]:
        return part.flatten(2, 3)[:, :, :rows] * share
    # Fresh memory costs more than the product, and so does one more pass where the kernel mixes blocks up in memory.
    target = part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
    return torch.mul(part, share.unflatten(2, tuple(blocks)), out=target).flatten(2, 3)


def laid_out(x: Tensor, blocks: Sequence[int], fill: float = 0.0) -> Tensor:
    """Lay tokens ``[b, H, n, ...]`` out in ``blocks``, c of t tokens ``[b, H, c, t, ...]``."""
    missing = blocks[0] * blocks[1] - x.shape[2]
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing), value=fill)
    return x.unflatten(2, tuple(blocks))


def _attend_and_drop(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, keep: Keep) -> AttentionPart:
    logits = biased_logits(query, key, bias)
    weights = torch.softmax(logits, dim=-1)
    weights *= keep(weights.shape, weights.dtype)
    return AttentionPart(weights.to(value.dtype) @ value, torch.logsumexp(logits, dim=-1))


def backward_terms(joint: Joint, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the backward pass takes off all logits of a row, and off their gradients, ``[b, H, n]`` each.

    Args:
        joint: The result.
        grad: The gradient of its output.
    """
    lse = joint.lse
    # Rows that see nothing: no weight, no gradient.
    lse = lse.masked_fill(~has_visible_keys(lse), float("inf"))
    return lse, torch.linalg.vecdot(grad.to(lse.dtype), joint.output.to(lse.dtype))


def _gradients(
    keys: KeySet, grad: Tensor, lse: Tensor, shift: Tensor, keep: Keep | None, *, needs_bias: bool
) -> list[Tensor | None]:
    """Return the gradients of a set: ``lse`` and ``shift`` are those of all sets ``[b, H, n]``."""
    query, key, value, bias, preference = keys
    # Each product would copy windows that overlap.
    key, value = key.contiguous(), value.contiguous()
    blocks, tokens = query.shape[2:4], query.shape[3]
    if preference is not None:
        lse = lse - preference
    grad, lse, shift = laid_out(grad, blocks), laid_out(lse, blocks, float("inf")), laid_out(shift, blocks)
    weights = exp_or_zero_(biased_logits(query, key, bias).sub_(lse.unsqueeze(-1)))
    grad_logits = (grad @ value.mT).to(weights.dtype)
    kept = weights
    if keep is not None:
        factors = keep(weights.shape, weights.dtype)
        grad_logits *= factors
        kept = weights * factors
    grad_value = kept.to(value.dtype).mT @ grad
    grad_logits.sub_(shift.unsqueeze(-1)).mul_(weights)
    grad_bias = None
    if needs_bias:
        grad_bias = grad_logits
        if bias.shape[-2] != tokens:
            grad_bias = grad_bias.unflatten(-2, (bias.shape[-2], -1)).sum(dim=-2)
        grad_bias = grad_bias.sum_to_size(bias.shape)
    grad_preference = None
    if preference is not None:
        grad_preference = grad_logits.sum(dim=-1).flatten(2)[:, :, : preference.shape[2]].to(preference.dtype)
    narrow = grad_logits.to(query.dtype)
    return [narrow @ key, narrow.mT @ query, grad_value, grad_bias, grad_preference]
