"""The time of training steps, part by part, over windows of several steps."""

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.profilers import Profiler

from danon_lightning.callbacks.performance_monitor.actions import actions_of, listen
from danon_lightning.callbacks.performance_monitor.clocks import Clock, clock_of
from danon_lightning.callbacks.performance_monitor.parts import PAUSES, PartTimer


class StepTimes:
    """Follows a Trainer from ``on_train_start`` on, without waiting for the device but at the end of a window.

    A step ends where the optimizer has made one (with manual optimization: at the end of each batch), and the next one
    begins there. So steps leave no gap between them, and take all batches whose gradients are accumulated.

    Args:
        clock: Tells the time; None for that of the device.

    Attributes:
        seconds: In this window, by part. Complete after :meth:`settle` with ``wait=True``.
        batch: In the last batch for which :meth:`begin_batch` was called. It counts in ``seconds`` only when
            :meth:`end_batch` has been called.
        steps: In this window.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        """See the class."""
        self._clock = clock
        self._timer: PartTimer | None = None
        self._end: Callable[[], None] | None = None
        self.seconds: dict[str, float] = {}
        self.batch: dict[str, float] = {}
        self.steps = 0

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, callback: pl.Callback) -> None:
        """Start the first window.

        Args:
            trainer: To be followed.
            module: What it trains.
            callback: The one that asks, see :func:`~danon_lightning.callbacks.performance_monitor.actions.actions_of`.
        """
        self.end()
        self.seconds, self.steps = {}, 0
        self._timer = PartTimer(self._clock or clock_of(trainer.strategy.root_device), self.seconds)
        self._end = listen(profiler_of(trainer), actions_of(trainer, module, callback), self._timer)

    def begin_window(self) -> None:
        """Count anew from here on."""
        assert self._timer is not None
        self.seconds, self.steps = {}, 0
        self._timer.add_to(self.seconds)

    def begin_batch(self) -> None:
        """Count the time of a batch apart, for :attr:`batch`."""
        assert self._timer is not None
        self.batch = {}
        self._timer.add_to(self.batch)

    def end_batch(self) -> None:
        """Put the time of the batch back into the window. Waits for the device."""
        assert self._timer is not None
        self._timer.settle(wait=True)
        for part, seconds in self.batch.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        self._timer.add_to(self.seconds)

    def settle(self, *, wait: bool = False) -> None:
        """Add up what is known by now.

        Args:
            wait: Wait for the device, so that all is known.
        """
        assert self._timer is not None
        self._timer.settle(wait=wait)

    @property
    def is_running(self) -> bool:
        """Whether a Trainer is followed."""
        return self._timer is not None

    def end(self) -> None:
        """Let go of the Trainer; a second call does nothing."""
        if self._end is not None:
            self._end()
        self._end = self._timer = None


def in_steps(seconds: dict[str, float]) -> dict[str, float]:
    """What belongs to steps.

    Args:
        seconds: By part.
    """
    return {part: value for part, value in seconds.items() if part not in PAUSES}


def ends_step(trainer: pl.Trainer) -> bool:
    """Whether the optimizer makes a step with the present batch; each batch counts with manual optimization.

    Args:
        trainer: In ``on_train_batch_start`` or ``on_train_batch_end``.
    """
    return not trainer.fit_loop._should_accumulate()


def profiler_of(trainer: pl.Trainer) -> Profiler:
    """What a Trainer tells of all it does.

    Args:
        trainer: Which one.
    """
    profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]
    return profiler
