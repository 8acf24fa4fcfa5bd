"""What is done about a bad step, and about the good ones after it."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from danon_lightning.callbacks.nan_debugger.buffers import BufferCopies
from danon_lightning.callbacks.nan_debugger.higher_precision import HigherPrecision
from danon_lightning.callbacks.nan_debugger.policies import Policy, Skips, drop_gradients
from danon_lightning.callbacks.nan_debugger.report import Report
from danon_lightning.callbacks.nan_debugger.step_reader import scaler_of, unscales_by_itself


class Response:
    """Applies the policy.

    Args:
        policy: See :class:`~danon_lightning.callbacks.NaNDebugger`.
        most_skips: More skipped steps in a row end the training.
        fallback_steps: How many finite steps a module runs in a higher precision.

    Attributes:
        skips: Counts skipped steps.
        buffers: As they were after the last finite step.
        raised: The modules that run in a higher precision.
    """

    def __init__(self, policy: Policy, most_skips: int, fallback_steps: int) -> None:
        """See the class."""
        self.policy = policy
        self.skips = Skips(most_skips)
        self.buffers = BufferCopies()
        self.raised = HigherPrecision(fallback_steps)

    def begin(self, module: pl.LightningModule) -> None:
        """Get ready for a ``fit``."""
        self.buffers.clear()
        self.raised.restore(module)
        self.buffers.take(module)

    def end(self) -> None:
        """Leave nothing behind in the module."""
        self.raised.release()
        self.buffers.clear()

    def after_healthy(self, module: pl.LightningModule) -> list[str]:
        """Note a finite step; names of the modules that run in their usual precision from now on."""
        self.skips.reset()
        self.buffers.take(module)
        return self.raised.count_down()

    def act(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer, report: Report | None
    ) -> tuple[str, bool]:
        """Apply the policy.

        Args:
            trainer: Whose step it is.
            module: The LightningModule.
            optimizer: Which is about to make a step.
            report: What was found, None if nobody has looked.

        Returns:
            What is done, in plain words; and whether training has to end.
        """
        if self.policy == "raise":
            return 'training stops (policy="raise")', True
        if self.policy == "report":
            text = 'the step is made as it is (policy="report"): weights are spoilt unless a gradient scaler helps'
            return text, False
        if self.skips.add():
            return f"training stops: {self.skips.in_a_row} steps in a row were not finite", True
        if scaler_of(trainer) is None or not unscales_by_itself(optimizer):  # that one needs gradients to skip
            drop_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
        restored = self.buffers.put_back(module)
        action = "all ranks skip this step, weights and optimizer stay as they are"
        action += f", and {len(restored)} buffers are as before" if restored else ""
        if self.policy == "fallback":
            action += f"; {self._fall_back(module, report)}"
        return action, False

    def _fall_back(self, module: pl.LightningModule, report: Report | None) -> str:
        origin = report.origin if report is not None else None
        if origin is None or not origin.module or origin.cause not in ("forward", "backward"):
            return "no module is known that a higher precision could help"
        return f"{origin.module} runs in a higher precision for {self.raised.add(module, origin.module)} steps"

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"skipped": [self.skips.in_a_row, self.skips.total], "higher_precision": self.raised.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self.skips.in_a_row, self.skips.total = state["skipped"]
        self.raised.load_state_dict(state["higher_precision"])
