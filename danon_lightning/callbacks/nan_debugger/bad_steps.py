"""Steps that are not finite: what is found out, done and said about them."""

import lightning.pytorch as pl
from torch.optim import Optimizer

from danon_lightning.callbacks.health.finding import Finding
from danon_lightning.callbacks.nan_debugger.batches import StepBatches
from danon_lightning.callbacks.nan_debugger.display import Display
from danon_lightning.callbacks.nan_debugger.history import History
from danon_lightning.callbacks.nan_debugger.investigation import BundleSettings, Symptoms
from danon_lightning.callbacks.nan_debugger.joint import find_out, find_out_alone
from danon_lightning.callbacks.nan_debugger.policies import NonFiniteError
from danon_lightning.callbacks.nan_debugger.recommendations import circumstances, recommend
from danon_lightning.callbacks.nan_debugger.report import Report, with_outcome
from danon_lightning.callbacks.nan_debugger.response import Response

# The numbers of so many bad steps are remembered.
_REMEMBERED = 1000


class BadSteps:
    """Handles steps that are not finite.

    Args:
        max_reports: So many are looked into, later ones only counted.
        bundles: Whether and where bundles are written.
        response: Applies the policy.
        history: Of all steps.
        display: Where reports go.

    Attributes:
        reports: Of those that were looked into, oldest first.
        steps: Their numbers.
    """

    def __init__(
        self, max_reports: int, bundles: BundleSettings, response: Response, history: History, display: Display
    ) -> None:
        """See the class."""
        self.reports: list[Report] = []
        self.steps: list[int] = []
        self.max_reports = max_reports
        self._bundles, self._response, self._history, self._display = bundles, response, history, display

    def handle(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        optimizer: Optimizer,
        batches: StepBatches,
        symptoms: Symptoms,
        why: str,
    ) -> None:
        """Find out, act, and say so. All ranks come here together, and decide alike.

        Raises:
            NonFiniteError: If that is the policy, or if too many steps have been skipped.
        """
        step = trainer.global_step
        self.steps = [*self.steps, step][-_REMEMBERED:]
        report = None
        # Counts of reports may differ between ranks, those of bad steps do not.
        if self._response.policy == "raise" or len(self.steps) <= self.max_reports:
            with self._response.buffers.as_before(module):
                report = find_out(trainer, module, batches, symptoms, why, self._bundles)
        action, ends = self._response.act(trainer, module, optimizer, report)
        if report is None:
            self._display.event("not_finite", step=step, action=action)
        else:
            report = with_outcome(report, action, recommend(report, circumstances(trainer, self._history)))
            self.reports.append(report)
            self._display.report(trainer, report, self._response.skips.total, ends=ends)
        self._display.plot(trainer, self._history, self.steps)
        if ends and report is not None:
            raise NonFiniteError(report.text(), report.cause)
        if ends:
            known = f"\nFound out before:\n{self.reports[-1].text()}" if self.reports else ""
            raise NonFiniteError(f"Step {step} is not finite.\nNow: {action}{known}")

    def report_alone(
        self, trainer: pl.Trainer, module: pl.LightningModule, batches: StepBatches, symptoms: Symptoms
    ) -> None:
        """The loss of this rank is not finite, but no gradient is spoilt: no other rank needs to know."""
        if len(self.reports) >= self.max_reports:
            return
        with self._response.buffers.as_before(module):
            report = find_out_alone(trainer, module, batches, symptoms)
        advice = recommend(report, circumstances(trainer, self._history))
        report = with_outcome(report, "training goes on: weights are not affected", advice)
        self.reports.append(report)
        self._display.warn(report.text(), own=True)
        self._display.event("not_finite", own=True, **report.to_dict())

    def findings(self) -> list[Finding]:
        """One for each report, and one for all other bad steps."""
        found = [Finding("error", f"step {one.step}", one.headline(), " ".join(one.advice[:2])) for one in self.reports]
        more = len(self.steps) - len(self.reports)
        if more > 0:
            text = f"{more} more steps were not finite; {self._response.skips.total} were skipped"
            found.append(Finding("error", "steps that are not finite", text))
        return found
