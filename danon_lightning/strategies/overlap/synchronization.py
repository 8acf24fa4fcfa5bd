"""When all weights must be there, although nobody runs a module."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from danon_lightning.strategies.overlap.forward import ForwardOverlap

# Between the backward pass and the next forward pass.
_HOOKS = ("on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_batch_start")
_MODULE_HOOKS = (*_HOOKS, "configure_gradient_clipping", "optimizer_step")
# Lightning's own hooks look at neither weights nor gradients there, but for its averages of weights. (Checkpoints ask
# for state dictionaries.)
_LOOKS_AT_NOTHING = "lightning.pytorch."
_LOOKS_AT_WEIGHTS = "lightning.pytorch.callbacks.weight_averaging"


class Synchronization(pl.Callback):
    """The first callback of all: has a step finished before anybody looks at weights or gradients.

    Steps are finished at the end of each epoch, before validation and at the end of training; and right after the
    backward pass, as without overlap, wherever another callback or the LightningModule has a hook of its own that may
    look at weights or gradients before the next forward pass. A callback, or module, whose hooks do not can say so by a
    method ``reads_between_steps(trainer) -> bool``, which is asked after each backward pass.
    """

    def __init__(self, overlap: ForwardOverlap) -> None:
        """For one ``fit``.

        Args:
            overlap: What is to be finished.
        """
        self._overlap = overlap
        self._has_warned = False

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gradients are under way."""
        readers = readers_of(trainer, pl_module, self)
        unasked = [name for name, asked in readers if not asked]
        if unasked and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"overlap_forward=True has no effect: {', '.join(unasked)} may look at weights or gradients between "
                "steps, so they are waited for. If it does not, say so by a method there: "
                "def reads_between_steps(self, trainer): return False"
            )
        if readers:
            self._overlap.wait()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish."""
        self._overlap.finish()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish."""
        self._overlap.finish()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish."""
        self._overlap.finish()


def readers_of(trainer: pl.Trainer, module: pl.LightningModule, but: pl.Callback) -> list[tuple[str, bool]]:
    """Who may look at weights or gradients between this backward pass and the next forward pass.

    Args:
        trainer: With callbacks.
        module: What it trains.
        but: A callback that does not count.

    Returns:
        Names of hooks, and whether their owners have said themselves that they look in this step.
    """
    found = []
    owners: list[tuple[Any, tuple[str, ...]]] = [(module, _MODULE_HOOKS)]
    owners += [(callback, _HOOKS) for callback in trainer.callbacks if callback is not but]  # type: ignore[attr-defined]
    for owner, hooks in owners:
        own = [hook for hook in hooks if not _is_harmless(getattr(owner, hook))]
        if not own:
            continue
        ask: Callable[[pl.Trainer], bool] | None = getattr(owner, "reads_between_steps", None)
        if ask is None or ask(trainer):
            found.append((f"{type(owner).__name__}.{own[0]}", ask is not None))
    return found


def _is_harmless(hook: Callable[..., Any]) -> bool:
    # Where the function is from, not the class: LambdaCallback runs those of others.
    source = getattr(getattr(hook, "__func__", hook), "__module__", None) or ""
    return source.startswith(_LOOKS_AT_NOTHING) and source != _LOOKS_AT_WEIGHTS
