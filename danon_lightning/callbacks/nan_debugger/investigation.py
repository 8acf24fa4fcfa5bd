"""What one rank does to find out what was wrong with a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from danon_lightning.callbacks.nan_debugger.agreement import (
    ReplaysPipeline,
    exchange_overflows_at,
    pipeline_rank,
    pipeline_stages,
)
from danon_lightning.callbacks.nan_debugger.batches import MicroBatch, StepBatches, bad_leaves
from danon_lightning.callbacks.nan_debugger.bundle import Step, write_bundle
from danon_lightning.callbacks.nan_debugger.check import Reading, not_finite
from danon_lightning.callbacks.nan_debugger.guesses import blame_of_optimizer, from_gradients
from danon_lightning.callbacks.nan_debugger.origin import Origin
from danon_lightning.callbacks.nan_debugger.replay import replay_step
from danon_lightning.callbacks.nan_debugger.report import RankFinding
from danon_lightning.callbacks.nan_debugger.tracer import OriginTracer

# The gradients of so many parameters are compared between ranks.
_COMPARED = 1000


@dataclass(frozen=True)
class Symptoms:
    """What is known of a bad step before it is looked into.

    Attributes:
        reading: What the check has read.
        bad_gradients: Parameters whose gradient is not finite.
        scale: Of the gradient scaler, 1 without one.
        last_norm: Norm of all gradients in the last finite step, NaN if there is none.
        weights_known: Whether all weights were finite at some step before.
    """

    reading: Reading
    bad_gradients: tuple[str, ...]
    scale: float = 1.0
    last_norm: float = float("nan")
    weights_known: bool = True


def investigate(
    trainer: pl.Trainer, module: pl.LightningModule, batches: StepBatches, symptoms: Symptoms
) -> tuple[RankFinding, MicroBatch | None]:
    """Run the batches of the step again until one of them is bad. Collective where there are pipeline stages.

    Nothing raises here but what ends the process: other ranks wait for the outcome.

    Returns:
        What was found, and the batch that is to blame, or else the last one.
    """
    finding = RankFinding(
        rank=trainer.global_rank,
        stage=pipeline_rank(trainer.strategy),
        batches=batches.count,
        losses=symptoms.reading.losses,
        bad_gradients=symptoms.bad_gradients,
    )
    kept = list(batches)
    culprit = kept[-1] if kept else None
    if culprit is not None:
        finding = replace(finding, batch_number=culprit.number, batch_idx=culprit.batch_idx)
    try:
        finding, culprit = _replayed(trainer, module, kept, symptoms, finding, culprit)
        finding = _with_weights(trainer, module, symptoms, finding)
        if culprit is not None:
            finding = _with_inputs(finding, culprit)
    except Exception as error:  # what is being looked for must not be hidden by what looks for it
        note = f"The search has failed: {type(error).__name__}: {error}"
        guess = finding.origin or from_gradients(module, symptoms.bad_gradients, symptoms.reading.losses)
        return replace(finding, replayed=False, origin=guess, notes=(*finding.notes, note)), culprit
    dtype = next((p.grad.dtype for p in module.parameters() if p.grad is not None), torch.float32)
    limit, limit_type = exchange_overflows_at(trainer, dtype)
    return replace(finding, limit=limit, limit_type=limit_type), culprit


@dataclass(frozen=True)
class BundleSettings:
    """Where replay bundles go, and what is in them.

    Attributes:
        folder: None for no bundles.
        include_data: Whether they hold the batch.
        max_bytes: How large they may be.
    """

    folder: str | Path | None = None
    include_data: bool = False
    max_bytes: int = 1 << 30


def bundle_of(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batch: MicroBatch | None,
    origin: Origin | None,
    scale: float,
    settings: BundleSettings,
) -> dict[str, str]:
    """Write a bundle; never raises.

    Returns:
        ``{"bundle": folder, "note": why there is none}``, one of them empty.
    """
    if pipeline_stages(trainer.strategy) > 1:
        return {"bundle": "", "note": "There is no bundle: no rank has the whole model."}
    if batch is None or batch.random is None or settings.folder is None:
        return {"bundle": "", "note": "There is no bundle: no batch was kept."}
    step = Step(
        batch.batch,
        batch.batch_idx,
        batch.random,
        context=trainer.precision_plugin.train_step_context,
        loss_scale=scale / trainer.accumulate_grad_batches,
        rank=trainer.global_rank,
        micro_batch=batch.number,
        global_step=trainer.global_step,
        epoch=trainer.current_epoch,
    )
    path = Path(settings.folder) / f"step{trainer.global_step}-rank{trainer.global_rank}"
    try:
        written = write_bundle(
            path,
            module,
            step,
            origin,
            include_data=settings.include_data,
            optimizers=trainer.optimizers,
            max_bytes=settings.max_bytes,
        )
    except Exception as error:  # a full disk, or what nobody has thought of: the report matters more
        return {"bundle": "", "note": f"There is no bundle: {type(error).__name__}: {error}"}
    return {"bundle": str(written), "note": ""}


def _replayed(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    kept: Sequence[MicroBatch],
    symptoms: Symptoms,
    finding: RankFinding,
    culprit: MicroBatch | None,
) -> tuple[RankFinding, MicroBatch | None]:
    reason = _cannot_replay(trainer, module, kept)
    if reason:
        guess = from_gradients(module, symptoms.bad_gradients, symptoms.reading.losses)
        return replace(finding, replayed=False, origin=guess, notes=(f"Not run again: {reason}.",)), culprit
    if pipeline_stages(trainer.strategy) > 1:
        return _replay_pipeline(trainer, module, kept, symptoms, finding, culprit)
    largest: dict[str, float] = {}
    notes: list[str] = []
    for one in _most_suspect_first(kept):
        if one.is_changed:
            notes.append("training_step writes to the tensors of its batch: it was run again on what it had left.")
        replay = replay_step(
            module,
            one.batch,
            one.batch_idx,
            rng=one.random,
            context=trainer.precision_plugin.train_step_context,
            loss_scale=symptoms.scale / trainer.accumulate_grad_batches,
            micro_batch=one.number,
        )
        if replay.note and replay.origin is None:
            notes.append(replay.note)
        if not replay.finite or not replay.complete:
            origin = replay.origin or replay.scaled_origin
            if not replay.complete and origin is None:
                origin = from_gradients(module, symptoms.bad_gradients, symptoms.reading.losses)
            found = replace(
                finding,
                reproduced=not replay.finite,
                replayed=replay.complete or not replay.finite,
                origin=origin,
                batch_number=one.number,
                batch_idx=one.batch_idx,
                notes=tuple(dict.fromkeys(notes)),
            )
            return found, one
        for name, value in replay.gradient_largest.items():
            largest[name] = largest.get(name, 0.0) + value
    return replace(finding, largest=_compared(largest, symptoms), notes=tuple(dict.fromkeys(notes))), culprit


def _replay_pipeline(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    kept: Sequence[MicroBatch],
    symptoms: Symptoms,
    finding: RankFinding,
    culprit: MicroBatch | None,
) -> tuple[RankFinding, MicroBatch | None]:
    """All ranks run all batches: the fault may be on a stage of another rank."""
    strategy = trainer.strategy
    assert isinstance(strategy, ReplaysPipeline)
    largest: dict[str, float] = {}
    bad: tuple[RankFinding, MicroBatch] | None = None
    for index, one in enumerate(kept):
        tracer = OriginTracer(module, one.batch, stage=finding.stage)
        with tracer:
            gradients = strategy.replay_training_step(tracer, index)
        origin = tracer.resolve(None, gradients)
        if origin is None and not _is_finite(one) and not not_finite(gradients.items()):
            origin = tracer.origin  # it has reached no gradient by which it could be followed
        if origin is not None and bad is None:
            if not _is_finite(one):  # the loss of the replay is not known here, and the note says that it is finite
                origin = replace(origin, note="")
            found = replace(finding, reproduced=True, origin=origin, batch_number=one.number, batch_idx=one.batch_idx)
            bad = found, one
        for name, gradient in gradients.items():
            largest[name] = largest.get(name, 0.0) + float(gradient.abs().max())
    return bad or (replace(finding, largest=_compared(largest, symptoms)), culprit)


def _cannot_replay(trainer: pl.Trainer, module: pl.LightningModule, kept: Sequence[MicroBatch]) -> str:
    """Why a step cannot be run again; empty if it can. The same on all ranks."""
    if not kept or kept[-1].batch is None:
        return "training_step takes its batches itself"
    if pipeline_stages(trainer.strategy) > 1:
        return "" if isinstance(trainer.strategy, ReplaysPipeline) else "the strategy cannot run its stages again"
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        return f"{type(trainer.strategy).__name__} shares out the weights, so that no rank can compute alone"
    return ""


def _most_suspect_first(kept: Sequence[MicroBatch]) -> list[MicroBatch]:
    return sorted(kept, key=_is_finite)


def _with_weights(
    trainer: pl.Trainer, module: pl.LightningModule, symptoms: Symptoms, finding: RankFinding
) -> RankFinding:
    """Tell weights that the optimizer has spoilt from those that came so."""
    parameters = {name: p for name, p in module.named_parameters() if not p.is_meta and p.numel()}
    bad = not_finite(_present(parameters))
    origin = finding.origin
    if not bad or (origin is not None and origin.exact and origin.cause != "weight"):
        return finding
    if origin is None or origin.cause != "weight":
        origin = replace(origin or Origin("weight"), cause="weight", parameter=bad[0], exact=True)
    blame = blame_of_optimizer(trainer.optimizers, [parameters[name] for name in bad], symptoms.last_norm)
    note = f"Not finite before the step: {', '.join(bad[:5])}{' and more' if len(bad) > 5 else ''}."
    if blame and symptoms.weights_known:
        origin = replace(origin, cause="optimizer", phase="optimizer", parameter=origin.parameter or bad[0])
        note += f" They were finite before, and so were the gradients. {blame}."
    return replace(finding, reproduced=True, origin=origin, notes=(*finding.notes, note))


def _present(parameters: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Without those that are held by other stages."""
    return [(name, p) for name, p in parameters.items() if type(p.data) is Tensor or hasattr(p, "to_local")]


def _with_inputs(finding: RankFinding, batch: MicroBatch) -> RankFinding:
    """Say what is bad in the batch; infinities, which a mask may hold, only if the batch is to blame."""
    is_cause = finding.origin is not None and finding.origin.cause == "input"
    bad = tuple(str(leaf) for leaf in bad_leaves(batch.batch) if leaf.nan or is_cause)
    return replace(finding, bad_inputs=bad)


def _compared(largest: dict[str, float], symptoms: Symptoms) -> dict[str, float]:
    """Those of parameters whose sum is not finite, scaled as they travel."""
    wanted = set(symptoms.bad_gradients) or set(largest)
    names = [name for name in largest if name in wanted][:_COMPARED]
    return {name: largest[name] * symptoms.scale for name in names}


def _is_finite(batch: MicroBatch) -> bool:
    return all(bool(torch.isfinite(loss).all()) for loss in batch.losses)
