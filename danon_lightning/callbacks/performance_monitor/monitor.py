"""Says where the time of a training step goes, and how much memory it takes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from danon_lightning.callbacks import logs
from danon_lightning.callbacks.health import Finding
from danon_lightning.callbacks.performance_monitor.clocks import Clock
from danon_lightning.callbacks.performance_monitor.memory import MemoryMeter, limit_of
from danon_lightning.callbacks.performance_monitor.pipeline_share import split_training_step, take_out
from danon_lightning.callbacks.performance_monitor.samples import Count, samples_in, tokens_in
from danon_lightning.callbacks.performance_monitor.step_times import StepTimes, ends_step, profiler_of
from danon_lightning.callbacks.performance_monitor.summary import RankWindow, RunTotals, values_to_log
from danon_lightning.callbacks.performance_monitor.trace import Trace, traced_steps
from danon_lightning.callbacks.pipelines import HasTimeline
from danon_lightning.callbacks.ranks import gather_numbers, replicas_of


@runtime_checkable
class HasCommunicationStats(Protocol):
    """A strategy that measures its exchange of gradients."""

    def communication_stats(self) -> Mapping[str, Any]:
        """Counts of this rank since the start of ``fit``, with ``exposed_seconds`` among them."""
        ...


class PerformanceMonitor(pl.Callback):
    """Logs where the time of a training step goes, how much is trained a second, and how much memory that takes.

    The parts of a step are ``data_wait`` (the loader has no batch ready), ``batch_transfer`` (to the device),
    ``forward``, ``backward``, ``optimizer`` (with clipping and learning-rate schedulers), ``communication`` (what the
    exchange of gradients has added to the backward pass; of strategies that tell, such as ``danon_hybrid``: with plain
    DDP it is in ``backward``), ``pipeline_wait`` (for another stage), ``callbacks``, and ``other`` (the loop itself,
    logging, waiting for rank 0 between steps). At any moment one of them goes on, so their sum is the time of the step.
    Validation and checkpoints belong to no step; what they took in a window is logged by itself.

    A step ends where the optimizer has made one, so it holds all batches whose gradients are accumulated. With
    pipelined stages, one training step holds all forward and backward passes; they are told apart in the proportions of
    the last step of each window, whose passes the strategy measures.

    On CUDA, times are those of the device's stream, taken by events that are waited for once a window: what the host
    does while the device is busy takes no time. Elsewhere they are the host's. Times and speed are means over a window
    and over all ranks, memory is that of the rank that takes most.

    Keys logged, all under ``performance/``:
        - ``step_seconds``, and ``seconds/<part>``: of one optimizer step.
        - ``samples_per_second``, ``tokens_per_second``: over all replicas, pauses not counted.
        - ``pause_seconds/validation``, ``pause_seconds/checkpoint``: in this window, if there was any.
        - ``memory/resident_gib``, ``memory/resident_peak_gib``: the resident set of the process; its peak in the window
          (on Linux: ``VmHWM``, reset each time; elsewhere since the start of the process).
        - ``memory/allocated_peak_gib``, ``memory/reserved_peak_gib``: on CUDA, in this window.

    Args:
        every_n_steps: The length of a window, in optimizer steps.
        tokens: The number of tokens in a batch; None for the number of elements of the first tensor of integers with
            two dimensions (batch × sequence).
        samples: The number of samples in a batch; None for what Lightning takes it to be.
        warm_up_steps: How many steps at the start of ``fit`` are left out: they are slower than all others.
        profile_steps: Which steps ``torch.profiler`` shall trace: ``range(20, 23)`` of the global steps, or
            ``(wait, warm_up, active)`` counted from the start of ``fit``. Every rank writes a file
            ``rank<n>.<time>.pt.trace.json`` into the logger's folder, where TensorBoard's profiler plugin
            (``pip install torch-tb-profiler``) finds it. Traced steps are not averaged.

    Raises:
        ValueError: For a value out of range; at the start of ``fit``, for ``profile_steps`` together with
            ``Trainer(profiler="pytorch")``.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        *,
        tokens: Callable[[Any], float] | None = None,
        samples: Callable[[Any], float] | None = None,
        warm_up_steps: int = 5,
        profile_steps: "range | tuple[int, int, int] | None" = None,
        _clock: Clock | None = None,
    ) -> None:
        """See the class."""
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        if warm_up_steps < 0:
            raise ValueError(f"warm_up_steps={warm_up_steps} must not be negative; 0 leaves out no step")
        self.every_n_steps, self.warm_up_steps = every_n_steps, warm_up_steps
        self.profile_steps = profile_steps
        self._traced = traced_steps(profile_steps)
        self._times = StepTimes(_clock)
        self._tokens, self._samples = Count(tokens or tokens_in), Count(samples or samples_in)
        self._writing, self._tracing = logs.Guarded("PerformanceMonitor"), logs.Guarded("PerformanceMonitor's trace")
        self._totals = RunTotals()
        self._memory: MemoryMeter | None = None
        self._trace: Trace | None = None
        self._limit = math.nan
        self._warming_up = 0
        self._measures = self._has_stages = self._is_cuda = self._has_warned = False
        self._exposed, self._ranks_per_host = 0.0, 1

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a second profiler, and lay out the charts."""
        if self.profile_steps is not None and isinstance(profiler_of(trainer), PyTorchProfiler):
            raise ValueError(
                f"profile_steps={self.profile_steps!r} cannot be used with Trainer(profiler='pytorch'): torch has only "
                "one profiler, leave out one of the two"
            )
        charts = {
            "Time of a step": ["performance/step_seconds", "performance/seconds/.*"],
            "Memory": ["performance/memory/.*"],
        }
        logs.layout(trainer, {"Performance": charts})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        device = trainer.strategy.root_device
        self._is_cuda, self._ranks_per_host = device.type == "cuda", max(1, trainer.num_devices)
        self._memory, self._limit = MemoryMeter(device), limit_of(device)
        self._warming_up = self.warm_up_steps
        self._totals = RunTotals()
        self._has_stages = isinstance(trainer.strategy, HasTimeline)
        self._times.begin(trainer, pl_module, self)
        steps, warm_up = self._traced
        if steps:
            step = logs.current_step(trainer)
            if not isinstance(self.profile_steps, range):
                steps = range(steps.start + step, steps.stop + step)
            folder = trainer.log_dir or trainer.default_root_dir  # on all ranks: the first asks the others to agree
            self._trace = Trace(steps, warm_up, folder, trainer.global_rank, device)
            with self._tracing:
                self._trace.before(step)
        self._begin_window(trainer)

    def _begin_window(self, trainer: pl.Trainer) -> None:
        self._times.begin_window()
        self._tokens.take()
        self._samples.take()
        self._exposed = self._exposed_seconds(trainer)

    def _exposed_seconds(self, trainer: pl.Trainer) -> float:
        if not isinstance(trainer.strategy, HasCommunicationStats):
            return 0.0
        return float(trainer.strategy.communication_stats().get("exposed_seconds", 0.0))

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return logs.is_due(trainer, self.every_n_steps) and ends_step(trainer)

    def reads_between_steps(self, trainer: pl.Trainer) -> bool:
        """Never looks at weights or gradients between the backward pass and the next forward pass."""
        return False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Have the passes of the last step of a window measured, if there are stages."""
        self._measures = self._has_stages and self._is_due(trainer)
        if self._measures:
            trainer.strategy.measure_pipeline()  # type: ignore[attr-defined]
            self._times.begin_batch()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log if the window is over."""
        if not self._times.is_running:
            return
        self._samples.add(batch)
        self._tokens.add(batch)
        if not ends_step(trainer):
            return
        step = logs.current_step(trainer)
        is_due = self._is_due(trainer)
        if self._measures:
            self._times.end_batch()
        self._times.settle(wait=is_due)
        self._times.steps += 1
        is_traced = self._trace is not None and self._trace.covers(step)
        is_left_out = is_traced or self._warming_up > 0
        self._warming_up = max(0, self._warming_up - 1)
        if self._trace is not None:
            with self._tracing:
                self._trace.before(step + 1)
        if not (is_due or is_left_out):
            return
        # What follows is a part of the next window.
        seconds, steps, exposed = self._times.seconds, self._times.steps, self._exposed
        samples, tokens = self._samples.take(), self._tokens.take()
        self._begin_window(trainer)
        if is_due:
            source = "forward" if getattr(trainer.strategy, "waits_in_forward", False) else "backward"
            seconds = take_out(seconds, "communication", source, self._exposed - exposed)
            counts = (0.0, 0.0, 0.0) if is_left_out else (steps, samples, tokens)
            self._log(trainer, step, {} if is_left_out else seconds, counts)

    def _log(
        self, trainer: pl.Trainer, step: int, seconds: dict[str, float], counts: tuple[float, float, float]
    ) -> None:
        """Collective."""
        assert self._memory is not None
        if self._measures:
            ranks = trainer.strategy.pipeline_timeline()  # type: ignore[attr-defined]
            own = ranks[trainer.strategy.mesh.pipeline_rank]  # type: ignore[attr-defined]
            seconds = split_training_step(seconds, self._times.batch, own)
        use = self._memory.read()
        window = RankWindow(
            *counts,
            use.resident,
            use.resident_peak,
            use.allocated_peak,
            use.reserved_peak,
            self._limit,
        )
        rows = gather_numbers(trainer, window.row(seconds))
        replicas = replicas_of(trainer)
        self._totals.add(rows, replicas)
        with self._writing:
            self._warn_of_uncounted()
            logs.scalars(trainer, values_to_log(rows, replicas), step)

    def _warn_of_uncounted(self) -> None:
        for name, count in (("samples", self._samples), ("tokens", self._tokens)):
            if count.error is not None and not self._has_warned:
                self._has_warned = True
                rank_zero_warn(
                    f"PerformanceMonitor cannot count the {name} of a batch ({type(count.error).__name__}: "
                    f"{count.error}): {name} per second are not logged. PerformanceMonitor({name}=lambda batch: …) "
                    "tells it how"
                )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the Trainer."""
        self._end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the Trainer."""
        self._end(failed=True)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the Trainer."""
        self._end(failed=True)

    def _end(self, *, failed: bool = False) -> None:
        self._times.end()
        trace, self._trace = self._trace, None
        if trace is not None:
            with self._tracing:
                trace.end(failed=failed)

    def findings(self) -> Sequence[Finding]:
        """Where time was lost in all windows that were logged, and whether memory is short."""
        return self._totals.findings(
            cuda=self._is_cuda, ranks_per_host=self._ranks_per_host, warm_up=self.warm_up_steps
        )
