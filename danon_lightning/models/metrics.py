"""Metrics of language models."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class BitsPerByte(Metric):
    """Mean cross-entropy of a byte-level model in bits a byte: the size, in bits, to which it could compress each one.

    A model that knows nothing needs 8 bits a byte. Sums are kept in float64, and over ranks they are added up, so the
    value is that of the whole validation set however it was shared out.

    Reference:
        Shannon, "Prediction and Entropy of Printed English", Bell System Technical Journal 30, 1951.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    nats: Tensor
    count: Tensor

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__()
        self.add_state("nats", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, mean_loss: Tensor, num_bytes: int) -> None:
        """Add one batch.

        Args:
            mean_loss: Mean cross-entropy of the batch in nats, a scalar.
            num_bytes: Number of bytes that it is the mean of.
        """
        self.nats += mean_loss.detach().double() * num_bytes
        self.count += num_bytes

    def compute(self) -> Tensor:
        """Bits a byte over everything seen, a scalar."""
        return (self.nats / self.count / math.log(2)).float()
