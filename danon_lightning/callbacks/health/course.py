"""How a run went, as far as a callback can tell without others: the loss, the time, the learning rate.

Reference:
    Mann & Whitney 1947, "On a Test of Whether one of Two Random Variables is Stochastically Larger than the Other".
"""

import math
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from danon_lightning.callbacks.health.finding import Finding

__all__ = ["Course"]

# Losses of so many batches are compared between begin and end of a run.
_LOSSES = 32
# Batches at the start that are slower than all others: memory is allocated, kernels are chosen.
_WARM_UP = 3
# A fall that is less clear than so many standard deviations of the rank-sum test may be chance.
_CERTAIN = 3.0
_MUCH_VALIDATION = 0.3
_LONG_WITHOUT_RATE = 0.1


class Course:
    """Counts and times what a Trainer does. Losses stay on their device until the end.

    Attributes:
        steps: Training batches so far.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.steps = 0
        self._first: list[Tensor] = []
        self._last: list[Tensor] = []
        self._not_finite: Tensor | None = None
        self._began = time.perf_counter()
        self._validation = 0.0
        # When a batch last ended, and the seconds of validation until then; the same of the slow first batches.
        self._ended = self._warm = (self._began, 0.0)
        self._validating: float | None = None
        self._rate_was_zero = 0
        self._rate_zero_now = 0

    def finish_batch(self, trainer: pl.Trainer, outputs: Any) -> None:
        """A training batch has ended, with what ``training_step`` has returned."""
        self.steps += 1
        self._ended = (time.perf_counter(), self._validation)
        if self.steps == _WARM_UP:
            self._warm = self._ended
        loss = _loss_of(outputs)
        if loss is not None:
            # Lightning has divided it.
            loss = loss * (trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1)
            if len(self._first) < _LOSSES:
                self._first.append(loss)
            self._last = [*self._last[-(_LOSSES - 1) :], loss]
            count = (~loss.isfinite()).long()
            self._not_finite = count if self._not_finite is None else self._not_finite + count
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if rates and all(not isinstance(rate, Tensor) and rate == 0 for rate in rates):
            self._rate_zero_now += 1
            self._rate_was_zero = max(self._rate_was_zero, self._rate_zero_now)
        else:
            self._rate_zero_now = 0

    def start_validation(self) -> None:
        """Validation begins."""
        self._validating = time.perf_counter()

    def finish_validation(self) -> None:
        """Validation has ended."""
        if self._validating is not None:
            self._validation += time.perf_counter() - self._validating
            self._validating = None

    def findings(self) -> list[Finding]:
        """What can be said of the whole."""
        found = [*self._of_loss(), *self._of_rate(), *self._of_validation()]
        text = f"{self.steps:,} batches"
        if self.steps > _WARM_UP:
            seconds, validation = (end - begin for end, begin in zip(self._ended, self._warm, strict=True))
            text += f", {_duration((seconds - validation) / (self.steps - _WARM_UP))} each without validation"
        return [*found, Finding("note", "time", text)]

    def _of_loss(self) -> list[Finding]:
        if self._not_finite is None:
            return []
        broken = int(self._not_finite)
        if broken:
            lost = not bool(self._last[-1].isfinite())
            return [
                Finding(
                    "error" if lost else "warning",
                    "loss",
                    f"it was NaN or infinite in {broken:,} of {self.steps:,} batches"
                    + (", and at the end" if lost else ""),
                    "NaNDebugger names the batch, the module and the operation",
                )
            ]
        if len(self._first) < _LOSSES or self.steps < 2 * _LOSSES:
            return []
        first, last = (torch.stack(part).double().cpu() for part in (self._first, self._last))
        # How often one of the last is below one of the first; outliers, and how fast it fell, do not matter.
        order = (first[:, None] - last).sign().sum() / 2
        certainty = float(order) / math.sqrt(_LOSSES**2 * (2 * _LOSSES + 1) / 12)
        text = f"mean of the first {_LOSSES} batches {first.mean():.4g}, of the last {last.mean():.4g}"
        if certainty > _CERTAIN:
            return [Finding("note", "loss", f"it fell: {text}")]
        if certainty < -_CERTAIN:
            return [Finding("warning", "loss", f"it rose: {text}", "lower the learning rate, or warm it up longer")]
        advice = "try a higher learning rate; look at what the gradients do (GradientMonitor); let it run longer"
        return [Finding("warning", "loss", f"it did not fall: {text}", advice)]

    def _of_rate(self) -> list[Finding]:
        longest = self._rate_was_zero
        if longest <= max(1, _LONG_WITHOUT_RATE * self.steps):
            return []
        text = f"it was zero for {longest:,} batches in a row, of {self.steps:,}"
        return [Finding("warning", "learning rate", text, "let its schedule end when training does")]

    def _of_validation(self) -> list[Finding]:
        share = self._validation / max(time.perf_counter() - self._began, 1e-9)
        if not self._validation:
            return []
        text = f"{share:.0%} of the time"
        if share < _MUCH_VALIDATION:
            return [Finding("note", "validation", text)]
        advice = "validate less often (val_check_interval), or on fewer batches (limit_val_batches)"
        return [Finding("warning", "validation", text, advice)]


def _loss_of(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(loss, Tensor) or type(loss) is not Tensor or loss.numel() != 1 or loss.is_meta:
        return None
    return loss.detach().reshape(())


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return f"{seconds} s"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
