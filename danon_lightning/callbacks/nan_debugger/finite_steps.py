"""What is odd in steps that are finite: in batches, gradients and weights."""

import math
from collections.abc import Sequence

import lightning.pytorch as pl

from danon_lightning.callbacks.health.finding import Finding
from danon_lightning.callbacks.nan_debugger.batches import StepBatches, bad_leaves
from danon_lightning.callbacks.nan_debugger.check import Named, Reading, not_finite
from danon_lightning.callbacks.nan_debugger.display import Display
from danon_lightning.callbacks.nan_debugger.history import History
from danon_lightning.callbacks.nan_debugger.recommendations import advice_for, circumstances
from danon_lightning.callbacks.nan_debugger.thresholds import NumericLimits, Watch, describe


class FiniteSteps:
    """Looks at finite steps, notes them in the history, and warns of what is odd.

    Args:
        limits: What counts as odd.
        history: Of all steps.
        display: Where warnings and events go.

    Attributes:
        weights_known: Whether all weights were finite when they were last looked at.
    """

    def __init__(self, limits: NumericLimits, history: History, display: Display) -> None:
        """See the class."""
        self.weights_known = False
        self._history, self._display = history, display
        self._watch = Watch(limits, history)
        self._advice: dict[str, str] = {}

    def look(self, trainer: pl.Trainer, reading: Reading, rate: float, batches: StepBatches) -> None:
        """Look at a step.

        Args:
            trainer: Whose step it is.
            reading: What was read in it.
            rate: The learning rate.
            batches: Of the step.
        """
        step = trainer.global_step
        if reading.weights:
            bad = [name for name, value in reading.weights.items() if not math.isfinite(value)]
            self._say_weights(step, bad, f"at step {step}, though gradients are")
        if any(math.isnan(norm) for norm in reading.inputs.values()):
            self._say_inputs(step, batches)
        odd = self._watch.look(step, reading)
        self._history.note(step, reading, rate)
        if not odd:
            return
        advice = advice_for(tuple(odd), circumstances(trainer, self._history))
        self._advice |= {kind: text for kind, text in advice.items() if kind not in self._advice}
        text = "; ".join(map(describe, odd.values()))
        self._display.warn(f"step {step}: {text}. Try: {'; '.join(advice.values())}.")
        for one in (one for those in odd.values() for one in those):
            facts = {"value": one.value, "usual": one.usual, "advice": advice[one.kind]}
            self._display.event(one.kind, own=False, step=step, parameter=one.parameter, **facts)

    def look_at_weights(self, step: int, weights: Sequence[Named]) -> None:
        """Look at all weights before the first step; slower than to read them with a step."""
        self._say_weights(step, not_finite(weights), "before the first step")

    def findings(self) -> list[Finding]:
        """One for each kind of what was odd."""
        return [
            Finding(
                "warning",
                "weights" if kind == "weight" else "gradients",
                describe(tuple(self._watch.worst[kind].values())),
                advice,
            )
            for kind, advice in self._advice.items()
        ]

    def _say_weights(self, step: int, bad: Sequence[str], when: str) -> None:
        self.weights_known = not bad
        if bad:
            self._display.warn(f"weights are not finite {when}: {', '.join(bad[:5])}")
            self._display.event("weights_not_finite", step=step, parameters=bad[:100])

    def _say_inputs(self, step: int, batches: StepBatches) -> None:
        for one in batches:
            found = [str(leaf) for leaf in bad_leaves(one.batch) if leaf.nan]
            if found:
                text = f"step {step}, batch {one.batch_idx}: {'; '.join(found)}; loss and gradients are finite so far"
                self._display.warn(text, own=True)
                self._display.event("input_not_finite", own=True, step=step, batch_idx=one.batch_idx, leaves=found)
