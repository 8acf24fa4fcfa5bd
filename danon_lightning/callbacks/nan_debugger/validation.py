"""Validations whose metrics are not finite."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from danon_lightning.callbacks.nan_debugger.check import not_finite
from danon_lightning.callbacks.nan_debugger.display import Display


class ValidationWatch:
    """Warns of what is not finite at the end of a validation.

    Args:
        display: Where warnings go.
    """

    def __init__(self, display: Display) -> None:
        """See the class."""
        self._display = display
        self._bad: Tensor | None = None

    def clear(self) -> None:
        """Forget the batches so far."""
        self._bad = None

    def add(self, outputs: Any) -> None:
        """Look at the loss of a batch, on its device."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point():
            bad = ~torch.isfinite(loss.detach().reshape(()))
            self._bad = bad if self._bad is None else self._bad | bad

    def end(self, trainer: pl.Trainer) -> None:
        """Warn of the losses, and of the metrics that were logged."""
        bad = ["the loss of some batch"] if self._bad is not None and bool(self._bad) else []
        self.clear()
        metrics = {name: value for name, value in trainer.callback_metrics.items() if isinstance(value, Tensor)}
        bad += not_finite(metrics.items())
        if bad:
            step = trainer.global_step
            self._display.warn(f"the validation after step {step} has values that are not finite: {', '.join(bad[:5])}")
            self._display.event("validation_not_finite", step=step, values=bad[:100])
