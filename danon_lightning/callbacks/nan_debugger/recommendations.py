"""What to try, from what was found: in plain words."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl

from danon_lightning.callbacks.nan_debugger.history import History
from danon_lightning.callbacks.nan_debugger.remedies import remedies
from danon_lightning.callbacks.nan_debugger.report import Report

# More lines of advice are not read.
_MOST = 3
# A norm that has grown more than so many times over its median speaks for training that diverges.
_DIVERGES = 10.0


@dataclass(frozen=True)
class Circumstances:
    """What else is known of the run.

    Attributes:
        clips: Whether gradients are clipped.
        learning_rate: The largest of all groups.
        grew: By which factor the norm of the gradients had grown over its median in the last steps before, 1 if
            unknown.
    """

    clips: bool = False
    learning_rate: float = 0.0
    grew: float = 1.0


def circumstances(trainer: pl.Trainer, history: History) -> Circumstances:
    """What else is known of the run now."""
    norms = [norm for norm in history.total_norms if math.isfinite(norm)]
    usual = sorted(norms)[len(norms) // 2] if norms else 0.0
    rates = history.learning_rates
    return Circumstances(
        clips=bool(trainer.gradient_clip_val),
        learning_rate=rates[-1] if rates else 0.0,
        grew=norms[-1] / usual if len(norms) >= 5 and usual > 0 else 1.0,
    )


def recommend(report: Report, now: Circumstances) -> list[str]:
    """What to try, most promising first; three lines at most.

    Args:
        report: What was found.
        now: What else is known.
    """
    origin = report.origin
    by_cause: dict[str, Callable[[Report, Circumstances], list[str]]] = {
        "input": _for_input,
        "weight": _for_weight,
        "optimizer": _for_optimizer,
        "reduction": _for_reduction,
        "transient": _for_transient,
    }
    if report.cause in by_cause:
        found = by_cause[report.cause](report, now)
    else:
        found = remedies(origin) if origin is not None else []
        found = found or ["Run once with torch.autograd.set_detect_anomaly(True), which needs no replay."]
        if origin is not None and origin.sample is not None:
            found.insert(1, f"Look at sample {origin.sample} of the batch: not all samples give what is not finite.")
    if report.cause in ("forward", "backward", "weight", "unknown") and now.grew > _DIVERGES:
        found.insert(
            1,
            f"The norm of the gradients has grown {now.grew:.0f}-fold over the last steps: training diverges. "
            + _lower_rate(now),
        )
    return list(dict.fromkeys(found))[:_MOST]


def _for_input(report: Report, now: Circumstances) -> list[str]:
    origin, one = report.origin, report.finding
    leaf = origin.leaf if origin is not None and origin.leaf else "the batch"
    sample = origin.sample if origin is not None else None
    which = f"sample {sample} of {leaf}" if sample is not None else leaf
    held = _counts(report, leaf)
    return [
        f"Look at {which} (batch {one.batch_idx}{held}), and at the code of the Dataset that makes it.",
        "Clean the data, torch.nan_to_num for missing values, or have the collate function drop such samples.",
        "check_inputs_every_n_steps=1 names such batches even where they do no harm yet.",
    ]


def _for_weight(report: Report, now: Circumstances) -> list[str]:
    name = (report.origin.parameter if report.origin is not None else None) or "the weights"
    held = _counts(report, name)
    if "running_" in name:
        first = f"An earlier batch has spoilt the statistics {name}{held}: call reset_running_stats() of that module."
    elif report.step == 0:
        first = f"{name} was not finite before the first step{held}: look at its initialisation, or at the checkpoint."
    else:
        first = (
            f"The optimizer step before has spoilt {name}{held}, or else what writes to it between steps, such as "
            f"weight averaging. {_lower_rate(now)}"
        )
    return [
        first,
        *(["Load a checkpoint from before: these values are lost."] if report.step else []),
        "check_weights_every_n_steps=1 tells after which step it happens.",
    ]


def _for_optimizer(report: Report, now: Circumstances) -> list[str]:
    return [
        _lower_rate(now),
        "Use a larger eps in the optimizer, such as Adam's (1e-8 or more; in half precision 1e-6), and a warm-up.",
        "Load a checkpoint from before: these weights are lost.",
    ]


def _for_reduction(report: Report, now: Circumstances) -> list[str]:
    return [
        "Send gradients in bfloat16 or float32, which hold larger numbers than float16.",
        "Average before summing: divide the loss by the number of ranks, or take its mean over tokens. Clipping comes "
        "after the sum, and does not help.",
        "With a gradient scaler, begin with a smaller scale: gradients are multiplied by it on their way.",
    ]


def _for_transient(report: Report, now: Circumstances) -> list[str]:
    return [
        'Go on from the last checkpoint, or with policy="skip": a single such step is nothing to worry about.',
        "If it happens again on the same machine, suspect its memory or its GPU (nvidia-smi -q -d ECC).",
        "If the step draws on files, counters, or other random numbers than those of torch, numpy and Python, it "
        "cannot be run again as it was: look there.",
    ]


def _counts(report: Report, name: str) -> str:
    """How many elements of what is to blame are bad: ``", 2 NaN of 128"``."""
    inputs = report.origin.inputs if report.origin is not None else ()
    one = next((one for one in inputs if one.name == name and not one.finite), None)
    if one is None:
        return ""
    counts = [f"{count} {what}" for count, what in ((one.nan_count, "NaN"), (one.inf_count, "infinite")) if count]
    return f", {' and '.join(counts)} of {one.numel}"


def _lower_rate(now: Circumstances) -> str:
    return f"Lower the learning rate ({now.learning_rate:.3g})" + _or_clip(now)


def _or_clip(now: Circumstances) -> str:
    return "." if now.clips else ", and clip gradients: Trainer(gradient_clip_val=1.0)."


def advice_for(kinds: Sequence[str], now: Circumstances) -> dict[str, str]:
    """What to try against gradients and weights that are odd but finite, by kind.

    Args:
        kinds: Of :class:`~danon_lightning.callbacks.nan_debugger.thresholds.Oddity`.
        now: What else is known.
    """
    all_kinds = {
        "explosion": f"lower the learning rate ({now.learning_rate:.3g})" + _or_clip(now).rstrip("."),
        "vanishing": "see whether the loss reaches these parameters: a detach, a saturated activation, a dead branch",
        "weight": "add weight decay, or lower the learning rate",
    }
    return {kind: all_kinds[kind] for kind in kinds}
