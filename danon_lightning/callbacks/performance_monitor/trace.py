"""A trace by ``torch.profiler`` of a few training steps, where TensorBoard's profiler plugin looks for it."""

from typing import Any

import torch

Steps = range | tuple[int, int, int]


def traced_steps(profile_steps: "range | tuple[int, int, int] | None") -> tuple[range, int]:
    """Which steps to trace, and how many before them the profiler shall already be running for.

    Args:
        profile_steps: A range of global steps, with one step of warm-up before it; or how many steps to wait after the
            start of ``fit``, to warm up, and to trace; None for none.

    Raises:
        ValueError: If that is no step, or a negative one.
    """
    if profile_steps is None:
        return range(0), 0
    if isinstance(profile_steps, range):
        steps, warm_up = profile_steps, min(1, max(0, profile_steps.start))
        if not steps or steps.step != 1 or steps.start < 0:
            raise ValueError(f"profile_steps={profile_steps!r} must be steps that follow one another: range(20, 23)")
        return steps, warm_up
    numbers = tuple(profile_steps)
    if len(numbers) != 3 or any(not isinstance(n, int) or n < 0 for n in numbers) or not numbers[2]:
        raise ValueError(
            f"profile_steps={profile_steps!r} must be a range of steps, or how many to wait, to warm up and to trace: "
            "(20, 1, 3)"
        )
    wait, warm_up, active = numbers
    return range(wait + warm_up, wait + warm_up + active), warm_up


class Trace:
    """Runs ``torch.profiler`` for some steps, on every rank, each of which writes a file of its own.

    Args:
        steps: Which ones.
        warm_up: How many before them it runs without tracing: what it costs to start belongs to no step.
        folder: Where ``rank<n>.<time>.pt.trace.json`` goes.
        rank: Of this process.
        device: Where the model computes.
    """

    def __init__(self, steps: range, warm_up: int, folder: str, rank: int, device: torch.device) -> None:
        """See the class."""
        self._steps, self._warm_up = steps, warm_up
        self._folder, self._rank, self._device = folder, rank, device
        self._profiler: Any = None
        self._at = 0
        self._done = False

    def covers(self, step: int) -> bool:
        """Whether a step is slower because of this.

        Args:
            step: Which one.
        """
        return self._steps.start - self._warm_up <= step < self._steps.stop

    def before(self, step: int) -> None:
        """Start, go on, or write.

        Args:
            step: The one that begins now; a step may be named several times.
        """
        if step >= self._steps.stop or self._done:
            self.end()
        elif self._profiler is None and self.covers(step):
            self._start(step)
        elif self._profiler is not None and step > self._at:
            self._at = step
            self._profiler.step()

    def end(self, *, failed: bool = False) -> None:
        """Write what there is; a second call does nothing.

        Args:
            failed: Training has: leave nothing behind that runs, but write nothing.
        """
        profiler, self._profiler = self._profiler, None
        self._done = self._done or profiler is not None
        if profiler is None:
            return
        if failed:
            profiler.on_trace_ready = None
        if self._device.type == "cuda" and not failed:
            torch.cuda.synchronize(self._device)
        profiler.stop()

    def _start(self, step: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        warm_up = max(0, self._steps.start - step)
        active = self._steps.stop - max(step, self._steps.start)
        profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=warm_up, active=active, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(self._folder, worker_name=f"rank{self._rank}"),
            record_shapes=True,
            profile_memory=True,
        )
        self._at = step
        self._profiler = profiler
        profiler.start()
