"""Means over unevenly many elements, combined exactly over micro-batches.

A mean over the labelled tokens of a batch is not the mean of the means of its micro-batches where these have unequal
numbers of them. It is, if each of the latter is multiplied by its share of the elements and divided by its share of the
batch, which is what the whole loss of a micro-batch is weighted with.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from danon_lightning.strategies.pipeline.absent import find_absent
from danon_lightning.strategies.pipeline.errors import UnsupportedStepError

# These divide by the number (or the sum of weights) of the labels that are not ignored.
_CLASSIFICATION = {F.cross_entropy, F.nll_loss}
# These divide by the number of elements.
_ELEMENTWISE = {
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.kl_div,
    F.poisson_nll_loss,
    F.gaussian_nll_loss,
    F.soft_margin_loss,
}
# These divide by the sum of the weights, if any are given.
_WEIGHTED_MEAN = {F.mse_loss, F.l1_loss, F.huber_loss}


class EnoughCountedError(BaseException):
    """Ends a step whose losses have all been counted. No Exception, so that user code does not catch it."""


class CountedLosses(TorchFunctionMode):
    """Notes what losses that take a mean divide by.

    Attributes:
        divisors: For each call in their order; None where it depends on absent data.
    """

    def __init__(self, stop_after: int | None = None) -> None:
        """Start.

        Args:
            stop_after: End the step by :class:`EnoughCountedError` at this many calls.
        """
        super().__init__()
        self.divisors: list[float | None] = []
        self._stop_after = stop_after

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the divisor if this is such a loss, and carry it out."""
        call = _mean_call(func, args, kwargs or {})
        if call is not None:
            self.divisors.append(_divisor(func, call))
            if len(self.divisors) == self._stop_after:
                raise EnoughCountedError
        return func(*args, **(kwargs or {}))


class RescaledLosses(TorchFunctionMode):
    """Multiplies losses that take a mean by given factors."""

    def __init__(self, factors: Sequence[float]) -> None:
        """Start.

        Args:
            factors: One for each call in their order.
        """
        super().__init__()
        self._factors = list(factors)
        self._calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry the call out, rescaled if it is such a loss."""
        call = _mean_call(func, args, kwargs or {})
        if call is None:
            return func(*args, **(kwargs or {}))
        if self._calls == len(self._factors):
            raise UnsupportedStepError(
                f"the step calls more losses than the {len(self._factors)} of its dry run: their number must not "
                "depend on values"
            )
        factor = self._factors[self._calls]
        self._calls += 1
        if factor:
            return func(*args, **(kwargs or {})) * factor
        # The mean over no elements is not a number; their sum is zero and has the same graph.
        return func(**{**call, "reduction": "sum"})


def loss_factors(divisors: Sequence[Sequence[float | None]], weights: Sequence[float]) -> list[list[float]]:
    """What the losses of each micro-batch are to be multiplied by.

    Args:
        divisors: For each micro-batch, what its losses divide by (see :class:`CountedLosses`).
        weights: What the whole loss of each micro-batch will be weighted with: its share of the batch.

    Returns:
        For each micro-batch, a factor for each loss: 1 where a divisor is not known.

    Raises:
        UnsupportedStepError: If micro-batches call different numbers of losses.
    """
    numbers = sorted({len(of_batch) for of_batch in divisors})
    if len(numbers) > 1:
        raise UnsupportedStepError(
            f"micro-batches of one batch call different numbers of losses ({numbers}): their number must not depend on "
            "values"
        )
    totals = [None if None in counts else sum(counts) for counts in zip(*divisors, strict=True)]
    return [
        [
            1.0 if total is None or count is None or not total else count / total / weight
            for count, total in zip(of_batch, totals, strict=True)
        ]
        for of_batch, weight in zip(divisors, weights, strict=True)
    ]


def _mean_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments by name, if this is a loss that takes a mean over something that can be counted."""
    if func not in _CLASSIFICATION and func not in _ELEMENTWISE:
        return None
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    call = dict(bound.arguments)
    old_style = call.get("size_average") is not None or call.get("reduce") is not None
    return call if call["reduction"] == "mean" and not old_style else None


@lru_cache
def _signature(func: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(func)


def _divisor(func: Callable[..., Any], call: dict[str, Any]) -> float | None:
    inputs, target, weight = call["input"], call["target"], call.get("weight")
    if func in _ELEMENTWISE:
        if func in _WEIGHTED_MEAN and weight is not None:
            return None if find_absent((weight,)) else float(weight.expand_as(target).sum())
        return float(torch.broadcast_shapes(inputs.shape, target.shape).numel())
    if target.is_floating_point():  # probabilities of classes, which are dimension 1 (0 where there is no batch)
        return float(target.numel() // target.shape[1 if target.dim() > 1 else 0])
    if find_absent((target, weight)):
        return None
    labelled: Tensor = target != call["ignore_index"]
    if weight is None:
        return float(labelled.sum())
    return float(weight[target[labelled]].sum())
