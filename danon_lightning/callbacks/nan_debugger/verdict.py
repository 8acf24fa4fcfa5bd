"""Whether a step is a fault: for all ranks, and with what a gradient scaler does by itself in mind."""

from dataclasses import dataclass

import lightning.pytorch as pl

from danon_lightning.callbacks.nan_debugger.agreement import any_rank, dropped_by_strategy
from danon_lightning.callbacks.nan_debugger.check import Reading
from danon_lightning.callbacks.nan_debugger.policies import ScalerWatch


@dataclass(frozen=True)
class Verdict:
    """What a step is.

    Attributes:
        is_fault: It is one, on all ranks.
        is_search: A gradient scaler leaves it out, which belongs to its search for a scale.
        is_fault_here: The loss of this rank is not finite, but other ranks cannot know, and no gradient is spoilt.
        why: Why it is a fault, if not for gradients that are not finite.
    """

    is_fault: bool = False
    is_search: bool = False
    is_fault_here: bool = False
    why: str = ""


def judge(
    trainer: pl.Trainer, reading: Reading, gradients_finite: bool, equal: bool, scale: float | None, watch: ScalerWatch
) -> Verdict:
    """Judge a step. Collective where gradients may differ between ranks, and where they are not finite.

    Args:
        trainer: Whose step it is.
        reading: What was read of it.
        gradients_finite: Whether those of this rank are.
        equal: Whether they are surely the same on all ranks.
        scale: Of the gradient scaler, None without one.
        watch: Knows what the scaler did before.
    """
    gradients_finite = gradients_finite and not dropped_by_strategy(trainer.strategy)
    losses_finite = reading.losses_finite
    if trainer.world_size > 1:
        if not equal:
            gradients_finite, losses_finite = _agreed(trainer, gradients_finite, losses_finite)
        elif not gradients_finite:
            losses_finite = not any_rank(trainer, not losses_finite)
        elif not losses_finite:
            return Verdict(is_fault_here=True)
    if scale is not None:
        why = watch.look(gradients_finite, losses_finite, scale)
        return Verdict(is_fault=bool(why), is_search=not gradients_finite and not why, why=why)
    if gradients_finite and not losses_finite:
        return Verdict(is_fault=True, why="the loss is not finite, though all gradients are")
    return Verdict(is_fault=not gradients_finite)


def _agreed(trainer: pl.Trainer, gradients_finite: bool, losses_finite: bool) -> tuple[bool, bool]:
    """Whether they are on all ranks: one number in healthy steps."""
    if not any_rank(trainer, not gradients_finite or not losses_finite):
        return True, True
    return not any_rank(trainer, not gradients_finite), not any_rank(trainer, not losses_finite)
