"""Which compression goes with which optimizer."""

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torch import optim

from danon_lightning.optim import OneBitAdam
from danon_lightning.strategies.communication import (
    AutoCompression,
    Compressor,
    ErrorFeedback,
    LinearCompressor,
    RandomKCompressor,
    SignCompressor,
    TopKCompressor,
)
from danon_lightning.strategies.communication.adaptive.settings import FOR_ANY_OPTIMIZER, FOR_SGD, label
from danon_lightning.strategies.communication.error_feedback import resolve_error_feedback

_ADAPTIVE = (
    optim.Adadelta, optim.Adafactor, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW, optim.NAdam, optim.RAdam,
    optim.RMSprop,
)  # fmt: skip


def check_optimizer(
    optimizer: optim.Optimizer,
    compressor: Compressor | LinearCompressor,
    feedback: ErrorFeedback | None,
    *,
    clips: bool,
) -> None:
    """Refuse a compression that would spoil training with this optimizer, saying what to use in its place.

    Args:
        optimizer: The optimizer.
        compressor: What gradients are compressed with.
        feedback: How errors are fed back; None if they are not.
        clips: Whether gradients are clipped after the exchange.

    Raises:
        ValueError: For one-bit gradients with an adaptive optimizer; momentum correction with anything but plain SGD,
            or with clipping; :class:`OneBitAdam` with clipping.
    """
    kind = type(optimizer).__name__
    if feedback is not None and feedback.momentum is not None:
        _check_momentum_correction(optimizer, feedback, kind, clips)
    if isinstance(optimizer, OneBitAdam):
        if clips:
            raise ValueError(
                "gradient_clip_val cannot be used with OneBitAdam and a compression: once the variance is frozen, what "
                "is clipped after the exchange is momentum. Use ErrorFeedback(clip_norm=…), which clips before it"
            )
        return
    if not isinstance(optimizer, _ADAPTIVE):
        return
    if isinstance(compressor, SignCompressor):
        raise ValueError(
            f"compression='sign' cannot be used with {kind}: one bit a gradient says nothing about its mean square, by "
            "which the optimizer divides. Use danon_lightning.optim.OneBitAdam, which compresses its momentum; or "
            "compression='int4', or SGD"
        )
    if _is_very_sparse_at_first(compressor):
        hint = (
            "TopKCompressor(warmup_steps=…)" if isinstance(compressor, TopKCompressor) else "TopKCompressor or 'int4'"
        )
        rank_zero_warn(
            f"compression={compressor.name!r} with {kind}: the optimizer's mean squares start from very sparse "
            f"gradients, which slows training down at first. Consider {hint}"
        )


def tolerates(
    optimizer: optim.Optimizer,
    compressor: Compressor | LinearCompressor,
    feedback: ErrorFeedback | None,
    *,
    clips: bool,
) -> bool:
    """Whether :func:`check_optimizer` has nothing against it: it neither refuses nor warns. The same on all ranks."""
    if isinstance(optimizer, _ADAPTIVE) and _is_very_sparse_at_first(compressor):
        return False
    try:
        check_optimizer(optimizer, compressor, feedback, clips=clips)
    except ValueError:
        return False
    return True


def allowed_compressions(
    settings: AutoCompression, optimizers: Sequence[optim.Optimizer], *, clips: bool
) -> list[Compressor | LinearCompressor | None]:
    """What "auto" may choose with these optimizers. Candidates that one of them does not tolerate are warned of.

    Args:
        settings: What was asked for.
        optimizers: All optimizers.
        clips: Whether gradients are clipped after the exchange.

    Raises:
        ValueError: For :class:`OneBitAdam`, whose momentum is exchanged in place of gradients.
    """
    if any(isinstance(optimizer, OneBitAdam) for optimizer in optimizers):
        raise ValueError(
            "compression='auto' cannot be used with OneBitAdam, which has its momentum compressed: name a compression, "
            "such as 'sign', or use AdamW"
        )
    is_sgd = all(isinstance(optimizer, optim.SGD) for optimizer in optimizers)
    allowed: list[Compressor | LinearCompressor | None] = []
    refused = []
    for candidate in settings.resolve(FOR_SGD if is_sgd else FOR_ANY_OPTIMIZER):
        feedback = resolve_error_feedback("auto", candidate)
        if candidate is None or all(tolerates(one, candidate, feedback, clips=clips) for one in optimizers):
            allowed.append(candidate)
        else:
            refused.append(label(candidate))
    if refused:
        kinds = ", ".join(sorted({type(optimizer).__name__ for optimizer in optimizers}))
        rank_zero_warn(
            f"compression='auto' leaves out {', '.join(refused)}: {kinds} does not train well with it. What is left: "
            f"{', '.join(label(candidate) for candidate in allowed)}"
        )
    return allowed


def _is_very_sparse_at_first(compressor: Compressor | LinearCompressor) -> bool:
    return isinstance(compressor, RandomKCompressor) or (
        isinstance(compressor, TopKCompressor) and not compressor.warmup_steps
    )


def _check_momentum_correction(optimizer: optim.Optimizer, feedback: ErrorFeedback, kind: str, clips: bool) -> None:
    if not isinstance(optimizer, optim.SGD):
        raise ValueError(
            f"ErrorFeedback(momentum={feedback.momentum}) needs SGD, but the optimizer is {kind}: it replaces SGD's "
            "own momentum. Leave momentum at None"
        )
    if any(group["momentum"] for group in optimizer.param_groups):
        raise ValueError(
            f"ErrorFeedback(momentum={feedback.momentum}) replaces the optimizer's momentum, which would be applied "
            "twice: use SGD(…, momentum=0)"
        )
    if clips:
        raise ValueError(
            "gradient_clip_val cannot be used with ErrorFeedback(momentum=…): what is clipped after the exchange is "
            "momentum. Use ErrorFeedback(clip_norm=…), which clips each node's gradient before it is gathered"
        )
