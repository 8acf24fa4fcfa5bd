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

__all__ = ["MASKED", "AttentionPart", "attention_part", "has_visible_keys", "merge_parts"]

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


class _SoftmaxWithLogSumExp(torch.autograd.Function):
    """Softmax over the last dimension together with its log-sum-exp, saving one tensor for both."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(logits, dim=-1)
        # The largest weight is exp(max logit − lse), which gives the lse without a second pass of exponentials.
        lse = logits.amax(dim=-1) - weights.amax(dim=-1).log()
        ctx.save_for_backward(weights)
        return weights, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        grad_weights, grad_lse = grads
        shift = (grad_weights * weights).sum(dim=-1) - grad_lse
        return (grad_weights - shift.unsqueeze(-1)).mul_(weights)


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
    logits = query @ key.transpose(-1, -2)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    rows = bias.shape[-2]
    if rows == logits.shape[-2]:
        # In place: the product does not need its own result in the backward pass, and logits are the largest tensor.
        logits.add_(bias)
    else:
        # Not in place: changing a view of a tensor makes the backward pass copy its whole gradient.
        logits = (logits.unflatten(-2, (rows, -1)) + bias.unsqueeze(-2)).flatten(-3, -2)
    if torch.compiler.is_compiling():
        # Exporters do not trace custom functions that need a gradient, and a compiler fuses the plain form by itself.
        weights, lse = torch.softmax(logits, dim=-1), torch.logsumexp(logits, dim=-1)
    else:
        weights, lse = _SoftmaxWithLogSumExp.apply(logits)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return AttentionPart(weights.to(value.dtype) @ value, lse)


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
    lses = torch.stack([part.lse for part in parts], dim=-1)
    shares = torch.softmax(lses, dim=-1)
    output = parts[0].output * shares[..., :1]
    for index, part in enumerate(parts[1:], start=1):
        output = torch.addcmul(output, part.output.to(output.dtype), shares[..., index : index + 1])
    return AttentionPart(output.to(parts[0].output.dtype), torch.logsumexp(lses, dim=-1))
