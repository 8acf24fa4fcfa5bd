"""How much a batch holds."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor


def tokens_in(batch: Any) -> float:
    """The number of elements of the first tensor of integers [batch, sequence] that a batch holds; NaN without one.

    Args:
        batch: Tensors, in containers of any kind.
    """
    for tensor in _tensors(batch):
        whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
        if whole and tensor.dim() == 2:
            return float(tensor.numel())
    return float("nan")


def samples_in(batch: Any) -> float:
    """The size of a batch as Lightning finds it, which is the first dimension of the first tensor.

    Args:
        batch: Anything.

    Raises:
        MisconfigurationException: If Lightning does not find it.
    """
    return float(extract_batch_size(batch))


class Count:
    """Adds up what batches hold. What cannot be counted makes the sum unknown, and is not tried again.

    Args:
        of: The number in a batch.
    """

    def __init__(self, of: Callable[[Any], float]) -> None:
        """See the class."""
        self._of = of
        self.total = 0.0
        self.error: Exception | None = None

    def add(self, batch: Any) -> None:
        """Count a batch. Never raises: a function of the user's may be wrong on some ranks and not on others.

        Args:
            batch: Which one.
        """
        if self.error is not None:
            return
        try:
            self.total += float(self._of(batch))
        except Exception as error:
            self.error = error

    def take(self) -> float:
        """The sum, NaN if it is not known; then begin anew."""
        total, self.total = self.total, 0.0
        return float("nan") if self.error is not None else total


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for one in fields(batch):
            yield from _tensors(getattr(batch, one.name))
