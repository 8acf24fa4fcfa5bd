"""Runs a micro-batch again, with the same random numbers and without traces, under the eyes of a tracer."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl

from danon_lightning.callbacks.nan_debugger.origin import Origin
from danon_lightning.callbacks.nan_debugger.random_state import RandomState


@dataclass(frozen=True)
class Replay:
    """What a replay has shown.

    Attributes:
        origin: Where the first bad value came from; None if all was finite, or if only the loss scale is to blame.
        loss: Not scaled; None if the step returned none or broke off.
        finite: Whether loss and gradients were all finite: then the fault was not reproduced.
        gradient_norms: By parameter, not scaled, in the order of ``named_parameters``; without those that got no
            gradient. Empty if the loss was not finite, for then there is no backward pass.
        bad_parameters: Those with a bad gradient, in the order in which backward has come to them.
        scale_only: Gradients are finite with a loss scale of one: the scaler will lower its scale and all is well.
        note: Why there is no exact origin, where there is none.
        seconds: How long it took.
    """

    origin: Origin | None
    loss: float | None
    finite: bool
    gradient_norms: dict[str, float] = field(default_factory=dict)
    bad_parameters: tuple[str, ...] = ()
    scale_only: bool = False
    note: str = ""
    seconds: float = 0.0


def replay_step(
    module: pl.LightningModule,
    batch: Any,
    batch_idx: int,
    *,
    rng: RandomState | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    loss_scale: float = 1.0,
    stage: int = 0,
    micro_batch: int = 0,
) -> Replay:
    """Run ``training_step`` and its backward pass again and tell where the first bad value came from.

    Nothing remains of it: ``.grad``, parameters, buffers, attributes of modules, generators, logs and the batch are
    afterwards what they were. No collective operation is called (unless the module itself does so in forward), and no
    hook of DistributedDataParallel runs.

    Args:
        module: The LightningModule itself, not a wrapper; on its device, in its mode.
        batch: As ``training_step`` got it, on the device.
        batch_idx: Its index.
        rng: The generators at the beginning of the step, from ``random_state(module.device)``; None takes what they
            are now.
        context: Makes the context of precision, ``trainer.precision_plugin.train_step_context`` (called, maybe twice).
        loss_scale: What the loss is multiplied with before backward: the scale of a gradient scaler, divided by the
            number of accumulated batches.
        stage: Written into the origin.
        micro_batch: Written into the origin.

    Returns:
        What happened. Errors of the step do not come out of here; they are in the note.
    """
    raise NotImplementedError
