"""Runs a micro-batch again, with the same random numbers and without traces, under the eyes of a tracer."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from danon_lightning.callbacks.nan_debugger.origin import Origin
from danon_lightning.callbacks.nan_debugger.preservation import KeptValues, preserved, silent
from danon_lightning.callbacks.nan_debugger.random_state import RandomState, random_state, restoring
from danon_lightning.callbacks.nan_debugger.stand_ins import intercepted, without_nested_backward
from danon_lightning.callbacks.nan_debugger.tracer import OriginTracer
from danon_lightning.callbacks.nan_debugger.values import badness


@dataclass(frozen=True)
class Replay:
    """What a replay has shown.

    Attributes:
        origin: Where the first bad value came from; None if all was finite, or if only the loss scale is to blame.
        loss: Not scaled; None if the step returned none or broke off.
        finite: Whether loss and gradients were all finite, as far as it has come.
        complete: Whether the step ran to its end, or to the first bad value. Complete and finite means that the fault
            was not reproduced.
        gradient_norms: By parameter, not scaled, in the order of ``named_parameters``; without those that got no
            gradient. Empty if the loss was not finite, for then there is no backward pass.
        gradient_largest: The largest absolute value of each of these gradients.
        bad_parameters: Those with a bad gradient, in the order in which backward has come to them.
        scale_only: Gradients are finite with a loss scale of one: the scaler will lower its scale and all is well.
        scaled_origin: In that case, what has overflowed with the loss scale.
        note: Why there is no exact origin, where there is none.
        seconds: How long it took.
    """

    origin: Origin | None
    loss: float | None
    finite: bool
    complete: bool = True
    gradient_norms: dict[str, float] = field(default_factory=dict)
    gradient_largest: dict[str, float] = field(default_factory=dict)
    bad_parameters: tuple[str, ...] = ()
    scale_only: bool = False
    scaled_origin: Origin | None = None
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
    start = time.perf_counter()
    rng = rng or random_state(module.device)  # a second try must draw the same
    run = _Run(module, batch, batch_idx, rng, context, stage, micro_batch)
    found = run.replay(loss_scale)
    overflow = found.origin is not None and found.origin.cause == "backward"
    if loss_scale != 1 and overflow and found.loss is not None and found.bad_parameters:
        unscaled = run.replay(1.0)
        if unscaled.finite and unscaled.complete:
            note = f"gradients overflow with a loss scale of {loss_scale:g} and are finite without"
            found = replace(
                unscaled,
                finite=False,
                bad_parameters=found.bad_parameters,
                scale_only=True,
                scaled_origin=found.origin,
                note=note,
            )
    return replace(found, seconds=time.perf_counter() - start)


class _Found(BaseException):
    """Ends a replay as soon as something bad was seen; no Exception, so that no step catches it."""


@dataclass
class _Seen:
    """What one run has seen so far."""

    loss: float | None = None
    finite: bool = True
    gradients: dict[str, Tensor] = field(default_factory=dict)
    bad: tuple[str, ...] = ()
    complete: bool = True
    skipped_steps: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class _Run:
    module: pl.LightningModule
    batch: Any
    batch_idx: int
    rng: RandomState
    context: Callable[[], AbstractContextManager[Any]]
    stage: int
    micro_batch: int

    def replay(self, loss_scale: float) -> Replay:
        """Run the step once."""
        module, seen = self.module, _Seen()
        tracer = OriginTracer(module, self.batch, stage=self.stage, micro_batch=self.micro_batch)
        kept = KeptValues(module, self.batch)
        tracer.before_writes = kept.before_writes

        def backward(loss: Tensor) -> None:
            self._backward(loss, loss_scale, tracer, seen)

        def on_step() -> None:
            seen.skipped_steps += 1

        with ExitStack() as stack:
            stack.enter_context(restoring(self.rng, module.device))
            stack.enter_context(preserved(module))
            stack.callback(kept.restore)
            stack.enter_context(silent(module))
            stack.enter_context(intercepted(module, backward, on_step))
            stack.enter_context(without_nested_backward())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            compiled = stack.enter_context(_eager(module))
            try:
                stack.enter_context(tracer)
                with tracer.measuring(self.stage, "forward", self.micro_batch), self.context():
                    output = module.training_step(*self._arguments())
                loss = output.get("loss") if isinstance(output, dict) else output
                if module.automatic_optimization and isinstance(loss, Tensor):
                    backward(loss)
            except _Found:
                pass
            except Exception as error:
                seen.complete = False
                seen.notes.append(f"the replay broke off with {type(error).__name__}: {error}")
            return self._told(tracer, seen, compiled)

    def _arguments(self) -> tuple[Any, ...]:
        wants_index = is_param_in_hook_signature(self.module.training_step, "batch_idx", min_args=2)
        return (self.batch, self.batch_idx) if wants_index else (self.batch,)

    def _backward(self, loss: Tensor, loss_scale: float, tracer: OriginTracer, seen: _Seen) -> None:
        """Look at a loss and compute its gradients, apart from ``.grad`` and the hooks that hang on that.

        Raises:
            _Found: If anything is not finite.
        """
        seen.loss = float(loss.detach().sum())
        if badness(loss):
            seen.finite = False
            tracer.resolve(loss)
            raise _Found
        if not loss.requires_grad:
            seen.notes.append("the loss depends on no parameter that requires a gradient")
            return
        named = [(name, one) for name, one in self.module.named_parameters() if one.requires_grad]
        order: list[str] = []
        handles = [one.register_hook(lambda _, name=name: order.append(name)) for name, one in named]
        try:
            with tracer.measuring(self.stage, "backward", self.micro_batch):
                scaled = loss * loss_scale if loss_scale != 1 else loss
                retain = not self.module.automatic_optimization
                found = torch.autograd.grad(
                    scaled.sum(), [one for _, one in named], allow_unused=True, retain_graph=retain
                )
        finally:
            for handle in handles:
                handle.remove()
        made = {name: one for (name, _), one in zip(named, found, strict=True) if one is not None}
        made = {name: made[name] for name in [*order, *made] if name in made}
        tracer.resolve(loss, made)
        seen.bad = tuple(name for name, one in made.items() if badness(one))
        parameters = dict(named)
        for name, one in made.items():
            one = one / loss_scale if loss_scale != 1 else one
            seen.gradients[name] = seen.gradients[name] + one if name in seen.gradients else one
            if not self.module.automatic_optimization:
                parameters[name].grad = seen.gradients[name]  # a step by hand may look at it
        if seen.bad:
            seen.finite = False
            raise _Found

    def _told(self, tracer: OriginTracer, seen: _Seen, compiled: bool) -> Replay:
        origin = None if seen.finite and seen.complete else tracer.origin
        notes = list(seen.notes)
        if seen.skipped_steps:
            notes.append("optimization is manual: earlier updates of the same step were not repeated")
        if tracer.unseen and (origin is not None or not seen.finite):
            notes.append("not all results could be looked at: " + ", ".join(tracer.unseen))
        if compiled:
            notes.append("compiled code was replayed as it was written, without the compiler")
        if origin is not None and notes:
            exact = origin.exact and seen.complete and not seen.skipped_steps
            origin = replace(origin, exact=exact, note="; ".join(filter(None, [origin.note, *notes])))
        names = [name for name, _ in self.module.named_parameters() if name in seen.gradients]
        norms = torch._foreach_norm([seen.gradients[name].detach() for name in names]) if names else []
        values = torch.stack([one.float() for one in norms]).tolist() if names else []
        largest = torch.stack([_largest(seen.gradients[name]) for name in names]).tolist() if names else []
        return Replay(
            origin=origin,
            loss=seen.loss,
            finite=seen.finite,
            complete=seen.complete,
            gradient_norms=dict(zip(names, values, strict=True)),
            gradient_largest=dict(zip(names, largest, strict=True)),
            bad_parameters=seen.bad,
            note="; ".join(notes),
        )


def _largest(gradient: Tensor) -> Tensor:
    gradient = gradient.detach()
    values = gradient._values() if gradient.layout is torch.sparse_coo else gradient
    return values.abs().max().float() if values.numel() else torch.zeros((), device=gradient.device)


@contextmanager
def _eager(module: pl.LightningModule) -> Iterator[bool]:
    """Run compiled code as it was written; tells whether there is any."""
    compiled = any(
        type(one).__name__ == "OptimizedModule" or getattr(one, "_compiled_call_impl", None) is not None
        for one in module.modules()
    )
    # Importing the compiler takes seconds; where nobody has, nothing is compiled.
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        yield compiled
