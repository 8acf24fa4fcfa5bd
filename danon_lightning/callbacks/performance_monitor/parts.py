"""The parts of a training step, and a timer that leaves no time out: at any moment one part is going on."""

from collections import deque
from typing import Any

from danon_lightning.callbacks.performance_monitor.clocks import Clock

# What a training step is made of. Waiting for other ranks is told apart in pipelines only.
PARTS = (
    "data_wait",
    "batch_transfer",
    "forward",
    "backward",
    "optimizer",
    "communication",
    "pipeline_wait",
    "callbacks",
    "other",
)
# What interrupts training, and belongs to no step.
PAUSES = ("validation", "checkpoint")


class PartTimer:
    """Adds up how long each part goes on.

    Parts are nested: what is started last goes on, until it is stopped; then what it has interrupted goes on. While
    nothing is started it is ``"other"``. A pause keeps out all but another pause, for batches are moved and callbacks
    called in validation too. So the sum over all parts is the time from the first moment to the last, whatever happens.

    Args:
        clock: Tells the time. Moments that have not come yet on a device are settled later, so that nobody has to wait.
        seconds: To be added to, by part.
    """

    def __init__(self, clock: Clock, seconds: dict[str, float]) -> None:
        """Start; ``"other"`` goes on."""
        self._clock = clock
        self._open: list[str] = []
        self._part, self._seconds = "other", seconds
        # From this moment on, this part, to be added up there.
        self._moments: deque[tuple[Any, str, dict[str, float]]] = deque()
        self._moments.append((clock.now(), self._part, seconds))

    def turn(self, starts: bool, part: str | None) -> None:
        """Start a part, or stop one.

        Args:
            starts: Which of both.
            part: What starts or stops; None to stop all.
        """
        if part is None:
            self.stop_all()
        elif starts:
            self.start(part)
        else:
            self.stop(part)

    def start(self, part: str) -> None:
        """Interrupt what goes on.

        Args:
            part: What begins.
        """
        self._open.append(part)
        self._turn_to(self._going_on())

    def stop(self, part: str) -> None:
        """Go on with what was interrupted. What was started since, and never stopped, ends too.

        Args:
            part: What ends; nothing happens if it is not going on.
        """
        for index in range(len(self._open) - 1, -1, -1):
            if self._open[index] == part:
                del self._open[index:]
                self._turn_to(self._going_on())
                return

    def stop_all(self) -> None:
        """From now on it is ``"other"``."""
        self._open.clear()
        self._turn_to("other")

    def add_to(self, seconds: dict[str, float]) -> None:
        """From now on, add to another dictionary.

        Args:
            seconds: Which one.
        """
        self._seconds = seconds
        self._mark()

    def settle(self, *, wait: bool = False) -> None:
        """Add up what is known by now.

        Args:
            wait: Wait until all is known up to this moment.
        """
        if wait:
            self._mark()
            self._clock.wait(self._moments[-1][0])
        while len(self._moments) > 1 and (wait or self._clock.has_come(self._moments[1][0])):
            start, part, seconds = self._moments.popleft()
            seconds[part] = seconds.get(part, 0.0) + self._clock.seconds(start, self._moments[0][0])
            self._clock.forget(start)

    def _going_on(self) -> str:
        for part in reversed(self._open):
            if part in PAUSES:
                return part
        return self._open[-1] if self._open else "other"

    def _turn_to(self, part: str) -> None:
        if part != self._part:
            self._part = part
            self._mark()

    def _mark(self) -> None:
        self._moments.append((self._clock.now(), self._part, self._seconds))
