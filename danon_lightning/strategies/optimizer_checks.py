"""Which compression goes with which optimizer."""

from lightning.pytorch.utilities import rank_zero_warn
from torch import optim

from danon_lightning.optim import OneBitAdam
from danon_lightning.strategies.communication import (
    Compressor,
    ErrorFeedback,
    LinearCompressor,
    RandomKCompressor,
    SignCompressor,
    TopKCompressor,
)

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
    if isinstance(compressor, RandomKCompressor) or (
        isinstance(compressor, TopKCompressor) and not compressor.warmup_steps
    ):
        hint = (
            "TopKCompressor(warmup_steps=…)" if isinstance(compressor, TopKCompressor) else "TopKCompressor or 'int4'"
        )
        rank_zero_warn(
            f"compression={compressor.name!r} with {kind}: the optimizer's mean squares start from very sparse "
            f"gradients, which slows training down at first. Consider {hint}"
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
