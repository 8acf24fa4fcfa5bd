"""Gradients of a sum of losses, one loss at a time."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class _WithGradients(torch.autograd.Function):
    """A number whose gradients are known already: its backward pass hands them out."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters_and_gradients: Tensor) -> Tensor:
        count = len(parameters_and_gradients) // 2
        ctx.save_for_backward(*parameters_and_gradients[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [grad] = grads
        handed_out = [gradient * grad.to(gradient.dtype) for gradient in ctx.saved_tensors]
        return None, *handed_out, *(None for _ in handed_out)


def sum_with_gradients(losses: Iterable[Tensor], parameters: Iterable[nn.Parameter]) -> Tensor:
    """Add up losses, and compute the gradients of each one before the next one is asked for.

    So the graphs of two losses are never there at the same time, and neither are the activations they hold. The sum can
    be used like one that was computed plainly: scaled, added to others, and given to ``backward`` once, which hands the
    gradients to the parameters together. Automatic optimization, accumulation over batches and gradient exchanges thus
    work as ever, except that an exchange begins only then. With losses scaled for float16 the scale comes after the
    gradients were computed, so it does not keep small ones from vanishing: use bfloat16 or float32.

    Args:
        losses: Scalars, lazily, such as from a generator; no graph connects them.
        parameters: Whose gradients are wanted; those that a loss does not depend on count as zero. Other tensors
            receive none.

    Returns:
        The sum, a scalar; without a graph where gradients are not recorded.

    Raises:
        ValueError: If there is no loss.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    total: Tensor | None = None
    gradients: list[Tensor] = []
    for loss in losses:
        if torch.is_grad_enabled() and wanted:
            new = torch.autograd.grad(loss, wanted, materialize_grads=True)
            if gradients:
                torch._foreach_add_(gradients, new)
            else:
                # Copies of those that may be one tensor, expanded or shared.
                gradients = [gradient.clone() for gradient in new]
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        raise ValueError("losses is empty: there is nothing to add up")
    result: Tensor = _WithGradients.apply(total, *wanted, *gradients) if gradients else total
    return result
