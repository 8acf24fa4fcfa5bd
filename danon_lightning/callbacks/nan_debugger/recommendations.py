"""What to try, from what was found: in plain words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from danon_lightning.callbacks.nan_debugger.origin import Origin, TensorStatistics
from danon_lightning.callbacks.nan_debugger.report import Report

_SOFTMAX = ("softmax", "log_softmax", "scaled_dot_product", "attention")
_POWERS = ("sqrt", "rsqrt", "pow", "norm", "std", "var", "linalg_vector_norm", "cdist")
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "linear", "convolution", "mul", "dot", "matmul", "einsum")
_HALF = {"float16": torch.finfo(torch.float16).max, "bfloat16": torch.finfo(torch.bfloat16).max}


@dataclass(frozen=True)
class Circumstances:
    """What else is known of the run.

    Attributes:
        precision: As the Trainer calls it: "32-true", "16-mixed".
        clips: Whether gradients are clipped.
        learning_rate: The largest of all groups.
        grew: By which factor the norm of the gradients had grown over its median in the last steps before, 1 if
            unknown.
    """

    precision: str = "32-true"
    clips: bool = False
    learning_rate: float = 0.0
    grew: float = 1.0


def recommend(report: Report, now: Circumstances) -> list[str]:
    """What to try, most promising first.

    Args:
        report: What was found.
        now: What else is known.
    """
    origin, found = report.origin, []
    by_cause: dict[str, Callable[[Report, Circumstances], list[str]]] = {
        "input": _for_input,
        "weight": _for_weight,
        "optimizer": _for_optimizer,
        "reduction": _for_reduction,
        "transient": _for_transient,
    }
    if report.cause in by_cause:
        found += by_cause[report.cause](report, now)
    elif origin is not None:
        found += _for_operation(origin, now)
        sample = origin.sample
        if sample is not None:
            found.append(f"Look at sample {sample} of the batch: only some samples give a value that is not finite.")
    else:
        found.append("Run once with torch.autograd.set_detect_anomaly(True), which needs no replay.")
    if report.cause in ("forward", "backward", "weight", "optimizer", "unknown") and now.grew > 10:
        found.append(
            f"The norm of the gradients has grown {now.grew:.0f}-fold over the last steps: training diverges. Lower "
            f"the learning rate ({now.learning_rate:.3g})" + _or_clip(now)
        )
    return list(dict.fromkeys(found))


def _for_input(report: Report, now: Circumstances) -> list[str]:
    origin, one = report.origin, report.finding
    leaf = origin.leaf if origin is not None and origin.leaf else "the batch"
    sample = origin.sample if origin is not None else None
    which = f"sample {sample} of {leaf}" if sample is not None else leaf
    return [
        f"Look at {which} (batch {one.batch_idx}), and at the code of the Dataset that makes it.",
        "Clean the data, torch.nan_to_num for missing values, or have the collate function drop such samples.",
    ]


def _for_weight(report: Report, now: Circumstances) -> list[str]:
    name = report.origin.parameter if report.origin is not None else None
    return [
        f"Find out what writes to {name or 'the weights'} between steps: initialisation, a checkpoint that was already "
        "spoilt, a callback such as weight averaging. check_weights_every_n_steps=1 tells at which step it happens.",
        "Go back to a checkpoint from before.",
    ]


def _for_optimizer(report: Report, now: Circumstances) -> list[str]:
    return [
        f"Lower the learning rate ({now.learning_rate:.3g})" + _or_clip(now),
        "Use a larger eps in the optimizer (1e-8 or more; in half precision 1e-6), and a warm-up.",
        "Go back to a checkpoint from before: these weights are lost.",
    ]


def _for_reduction(report: Report, now: Circumstances) -> list[str]:
    return [
        "Send gradients in bfloat16 or float32, which hold larger numbers than float16.",
        "Divide the loss, or take its mean: gradients are as large as the loss is.",
        *([] if now.clips else ["Clipping does not help here: it comes after the sum."]),
    ]


def _for_transient(report: Report, now: Circumstances) -> list[str]:
    return [
        "If it happens again on the same machine, suspect its memory or its GPU (nvidia-smi -q -d ECC).",
        "If the step draws on anything besides the batch, weights and torch's, numpy's and Python's random numbers, "
        "such as files or counters, it cannot be run again as it was: look there.",
        'policy="skip" gets past a single such step.',
    ]


def _for_operation(origin: Origin, now: Circumstances) -> list[str]:
    name = origin.name.rstrip("_")
    first = origin.inputs[0] if origin.inputs else None
    found = []
    if "16" in now.precision:
        found += _for_half(origin, now)
    if name.startswith("log") and "softmax" not in name:
        found.append("The argument of a logarithm was zero or negative: use torch.log(x.clamp_min(1e-6)), or log1p.")
    elif name in ("div", "true_divide", "reciprocal", "floor_divide", "remainder", "fmod") or name.startswith("div"):
        found.append("A division by zero: add an eps to the divisor, or clamp_min it.")
    elif any(part in name for part in _SOFTMAX):
        found.append(
            "A row of a softmax may be masked out as a whole: make sure that each row keeps an element, or set such "
            "rows to zero afterwards (add a check of the mask's rows)."
        )
    elif any(name.startswith(part) for part in _POWERS):
        at_zero = "has no finite derivative at zero" if origin.phase == "backward" else "of a negative number is NaN"
        found.append(f"{name} {at_zero}: add an eps under the root, torch.sqrt(x + 1e-8), or clamp_min the argument.")
    elif name.startswith("exp") or name in ("cosh", "sinh", "expm1"):
        found.append("An exponential has overflowed: subtract the maximum first, or clamp_max its argument.")
    elif name in ("acos", "asin", "atanh", "erfinv"):
        found.append(f"The argument of {name} lies at or outside the limits of where it is defined: clamp it inside.")
    elif "norm" in name:
        found.append("Use a larger eps in the normalisation (1e-5 or more).")
    elif any(part in name for part in _PRODUCTS) and first is not None:
        found.append(
            f"The product of {first.describe()} has overflowed: normalise what goes in, or lower the learning rate"
            + _or_clip(now)
        )
    if not found:
        found.append(f"Guard the arguments of {origin.name or 'this operation'} against the values shown above.")
    return found


def _for_half(origin: Origin, now: Circumstances) -> list[str]:
    dtypes = [one.dtype for one in (*origin.inputs, origin.output) if one is not None]
    half = next((dtype for dtype in dtypes if dtype in _HALF), None)
    if half is None:
        return []
    largest = max((_size(one) for one in origin.inputs), default=0.0)
    found = [
        f"{half} ends at {_HALF[half]:.4g}, what went in here was as large as {largest:.4g}: run "
        f'{origin.module or "this part"} in float32 (policy="fallback" does it for a while, '
        "torch.autocast(device, enabled=False) for good)."
    ]
    if half == "float16":
        found.append('Train with precision="bf16-mixed", whose range is that of float32.')
    return found


def _size(one: TensorStatistics) -> float:
    return max(abs(one.minimum or 0.0), abs(one.maximum or 0.0))


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
