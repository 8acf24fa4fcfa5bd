"""Clocks: that of the host, and that of a CUDA device, which is read without waiting for it."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Tells moments, whose distances can be known later than the moments themselves."""

    def now(self) -> Any:
        """This moment, to be handed to the other methods."""
        ...

    def has_come(self, moment: Any) -> bool:
        """Whether distances to this moment can be told without waiting."""
        ...

    def wait(self, moment: Any) -> None:
        """Wait until they can."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """From one moment to another. Both must have come."""
        ...

    def forget(self, moment: Any) -> None:
        """The moment is not asked for any more."""
        ...


class HostClock:
    """The time of this process.

    Args:
        read: Seconds since some moment.
    """

    def __init__(self, read: Callable[[], float] = time.perf_counter) -> None:
        """See the class."""
        self.now = read

    def has_come(self, moment: float) -> bool:
        """It always has."""
        return True

    def wait(self, moment: float) -> None:
        """There is nothing to wait for."""

    def seconds(self, start: float, end: float) -> float:
        """From one moment to another."""
        return end - start

    def forget(self, moment: float) -> None:
        """Nothing is kept."""


class CudaClock:
    """The time on the stream in which a CUDA device computes: a moment comes when all before it has been computed.

    What the host does while the device is busy takes no time on this clock, what the device waits for does. That is
    what counts: work that is hidden behind the device's costs nothing.

    Args:
        device: Which one.
    """

    def __init__(self, device: torch.device) -> None:
        """See the class."""
        self._device = device
        self._unused: list[torch.cuda.Event] = []

    def now(self) -> "torch.cuda.Event":
        """An event behind all that has been asked of the device so far."""
        event = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def has_come(self, moment: "torch.cuda.Event") -> bool:
        """Whether the device has come so far. Does not wait."""
        return bool(moment.query())

    def wait(self, moment: "torch.cuda.Event") -> None:
        """Wait for the device."""
        moment.synchronize()

    def seconds(self, start: "torch.cuda.Event", end: "torch.cuda.Event") -> float:
        """From one moment to another."""
        return float(start.elapsed_time(end)) / 1e3

    def forget(self, moment: "torch.cuda.Event") -> None:
        """The event can be used again."""
        self._unused.append(moment)


def clock_of(device: torch.device) -> Clock:
    """The clock that tells how long things take on a device.

    Args:
        device: Where the model computes. On accelerators other than CUDA it is the host's: what they are asked to do
            is then counted where the host waits for it.
    """
    return CudaClock(device) if device.type == "cuda" else HostClock()
