"""What steps that are taken in parts do not go with."""

from collections.abc import Sequence

import lightning.pytorch as pl
from torch import optim

# The update of a parameter depends on its own gradient and state alone, which has its own count of steps.
_SEPARATE = (
    optim.ASGD, optim.Adadelta, optim.Adafactor, optim.Adagrad, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam,
    optim.RAdam, optim.RMSprop, optim.Rprop, optim.SGD,
)  # fmt: skip


def check_overlap(
    *,
    compressed: bool,
    sync_mode: str,
    optimizer_sharding: bool,
    find_unused_parameters: bool,
    static_graph: bool,
    pipeline_parallel_size: int,
) -> None:
    """Refuse arguments of the strategy that do not go with ``overlap_forward=True``.

    Args:
        compressed: Whether there is a compression.
        sync_mode: Its name.
        optimizer_sharding: As given.
        find_unused_parameters: As given.
        static_graph: As given.
        pipeline_parallel_size: As given.

    Raises:
        ValueError: Naming the argument, why, and what to do.
    """
    refused = {
        "compression": (compressed, "a step that is not finite must be dropped before any weight moves", "None"),
        "sync_mode": (sync_mode != "full", "gradients are not of this step there", "'full'"),
        "optimizer_sharding": (optimizer_sharding, "weights are sent round after each step", "False"),
        "find_unused_parameters": (find_unused_parameters, "forward passes must be alike", "False"),
        "static_graph": (static_graph, "gradients are exchanged after the backward pass of the first step", "False"),
        "pipeline_parallel_size": (pipeline_parallel_size != 1, "stages have no such forward pass", "1"),
    }
    for name, (is_set, why, remedy) in refused.items():
        if is_set:
            raise ValueError(
                f"overlap_forward=True cannot be used with this {name}: {why}. Set {name}={remedy}, or "
                "overlap_forward=False"
            )


def check_trainer(trainer: pl.Trainer, optimizers: Sequence[optim.Optimizer], *, scales_loss: bool) -> None:
    """Refuse ways of training that need all gradients before any weight moves.

    Args:
        trainer: About to fit.
        optimizers: Which it will use.
        scales_loss: Whether the loss is scaled, as with 16-mixed precision.

    Raises:
        ValueError: Saying what to change.
    """
    if not trainer.lightning_module.automatic_optimization:
        raise ValueError("overlap_forward=True needs automatic_optimization=True: or set overlap_forward=False")
    if trainer.gradient_clip_val:
        raise ValueError(
            f"overlap_forward=True cannot be used with gradient_clip_val={trainer.gradient_clip_val}, which needs all "
            "gradients before any weight moves: leave one of them out"
        )
    if scales_loss:
        raise ValueError(
            f"overlap_forward=True cannot be used with precision={trainer.precision!r}, whose gradient scaler needs "
            "all gradients before any weight moves: take 'bf16-mixed', or overlap_forward=False"
        )
    if len(optimizers) != 1:
        raise ValueError(f"overlap_forward=True takes one optimizer, there are {len(optimizers)}")
    kind = type(optimizers[0])
    if kind not in _SEPARATE and not getattr(kind, "steps_parameters_separately", False):
        raise ValueError(
            f"overlap_forward=True does not know {kind.__name__}. If it moves each parameter by its own gradient and "
            f"state alone, and counts steps in that state, say so by {kind.__name__}.steps_parameters_separately = "
            "True; else take another optimizer, such as AdamW, or overlap_forward=False"
        )
