"""Where the parts of a step begin and end: a Trainer tells its profiler of everything it does.

Callback hooks alone cannot tell a batch that is fetched from one that is moved, nor when a checkpoint has been written,
nor what other callbacks take. But ``Trainer.profiler`` (which does nothing by default) gets a name whenever something
starts or stops. Here its methods ``start`` and ``stop`` also call listeners, whatever profiler it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.model_helpers import is_overridden

from danon_lightning.callbacks.performance_monitor.parts import PartTimer

_LISTENERS = "_danon_lightning_listeners"
# Between on_train_start and on_train_end.
_TRAINING_HOOKS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
)


# (True, part) if a part starts, (False, part) if one stops, (False, None) if all that go on stop.
_Meaning = tuple[bool, str | None]


@dataclass
class Actions:
    """By the name of an action, what its start and its end mean for the parts of a step.

    Attributes:
        at_start: What starts mean.
        at_stop: What ends mean.
    """

    at_start: dict[str, _Meaning] = field(default_factory=dict)
    at_stop: dict[str, _Meaning] = field(default_factory=dict)

    def span(self, name: str, part: str) -> None:
        """The part lasts as long as the action.

        Args:
            name: Of the action.
            part: Which one.
        """
        self.at_start[name] = True, part
        self.at_stop[name] = False, part


def actions_of(trainer: pl.Trainer, module: pl.LightningModule, callback: pl.Callback) -> Actions:
    """What the actions of a Trainer mean.

    Args:
        trainer: Which one.
        module: What it trains.
        callback: One of its callbacks, whose hooks mark what no action covers: each hook of each callback is an action
            of its own, also if it does nothing.
    """
    actions = Actions()
    strategy, of_module = f"[Strategy]{type(trainer.strategy).__name__}", f"[LightningModule]{type(module).__name__}"
    epoch_loop = type(trainer.fit_loop.epoch_loop).__name__
    actions.span(f"[{epoch_loop}].train_dataloader_next", "data_wait")
    actions.span(f"{strategy}.batch_to_device", "batch_transfer")
    actions.span(f"{of_module}.on_before_batch_transfer", "batch_transfer")
    actions.span(f"{strategy}.training_step", "forward")
    actions.span(f"{strategy}.backward", "backward")
    # With automatic optimization the steps above lie inside of this one, and interrupt it.
    actions.span(f"{of_module}.optimizer_step", "optimizer")
    actions.span(f"{of_module}.optimizer_zero_grad", "optimizer")
    actions.span(f"{of_module}.lr_scheduler_step", "optimizer")
    # With manual optimization these lie in the training step.
    actions.span("optimizer_step", "optimizer")
    actions.span("save_checkpoint", "checkpoint")
    # Whatever was left open, there is nothing around this.
    actions.at_start["run_training_batch"] = False, None
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        for hook in _TRAINING_HOOKS:
            if is_overridden(hook, other, parent=pl.Callback):
                actions.span(f"[Callback]{other.state_key}.{hook}", "callbacks")
    own = f"[Callback]{callback.state_key}"
    # The first hook before the pass and the first one after it: manual optimization has no action for it.
    actions.at_start.pop(f"{own}.on_before_backward", None)
    actions.at_stop[f"{own}.on_before_backward"] = True, "backward"
    actions.at_start[f"{own}.on_after_backward"] = False, "backward"
    actions.at_stop.pop(f"{own}.on_after_backward", None)
    actions.at_start[f"{own}.on_validation_start"] = True, "validation"
    actions.at_stop[f"{own}.on_validation_end"] = False, "validation"
    return actions


def listen(profiler: Profiler, actions: Actions, timer: PartTimer) -> Callable[[], None]:
    """Have a timer follow what a Trainer does.

    Args:
        profiler: That of the Trainer. It may have several listeners.
        actions: What it tells.
        timer: Is told.

    Returns:
        Ends it; the last one to do so leaves the profiler as it was.
    """

    state: dict[str, Any] = vars(profiler)
    if _LISTENERS not in state:
        _open_to_listeners(profiler, state)
    listeners: list[Any] = state[_LISTENERS]
    own = (actions.at_start.get, actions.at_stop.get, timer)
    listeners.append(own)

    def end() -> None:
        if own in listeners:
            listeners.remove(own)
        if not listeners and state.get(_LISTENERS) is listeners:
            for name in (_LISTENERS, "start", "stop"):
                del state[name]

    return end


def _open_to_listeners(profiler: Profiler, state: dict[str, Any]) -> None:
    start, stop = profiler.start, profiler.stop
    listeners: list[tuple[Callable[[str], _Meaning | None], Callable[[str], _Meaning | None], PartTimer]] = []

    # Called some hundred times a step: nothing is done here that can be done beforehand.
    def start_and_tell(action_name: str) -> None:
        for find, _, timer in listeners:
            meaning = find(action_name)
            if meaning is not None:
                timer.turn(*meaning)
        start(action_name)

    def stop_and_tell(action_name: str) -> None:
        stop(action_name)
        for _, find, timer in listeners:
            meaning = find(action_name)
            if meaning is not None:
                timer.turn(*meaning)

    state.update({_LISTENERS: listeners, "start": start_and_tell, "stop": stop_and_tell})
