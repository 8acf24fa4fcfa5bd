"""Attention of batches of queries to batches of keys, with a backward pass that starts from the log-sum-exp."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Grads", "attend", "gradients"]


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
    hide: Callable[[Tensor], None],
    keep: Callable[[torch.Size, torch.dtype], Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        query: Scaled ``[B, P, d]``.
        key: ``[B, w, d]``.
        value: ``[B, w, d]``.
        hide: Adds biases to the logits ``[B, P, w]``, in place.
        keep: Gives the factors of dropout, or nothing.

    Returns:
        The output ``[B, P, d]`` and the log-sum-exp of the logits ``[B, P]``, float32 or float64.
    """
    logits = _logits(query, key, hide)
    weights = torch.softmax(logits, dim=-1)
    # The largest weight is exp(max logit - lse), which gives the lse without a second pass of exponentials.
    lse = logits.amax(dim=-1) - weights.amax(dim=-1).log()
    factors = keep(weights.shape, weights.dtype)
    if factors is not None:
        weights *= factors
    return torch.bmm(weights.to(value.dtype), value).to(lse.dtype), lse


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hide: Callable[[Tensor], None],
    keep: Callable[[torch.Size, torch.dtype], Tensor | None],
    grad: Tensor,
    lse: Tensor,
    shift: Tensor,
) -> Grads:
    """Return the gradients of attention to a set of keys, one of several in the same softmax.

    Args:
        query: As in ``attend``, like the next four.
        key: ``[B, w, d]``.
        value: ``[B, w, d]``.
        hide: Adds biases.
        keep: Gives the factors of dropout.
        grad: Gradient of the output of all sets ``[B, P, d]``.
        lse: Log-sum-exp of the logits of all sets ``[B, P]``; infinite where there is nothing to differentiate.
        shift: Product of output and gradient ``[B, P]``.
    """
    weights = _logits(query, key, hide).sub_(lse.unsqueeze(-1)).exp_()
    grad_weights = torch.bmm(grad, value.mT).to(weights.dtype)
    factors = keep(weights.shape, weights.dtype)
    kept = weights
    if factors is not None:
        grad_weights *= factors
        kept = weights * factors
    grad_value = torch.bmm(kept.to(grad.dtype).mT, grad)
    grad_logits = grad_weights.sub_(shift.unsqueeze(-1)).mul_(weights).to(query.dtype)
    return Grads(torch.bmm(grad_logits, key), torch.bmm(grad_logits.mT, query), grad_value)


def _logits(query: Tensor, key: Tensor, hide: Callable[[Tensor], None]) -> Tensor:
    logits = torch.bmm(query, key.mT)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    hide(logits)
    return logits
