"""What the ranks find out together about a step that was not finite."""

import lightning.pytorch as pl

from danon_lightning.callbacks.nan_debugger.agreement import gather
from danon_lightning.callbacks.nan_debugger.batches import StepBatches
from danon_lightning.callbacks.nan_debugger.investigation import BundleSettings, Symptoms, bundle_of, investigate
from danon_lightning.callbacks.nan_debugger.report import RankFinding, Report, conclude, with_bundle


def find_out(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batches: StepBatches,
    symptoms: Symptoms,
    why: str,
    bundles: BundleSettings,
) -> Report:
    """What all ranks have found, and a bundle by the rank to blame. Collective; buffers have to be as before the step.

    Args:
        trainer: Whose step it is.
        module: The LightningModule.
        batches: Of the step.
        symptoms: What the check has seen.
        why: Why the step is looked at, if not for a plain NaN.
        bundles: Whether and where bundles are written.
    """
    device = trainer.strategy.root_device
    finding, culprit = investigate(trainer, module, batches, symptoms)
    findings = [RankFinding.from_dict(one) for one in gather(finding.to_dict(), device)]
    report = conclude(trainer.global_step, trainer.current_epoch, findings, why)
    if bundles.folder is None or not report.finding.reproduced:
        return report
    written = {"bundle": "", "note": ""}
    if report.finding.rank == trainer.global_rank:
        written = bundle_of(trainer, module, culprit, report.origin, symptoms.scale, bundles)
    return with_bundle(report, **gather(written, device)[report.finding.rank])


def find_out_alone(trainer: pl.Trainer, module: pl.LightningModule, batches: StepBatches, symptoms: Symptoms) -> Report:
    """What this rank finds where its loss is not finite, but no gradient is spoilt. Not collective.

    Args:
        trainer: Whose step it is.
        module: The LightningModule, its buffers as before the step.
        batches: Of the step.
        symptoms: What the check has seen.
    """
    finding, _ = investigate(trainer, module, batches, symptoms)
    why = f"the loss of rank {trainer.global_rank} is not finite, though all gradients are"
    return conclude(trainer.global_step, trainer.current_epoch, [finding], why)
