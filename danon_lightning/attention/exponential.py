"""Exponentials of logits of which many are masked or negligible, at the speed of the others."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["exp_or_zero_"]

# Its exponential is about the smallest that float32 holds in full precision.
LEAST_EXPONENT = -87.0
# A little more than that.
NEGLIGIBLE = 2e-38


def exp_or_zero_(x: Tensor) -> Tensor:
    """Replace ``x`` by its exponential, and by exactly zero where that is below 2e-38.

    The vector libraries of CPUs handle results that underflow one by one, which takes fifty times as long; among
    masked logits they are all there is. Beside a sum of weights of about one, what is dropped is below the precision of
    float64 too. Where autograd looks on, or on an accelerator, this is the plain exponential.

    Args:
        x: float32 or float64; overwritten.
    """
    if x.requires_grad or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.exp_()
    return F.threshold(x.clamp_(min=LEAST_EXPONENT).exp_(), NEGLIGIBLE, 0.0, inplace=True)
