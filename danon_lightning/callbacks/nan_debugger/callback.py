"""The callback: when what is looked at, and what is done then."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from danon_lightning.callbacks.health.finding import Finding
from danon_lightning.callbacks.nan_debugger.agreement import ReplaysPipeline, gather, has_equal_gradients
from danon_lightning.callbacks.nan_debugger.batches import StepBatches, bad_leaves
from danon_lightning.callbacks.nan_debugger.check import Reading, not_finite
from danon_lightning.callbacks.nan_debugger.display import Display
from danon_lightning.callbacks.nan_debugger.history import History
from danon_lightning.callbacks.nan_debugger.investigation import BundleSettings, Symptoms, bundle_of, investigate
from danon_lightning.callbacks.nan_debugger.policies import NonFiniteError, Policy, ScalerWatch, check_policy
from danon_lightning.callbacks.nan_debugger.random_state import random_state
from danon_lightning.callbacks.nan_debugger.recommendations import Circumstances, advice_for, recommend
from danon_lightning.callbacks.nan_debugger.report import RankFinding, Report, conclude, with_bundle, with_outcome
from danon_lightning.callbacks.nan_debugger.response import Response
from danon_lightning.callbacks.nan_debugger.step_reader import ParameterNames, StepReader, learning_rate, weights_of
from danon_lightning.callbacks.nan_debugger.thresholds import NumericLimits, Watch, describe
from danon_lightning.callbacks.nan_debugger.verdict import judge

# The numbers of so many bad steps are remembered.
_REMEMBERED = 1000


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
        reports: Of the bad steps that were looked into, oldest first.
        bad_steps: Numbers of the steps that were not finite.
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
        self.max_reports, self.check_validation = max_reports, check_validation
        self._bundles = BundleSettings(bundle_dir, include_data, max_bundle_bytes)
        self.reports: list[Report] = []
        self.bad_steps: list[int] = []
        self.history = History(history_size)
        self._reader = StepReader(check_inputs_every_n_steps, check_weights_every_n_steps)
        self._display = Display(log_path, plot_path, console or Console())
        self._watch = Watch(limits or NumericLimits(), self.history)
        self._scaler_watch = ScalerWatch(max_scaler_skips, min_loss_scale)
        self._response = Response(policy, max_consecutive_skips, fallback_steps)
        self._batches = StepBatches()
        self._odd: dict[str, str] = {}
        self._begin()

    def _begin(self) -> None:
        """Forget what belongs to one ``fit``."""
        self._names = ParameterNames()
        self._equal = True
        self._stepped = self._busy = self._weights_known = False
        self._bad_losses: list[Tensor] = []
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
        bad = not_finite(weights_of(pl_module))
        self._weights_known = not bad
        if bad:
            self._say_weights(trainer.global_step, bad, "before the first step")
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
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self.check_validation and isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point():
            bad = ~torch.isfinite(loss.detach().reshape(()))
            self._bad_losses = [self._bad_losses[0] | bad if self._bad_losses else bad]

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of what is not finite."""
        if not self.check_validation:
            return
        bad = ["the loss of some batch"] if self._bad_losses and bool(self._bad_losses[0]) else []
        self._bad_losses = []
        metrics = {name: value for name, value in trainer.callback_metrics.items() if isinstance(value, Tensor)}
        bad += not_finite(metrics.items())
        if bad:
            step = trainer.global_step
            self._display.warn(f"the validation after step {step} has values that are not finite: {', '.join(bad[:5])}")
            self._display.event("validation_not_finite", step=step, values=bad[:100])

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
        self.bad_steps = list(state_dict["bad_steps"])

    def findings(self) -> Sequence[Finding]:
        """What there is to say of the run."""
        found = [Finding("error", f"step {one.step}", one.headline(), " ".join(one.advice[:2])) for one in self.reports]
        more = len(self.bad_steps) - len(self.reports)
        if more > 0:
            text = f"{more} more steps were not finite; {self._response.skips.total} were skipped"
            found.append(Finding("error", "steps that are not finite", text))
        for kind, advice in self._odd.items():
            text = describe(tuple(self._watch.worst[kind].values()))
            found.append(Finding("warning", "weights" if kind == "weight" else "gradients", text, advice))
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
        symptoms = Symptoms(reading, bad, scale or 1.0, self._last_norm(), self._weights_known)
        if verdict.is_fault_here:
            self._report_alone(trainer, module, symptoms)
        if verdict.is_search:
            self._display.event("scaler_skip", step=step, scale=scale)
        if verdict.is_fault or verdict.is_search:
            self._note_history(step, reading, optimizer)
        else:
            self._note_healthy(trainer, module, optimizer, reading, step)
        if verdict.is_fault:
            self._handle(trainer, module, optimizer, symptoms, verdict.why)

    def _note_history(self, step: int, reading: Reading, optimizer: Optimizer) -> None:
        loss = sum(reading.losses) if reading.losses else math.nan  # each is its share of their mean
        rate = learning_rate(optimizer)
        self.history.add(step, reading.names, reading.norms, reading.total_norm, loss, rate)

    def _note_healthy(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer, reading: Reading, step: int
    ) -> None:
        if reading.weights:
            bad = [name for name, value in reading.weights.items() if not math.isfinite(value)]
            self._weights_known = not bad
            if bad:
                self._say_weights(step, bad, f"at step {step}, though gradients are")
        if any(math.isnan(norm) for norm in reading.inputs.values()):
            self._report_inputs(step)
        odd = self._watch.look(step, reading)
        self._note_history(step, reading, optimizer)
        if odd:
            advice = advice_for(tuple(odd), self._circumstances(trainer))
            self._odd |= {kind: advice[kind] for kind in odd if kind not in self._odd}
            text = "; ".join(map(describe, odd.values()))
            self._display.warn(f"step {step}: {text}. Try: {'; '.join(advice.values())}.")
            for one in (one for those in odd.values() for one in those):
                facts = {"value": one.value, "usual": one.usual, "advice": advice[one.kind]}
                self._display.event(one.kind, own=False, step=step, parameter=one.parameter, **facts)
        for name in self._response.after_healthy(module):
            self._display.event("fallback_ended", step=step, module=name)

    def _report_inputs(self, step: int) -> None:
        for one in self._batches:
            found = [str(leaf) for leaf in bad_leaves(one.batch) if leaf.nan]
            if found:
                text = f"step {step}, batch {one.batch_idx}: {'; '.join(found)}; loss and gradients are finite so far"
                self._display.warn(text, own=True)
                self._display.event("input_not_finite", own=True, step=step, batch_idx=one.batch_idx, leaves=found)

    def _say_weights(self, step: int, names: Sequence[str], when: str) -> None:
        self._display.warn(f"weights are not finite {when}: {', '.join(names[:5])}")
        self._display.event("weights_not_finite", step=step, parameters=names[:100])

    # ---- a bad step

    def _report_alone(self, trainer: pl.Trainer, module: pl.LightningModule, symptoms: Symptoms) -> None:
        """The loss of this rank is not finite, but no gradient is spoilt: no other rank needs to know."""
        if len(self.reports) >= self.max_reports:
            return
        with self._response.buffers.as_before(module):
            finding, _ = investigate(trainer, module, self._batches, symptoms)
        why = f"the loss of rank {trainer.global_rank} is not finite, though all gradients are"
        report = conclude(trainer.global_step, trainer.current_epoch, [finding], why)
        advice = recommend(report, self._circumstances(trainer))
        report = with_outcome(report, "training goes on: weights are not affected", advice)
        self.reports.append(report)
        self._display.warn(report.text(), own=True)
        self._display.event("not_finite", own=True, **report.to_dict())

    def _handle(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer, symptoms: Symptoms, why: str
    ) -> None:
        """Find out, act, and say so. All ranks come here together, and decide alike."""
        step = trainer.global_step
        self.bad_steps = [*self.bad_steps, step][-_REMEMBERED:]
        report = None
        # Counts of reports may differ between ranks, those of bad steps do not.
        if self._response.policy == "raise" or len(self.bad_steps) <= self.max_reports:
            report = self._find_out(trainer, module, symptoms, why)
        action, ends = self._response.act(trainer, module, optimizer, report)
        if report is None:
            self._display.event("not_finite", step=step, action=action)
        else:
            report = with_outcome(report, action, recommend(report, self._circumstances(trainer)))
            self.reports.append(report)
            self._display.report(trainer, report, self._response.skips.total, ends=ends)
        self._display.plot(trainer, self.history, self.bad_steps)
        if ends and report is not None:
            raise NonFiniteError(report.text(), report.cause)
        if ends:
            known = f"\nFound out before:\n{self.reports[-1].text()}" if self.reports else ""
            raise NonFiniteError(f"Step {step} is not finite.\nNow: {action}{known}")

    def _find_out(self, trainer: pl.Trainer, module: pl.LightningModule, symptoms: Symptoms, why: str) -> Report:
        """What all ranks have found. Collective."""
        device = trainer.strategy.root_device
        with self._response.buffers.as_before(module):
            finding, culprit = investigate(trainer, module, self._batches, symptoms)
            findings = [RankFinding.from_dict(one) for one in gather(finding.to_dict(), device)]
            report = conclude(trainer.global_step, trainer.current_epoch, findings, why)
            if self._bundles.folder is None or not report.finding.reproduced:
                return report
            written = {"bundle": "", "note": ""}
            if report.finding.rank == trainer.global_rank:
                written = bundle_of(trainer, module, culprit, report.origin, symptoms.scale, self._bundles)
        return with_bundle(report, **gather(written, device)[report.finding.rank])

    # ---- what else is known

    def _last_norm(self) -> float:
        return next((norm for norm in reversed(self.history.total_norms) if math.isfinite(norm)), math.nan)

    def _circumstances(self, trainer: pl.Trainer) -> Circumstances:
        norms = [norm for norm in self.history.total_norms if math.isfinite(norm)]
        usual = sorted(norms)[len(norms) // 2] if norms else 0.0
        rates = self.history.learning_rates
        return Circumstances(
            precision=str(trainer.precision),
            clips=bool(trainer.gradient_clip_val),
            learning_rate=rates[-1] if rates else 0.0,
            grew=norms[-1] / usual if len(norms) >= 5 and usual > 0 else 1.0,
        )
