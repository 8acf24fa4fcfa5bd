"""Attention over one set of keys, and the exact merge of several sets into one softmax.

A softmax over the union of key sets equals the mean of the softmaxes over each set, weighted by the share of the total
exponential mass that the set holds. It is therefore enough that every part also returns its log-sum-exp.

Reference:
    Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; Liu et al. 2023, "Ring Attention with
    Blockwise Transformers", which merges parts in the same way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "MASKED",
    "AttentionPart",
    "attention_part",
    "biased_logits",
    "explicit_part",
    "fused_part",
    "has_fused_form",
    "has_visible_keys",
    "merge_parts",
]

# The logit of a masked key. It is finite, so that a row that sees nothing stays free of NaN, and so far down that its
# exponential is exactly zero beside any real logit. Logits are kept in float32 at least, where it is representable.
MASKED = -1e30


class AttentionPart(NamedTuple):
    """The result of attending to one set of keys.

    Attributes:
        output: Weighted values ``[..., n, d]``, normalised within the set.
        lse: Log-sum-exp of the logits of the set ``[..., n]``, float32 or float64.
    """

    output: Tensor
    lse: Tensor


class _Attention(torch.autograd.Function):
    """Attention that keeps no weights: the backward pass computes them again from the log-sum-exp.

    Reference:
        Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", appendix B; the
        gradient of the log-sum-exp adds to it what one of a plain output would be.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        part = (
            fused_part(query, key, value, bias)
            if has_fused_form(query, value, bias)
            else explicit_part(query, key, value, bias)
        )
        ctx.save_for_backward(query, key, value, bias, part.lse)
        return part.output, part.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, lse = ctx.saved_tensors
        grad_output, grad_lse = grads
        weights = biased_logits(query, key, bias).sub_(lse.unsqueeze(-1)).exp_()
        grad_value = weights.to(value.dtype).mT @ grad_output
        grad_logits = (grad_output @ value.mT).to(weights.dtype)
        # Row by row: what the softmax takes off all logits of a row, less what the log-sum-exp asks for.
        shift = torch.linalg.vecdot(weights, grad_logits) - grad_lse
        grad_logits.sub_(shift.unsqueeze(-1)).mul_(weights)
        grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_bias = grad_logits.unflatten(-2, (bias.shape[-2], -1)).sum(dim=-2).sum_to_size(bias.shape)
        narrow = grad_logits.to(query.dtype)
        return narrow @ key, narrow.mT @ query, grad_value, grad_bias


def biased_logits(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """Return the biased logits ``[..., m, w]``, float32 at least."""
    logits = query @ key.mT
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    rows = bias.shape[-2]
    if rows == logits.shape[-2]:
        # In place: the product does not need its own result in the backward pass, and logits are the largest tensor.
        return logits.add_(bias)
    return logits.unflatten(-2, (rows, -1)).add_(bias.unsqueeze(-2)).flatten(-3, -2)


def has_fused_form(query: Tensor, value: Tensor, bias: Tensor) -> bool:
    """Tell whether there is a kernel that gives the log-sum-exp too, and takes any bias."""
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and query.dim() == bias.dim() >= 4


def fused_part(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> AttentionPart:
    """Attend by the kernel behind ``scaled_dot_product_attention``, which never has all weights in memory."""
    rows = bias.shape[-2]
    # A row for all is taken as it is.
    mask = bias if rows in (1, query.shape[-2]) else bias.repeat_interleave(query.shape[-2] // rows, dim=-2)
    if key.is_contiguous() and value.is_contiguous() and (rows == 1 or mask.shape[:-2] == query.shape[:-2]):
        # The kernel lays its output out token by token, not head by head: with a single head that is the same.
        outer = query.shape[:-2]
        operands = [x.flatten(0, -3).unsqueeze(1) for x in (query, key, value)]
        mask = mask.expand(*outer, -1, -1).flatten(0, -3).unsqueeze(1)
    else:
        outer = query.shape[:-3]
        operands = [x.flatten(0, -4) for x in (query, key, value)]
        shared = all(size == 1 for size in mask.shape[:-3])
        mask = mask.expand(*((1,) * len(outer) if shared else outer), *mask.shape[-3:]).flatten(0, -4)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*operands, attn_mask=mask, scale=1.0)
    if outer == query.shape[:-2]:
        output, lse = output.squeeze(1), lse.squeeze(1)
    return AttentionPart(output.unflatten(0, outer), lse.unflatten(0, outer))


def explicit_part(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout_p: float = 0.0) -> AttentionPart:
    """Attend with all weights at hand, by operations that autograd, exporters and compilers understand."""
    logits = biased_logits(query, key, bias)
    weights, lse = torch.softmax(logits, dim=-1), torch.logsumexp(logits, dim=-1)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return AttentionPart(weights.to(value.dtype) @ value, lse)


def attention_part(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, dropout_p: float = 0.0) -> AttentionPart:
    """Attend to one set of keys.

    Args:
        query: Queries ``[..., m, d]``, already scaled.
        key: Keys ``[..., w, d]``.
        value: Values ``[..., w, d]``.
        bias: Added to the logits ``[..., R, w]``, where R divides m: rows of the query that follow one another in
            groups of m / R share a row of the bias. Masked keys carry ``MASKED``.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        The output ``[..., m, d]`` in the dtype of ``value`` and the log-sum-exp ``[..., m]``.
    """
    if dropout_p > 0.0 or torch.compiler.is_compiling():
        # Exporters do not trace custom functions that need a gradient, and a compiler fuses the plain form by itself.
        return explicit_part(query, key, value, bias, dropout_p)
    return AttentionPart(*_Attention.apply(query, key, value, bias))


def has_visible_keys(lse: Tensor) -> Tensor:
    """Tell which rows saw at least one key that was not masked; boolean, shape of ``lse``."""
    return lse > MASKED / 2


def merge_parts(parts: Sequence[AttentionPart]) -> AttentionPart:
    """Merge attention over disjoint key sets into attention over their union.

    Args:
        parts: One or more parts of equal shapes. A bias that is constant over a set, such as a learned preference for
            it, is added to the ``lse`` of its part beforehand.

    Returns:
        The merged part; its output has the dtype of the first part's output.
    """
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([part.lse for part in parts])
    shares = torch.softmax(lses, dim=0).unsqueeze(-1)
    # A product and a sum: each is faster on CPUs than addcmul with a factor for each row.
    output = parts[0].output * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        output = output + part.output * share
    return AttentionPart(output.to(parts[0].output.dtype), torch.logsumexp(lses, dim=0))
