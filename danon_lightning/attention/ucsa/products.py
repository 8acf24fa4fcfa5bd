"""Attention of batches of queries to batches of keys, with a backward pass that starts from the log-sum-exp."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Grads", "attend", "biased_logits", "gradients"]


class Grads(NamedTuple):
    """Gradients.

    Attributes:
        query: ``[B, P, d]``.
        key: ``[B, w, d]``.
        value: ``[B, w, d]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    keep: Callable[[torch.Size, torch.dtype], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        query: Scaled ``[B, P, d]``, or ``[N, C, P, d]``, like the others.
        key: ``[B, w, d]``; overlapping views need no copies.
        value: ``[B, w, d]``.
        bias: Added to the logits, float32 or float64, of a shape that broadcasts with ``[B, P, w]``.
        keep: Gives the factors of dropout.

    Returns:
        The output ``[B, P, d]`` and the log-sum-exp of the logits ``[B, P]``, float32 or float64.
    """
    if query.device.type == "cpu" and keep is None and query.dtype != torch.float16:
        # The kernel under scaled_dot_product_attention, which also returns the log-sum-exp. Logits stay in the cache.
        mask = None if bias is None else bias.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        is_flat = query.dim() == 3
        if is_flat:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            mask = None if mask is None else mask.unsqueeze(1)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=1.0
        )
        output = output.to(lse.dtype)
        return (output.squeeze(1), lse.squeeze(1)) if is_flat else (output, lse)
    logits = biased_logits(query, key, bias)
    weights = torch.softmax(logits, dim=-1)
    # The largest weight is exp(max logit - lse), which gives the lse without a second pass of exponentials.
    lse = logits.amax(dim=-1) - weights.amax(dim=-1).log()
    if keep is not None:
        weights *= keep(weights.shape, weights.dtype)
    return (weights.to(value.dtype) @ value).to(lse.dtype), lse


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    keep: Callable[[torch.Size, torch.dtype], Tensor] | None,
    grad: Tensor,
    lse: Tensor,
    shift: Tensor,
    out: Tensor | None = None,
) -> Grads:
    """Return the gradients of attention to a set of keys, one of several in the same softmax.

    Args:
        query: As in ``attend``, like the next four.
        key: ``[B, w, d]``.
        value: ``[B, w, d]``.
        bias: Added to the logits.
        keep: Gives the factors of dropout.
        grad: Gradient of the output of all sets ``[B, P, d]``.
        lse: Log-sum-exp of the logits of all sets ``[B, P]``; infinite where there is nothing to differentiate.
        shift: Product of output and gradient ``[B, P]``.
        out: Where the gradient of the query is written.
    """
    if query.dtype != lse.dtype:
        weights = biased_logits(query, key, bias).sub_(lse.unsqueeze(-1)).exp_()
    elif bias is None:
        weights = torch.baddbmm(-lse.unsqueeze(-1), query, key.mT).exp_()
    else:
        weights = (bias - lse.unsqueeze(-1)).baddbmm_(query, key.mT).exp_()
    if keep is None and grad.dtype == lse.dtype:
        grad_value = torch.bmm(weights.mT, grad)
        grad_logits = torch.baddbmm(-shift.unsqueeze(-1), grad, value.mT).mul_(weights)
        return Grads(torch.bmm(grad_logits, key, out=out), torch.bmm(grad_logits.mT, query), grad_value)
    grad_weights = torch.bmm(grad, value.mT).to(weights.dtype)
    kept = weights
    if keep is not None:
        factors = keep(weights.shape, weights.dtype)
        grad_weights *= factors
        kept = weights * factors
    grad_value = torch.bmm(kept.to(grad.dtype).mT, grad)
    grad_logits = grad_weights.sub_(shift.unsqueeze(-1)).mul_(weights).to(query.dtype)
    return Grads(torch.bmm(grad_logits, key, out=out), torch.bmm(grad_logits.mT, query), grad_value)


def biased_logits(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """Return logits ``[B, P, w]``, float32 or float64; see ``attend`` for the arguments."""
    logits = query @ key.mT
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if bias is None else logits.add_(bias)
