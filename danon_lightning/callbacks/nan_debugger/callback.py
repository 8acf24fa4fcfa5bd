"""The callback: when what is looked at, and what is done then."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from danon_lightning.callbacks.health.finding import Finding
from danon_lightning.callbacks.nan_debugger.agreement import ReplaysPipeline, has_equal_gradients
from danon_lightning.callbacks.nan_debugger.bad_steps import BadSteps
from danon_lightning.callbacks.nan_debugger.batches import StepBatches
from danon_lightning.callbacks.nan_debugger.check import not_finite
from danon_lightning.callbacks.nan_debugger.display import Display
from danon_lightning.callbacks.nan_debugger.finite_steps import FiniteSteps
from danon_lightning.callbacks.nan_debugger.history import History
from danon_lightning.callbacks.nan_debugger.investigation import BundleSettings, Symptoms
from danon_lightning.callbacks.nan_debugger.policies import Policy, ScalerWatch, check_policy
from danon_lightning.callbacks.nan_debugger.random_state import random_state
from danon_lightning.callbacks.nan_debugger.report import Report
from danon_lightning.callbacks.nan_debugger.response import Response
from danon_lightning.callbacks.nan_debugger.step_reader import ParameterNames, StepReader, learning_rate, weights_of
from danon_lightning.callbacks.nan_debugger.thresholds import NumericLimits
from danon_lightning.callbacks.nan_debugger.validation import ValidationWatch
from danon_lightning.callbacks.nan_debugger.verdict import judge


class NaNDebugger(pl.Callback):
    """Finds where a NaN or an infinity comes from: module, operation, line of code, sample, micro-batch, rank.

    A healthy step costs one fused norm over the gradients and one read from the device. When a step is not finite, each
    rank runs its batches again, with the same random numbers, and watches every operation; what the ranks find is put
    together into one report that says what has happened, where, and what to try. It works with any LightningModule and
    strategy. Where steps cannot be run again (manual optimization, sharded weights) it names the module, and says so.

    With a gradient scaler, infinite gradients belong to its search for a scale: there is no alarm unless the loss
    itself is not finite, or the search does not come to an end.

    Where gradients are the same on all ranks, none of this needs communication in healthy steps; elsewhere (pipeline
    stages, sharded weights) the ranks agree by one number a step. A loss that is not finite while all gradients are, on
    some rank of plain data parallelism, is reported by that rank, but the policy is not applied.

    Keys logged:
        ``nan_debugger/report`` (text) and ``nan_debugger/skipped_steps``, for steps that are not finite;
        ``nan_debugger/norms`` (figure), with them and at the end.

    Args:
        policy: What to do about a step that is not finite. "raise": stop with a :class:`NonFiniteError`. "skip": leave
            weights, optimizer and buffers as they are, and go on. "fallback": the same, and run the module to blame in
            a higher precision for a while. "report": report, and let the step be.
        max_consecutive_skips: More skipped steps in a row end the training.
        fallback_steps: How many finite steps a module runs in the higher precision; twice as many each time it fails
            again.
        max_reports: So many bad steps are looked into, later ones only counted.
        check_inputs_every_n_steps: Whether batches are searched for NaN also in healthy steps, and how often; 0 for
            never. Infinities, as masks hold them, are not mentioned.
        check_weights_every_n_steps: How often the range of the weights is looked at; 0 for never.
        check_validation: Whether to warn of metrics of a validation that are not finite.
        max_scaler_skips: With a gradient scaler: so many steps in a row that it leaves out are a fault. Its search
            begins at 65536, 16 halvings above 1.
        min_loss_scale: A scale below it is a fault, too.
        limits: Which gradients and weights are odd though finite; they are warned of.
        history_size: How many steps are kept for medians and for the plot.
        plot_path: PNG file for the norms of these steps, written when a step is not finite and at the end; None for
            none. Needs matplotlib.
        log_path: File for events, one line of JSON each; None for none. Other ranks than the first, where they have
            something to say of their own, append ``.rank<n>`` to its name.
        bundle_dir: Folder for replay bundles, which ``danon-replay`` runs again; None for none.
        include_data: Whether bundles hold the batch. Without it they can be run again only where it has no part.
        max_bundle_bytes: Larger bundles are not written.
        console: Where reports are printed; None for the standard output.

    Attributes:
        history: Norms of the last steps.

    Raises:
        ValueError: For an unknown policy, or a number that makes no sense.
    """

    def __init__(
        self,
        policy: Policy = "raise",
        *,
        max_consecutive_skips: int = 10,
        fallback_steps: int = 100,
        max_reports: int = 5,
        check_inputs_every_n_steps: int = 0,
        check_weights_every_n_steps: int = 0,
        check_validation: bool = True,
        max_scaler_skips: int = 16,
        min_loss_scale: float = 1.0,
        limits: NumericLimits | None = None,
        history_size: int = 200,
        plot_path: str | Path | None = None,
        log_path: str | Path | None = None,
        bundle_dir: str | Path | None = None,
        include_data: bool = False,
        max_bundle_bytes: int = 1 << 30,
        console: Console | None = None,
    ) -> None:
        """See the class."""
        check_policy(policy)
        for name, value, least in (
            ("max_consecutive_skips", max_consecutive_skips, 0),
            ("max_reports", max_reports, 1),
            ("check_inputs_every_n_steps", check_inputs_every_n_steps, 0),
            ("check_weights_every_n_steps", check_weights_every_n_steps, 0),
            ("history_size", history_size, 2),
            ("max_bundle_bytes", max_bundle_bytes, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.check_validation = check_validation
        self.history = History(history_size)
        self._reader = StepReader(check_inputs_every_n_steps, check_weights_every_n_steps)
        self._display = Display(log_path, plot_path, console or Console())
        self._finite = FiniteSteps(limits or NumericLimits(), self.history, self._display)
        self._validation = ValidationWatch(self._display)
        self._scaler_watch = ScalerWatch(max_scaler_skips, min_loss_scale)
        self._response = Response(policy, max_consecutive_skips, fallback_steps)
        bundles = BundleSettings(bundle_dir, include_data, max_bundle_bytes)
        self._bad = BadSteps(max_reports, bundles, self._response, self.history, self._display)
        self._batches = StepBatches()
        self._begin()

    @property
    def reports(self) -> list[Report]:
        """Of the bad steps that were looked into, oldest first."""
        return self._bad.reports

    @property
    def bad_steps(self) -> list[int]:
        """Numbers of the steps that were not finite."""
        return self._bad.steps

    def _begin(self) -> None:
        """Forget what belongs to one ``fit``."""
        self._names = ParameterNames()
        self._equal = True
        self._stepped = self._busy = False
        self._finite.weights_known = False
        self._validation.clear()
        self._batches.clear()

    # ---- the life of a fit

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get ready, and look at the weights once."""
        self._begin()
        self._equal = has_equal_gradients(trainer, pl_module)
        self._display.begin(trainer, self._equal)
        if isinstance(trainer.strategy, ReplaysPipeline):
            trainer.strategy.keep_batches()
        self._finite.look_at_weights(trainer.global_step, weights_of(pl_module))
        self._response.begin(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch, and the state of all generators."""
        if self._stepped:
            self._batches.clear()
            self._stepped = False
        self._batches.add(batch, batch_idx, random_state(trainer.strategy.root_device))

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss, on its device."""
        if self._busy:
            return
        if self._stepped:  # a second optimizer of a manual optimization, or a closure that is called again
            self._batches.clear_losses()
            self._stepped = False
        self._batches.add_loss(loss)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the step.

        Raises:
            NonFiniteError: If it is not finite, and that is the policy; or if too many have been skipped.
        """
        if self._busy:
            return
        self._stepped = self._busy = True
        try:
            self._check(trainer, pl_module, optimizer)
        finally:
            self._busy = False

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the loss of a validation batch, on its device."""
        if self.check_validation:
            self._validation.add(outputs)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of what is not finite."""
        if self.check_validation:
            self._validation.end(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the norms."""
        self._display.plot(trainer, self.history, self.bad_steps)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind in the module."""
        self._display.event("exception", own=True, step=trainer.global_step, type=type(exception).__name__)
        self._clean_up()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind in the module."""
        self._clean_up()

    def _clean_up(self) -> None:
        self._response.end()
        self._batches.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Counters, and which modules run in a higher precision."""
        return {
            "response": self._response.state_dict(),
            "scaler_skips": self._scaler_watch.in_a_row,
            "bad_steps": list(self.bad_steps),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self._response.load_state_dict(state_dict["response"])
        self._scaler_watch.in_a_row = state_dict["scaler_skips"]
        self._bad.steps = list(state_dict["bad_steps"])

    def findings(self) -> Sequence[Finding]:
        """What there is to say of the run."""
        found = [*self._bad.findings(), *self._finite.findings()]
        if not found and self.history.steps:
            found.append(Finding("note", "gradients", "all losses and gradients were finite"))
        return found

    # ---- a step

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        step = trainer.global_step
        gradients = self._names.gradients(module, optimizer)
        reading, scale = self._reader.read(trainer, module, optimizer, gradients, self._batches)
        bad: tuple[str, ...] = ()
        if not reading.gradients_finite:  # the norm of large but finite numbers may overflow
            bad = tuple(not_finite(gradients))
        verdict = judge(trainer, reading, not bad, self._equal, scale, self._scaler_watch)
        symptoms = Symptoms(reading, bad, scale or 1.0, self.history.last_norm(), self._finite.weights_known)
        if verdict.is_fault_here:
            self._bad.report_alone(trainer, module, self._batches, symptoms)
        if verdict.is_search:
            self._display.event("scaler_skip", step=step, scale=scale)
        if verdict.is_fault or verdict.is_search:
            self.history.note(step, reading, learning_rate(optimizer))
        else:
            self._finite.look(trainer, reading, learning_rate(optimizer), self._batches)
            for name in self._response.after_healthy(module):
                self._display.event("fallback_ended", step=step, module=name)
        if verdict.is_fault:
            self._bad.handle(trainer, module, optimizer, self._batches, symptoms, verdict.why)
