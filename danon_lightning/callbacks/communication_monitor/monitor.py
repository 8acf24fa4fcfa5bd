"""Says what communication costs, and what it sends."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from danon_lightning.callbacks import logs
from danon_lightning.callbacks.communication_monitor.bubble import Bubble, bubble_of
from danon_lightning.callbacks.communication_monitor.exchange import Exchange, ExchangeMeter
from danon_lightning.callbacks.communication_monitor.gradient_norm import (
    global_norm,
    has_whole_gradients,
    squared_norms,
)
from danon_lightning.callbacks.communication_monitor.summary import (
    METRICS,
    RankWindow,
    RunTotals,
    Window,
    over_ranks,
    values_to_log,
)
from danon_lightning.callbacks.health import Finding
from danon_lightning.callbacks.performance_monitor.clocks import Clock
from danon_lightning.callbacks.performance_monitor.pipeline_share import split_training_step
from danon_lightning.callbacks.performance_monitor.step_times import StepTimes, ends_step, in_steps
from danon_lightning.callbacks.pipelines import HasTimeline
from danon_lightning.callbacks.ranks import gather_numbers


@runtime_checkable
class HasStaleness(Protocol):
    """A strategy that may compute gradients with parameters that are behind."""

    def parameter_staleness(self) -> float:
        """By how many optimizer steps the parameters of this rank are behind those of all ranks together."""
        ...


@runtime_checkable
class HasCompressionDecisions(Protocol):
    """A strategy that chooses by itself what gradients are compressed with."""

    def compression_decisions(self) -> Sequence[tuple[int, str, str]]:
        """After how many exchanges it has decided, what, and why."""
        ...


class CommunicationMonitor(pl.Callback):
    """Logs what ranks send each other, what that adds to a step, and how evenly they are loaded.

    A strategy with ``communication_stats()`` (``danon_hybrid``) tells all of it. With plain DDP, torch measures one
    step in each window: what the exchange has added, and how much of it was hidden. How many bytes were sent is known
    to neither, and is left out, and so is bandwidth. Of other strategies, only what can be measured from outside is
    logged. With pipeline stages, what stages wait for while activations and gradients travel is communication too, in
    the proportions of the last step of a window, whose passes the strategy measures; the bytes are those of the
    exchange of gradients alone.

    Keys logged, all under ``communication/``; times and bytes are those of one optimizer step, averaged over a window:
        - ``exposed_seconds``, ``hidden_seconds``: what communication has added to the step, and for how long it went
          on beside computing. Means over ranks.
        - ``computation_seconds``: forward and backward passes, without what communication has added.
        - ``synchronization_overhead``: ``exposed_seconds`` as a share of the step.
        - ``inter_node_bytes``, ``intra_node_bytes``: that left a node, and that its ranks sent each other. Payload,
          without the transport's headers; means over nodes.
        - ``dense_bytes``: of the gradients themselves, uncompressed; ``inter_node_bytes_over_dense``: the ratio of
          these. ``compression_ratio``: what the same exchange would have sent over the compressed level dense, over
          what it has sent there, since the start of ``fit``.
        - ``bandwidth_mbit_per_second``: what a node has sent to others (with one node, its ranks to each other), over
          the time for which the exchange was at work; ``bandwidth_utilization``: as a share of the link's.
        - ``load_balance_score``: mean over ranks of the time they compute, divided by the longest: 1 is even.
        - ``parameter_staleness``: by how many steps parameters are behind; 0 where ranks exchange gradients in each
          step, as all strategies do that do not say otherwise.
        - ``skipped_steps``: in this window, since gradients were not finite. ``residual_norm``: of what compression
          has left out so far, the mean over ranks.
        - ``gradient_norm``: 2-norm of all gradients before they are clipped, at the last step of the window.
        - ``pipeline_bubble``, ``pipeline_bubble_ideal``: which share of ranks × time the stages were idle in the
          measured step, and which share would be left if all passes took equally long and transfers took no time.

        - ``compression``: a text, to loggers that take text: what the strategy has decided about compression, and why.

    Args:
        every_n_steps: The length of a window, in optimizer steps.
        link_bandwidth: Of a node's link to other nodes, in bits/s (1e9 for 1 Gbit/s). None to compare with the best
            window so far instead: then ``bandwidth_utilization`` is 1 in the first window, and says only whether the
            link is used as well as it once was.
        pipeline_every_n_logs: How often stages are measured, in windows. In between, the last proportions hold.
        warm_up_steps: How many steps at the start of ``fit`` are left out: they are slower than all others.

    Raises:
        ValueError: For a value out of range.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        *,
        link_bandwidth: float | None = None,
        pipeline_every_n_logs: int = 1,
        warm_up_steps: int = 5,
        _clock: Clock | None = None,
    ) -> None:
        """See the class."""
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        if pipeline_every_n_logs < 1:
            raise ValueError(f"pipeline_every_n_logs={pipeline_every_n_logs} must be at least 1")
        if warm_up_steps < 0:
            raise ValueError(f"warm_up_steps={warm_up_steps} must not be negative; 0 leaves out no step")
        if link_bandwidth is not None and not 0 < link_bandwidth < math.inf:
            raise ValueError(
                f"link_bandwidth={link_bandwidth} must be a positive number of bits/s (1e9 for 1 Gbit/s), or None"
            )
        self.every_n_steps, self.link_bandwidth = every_n_steps, link_bandwidth
        self.pipeline_every_n_logs, self.warm_up_steps = pipeline_every_n_logs, warm_up_steps
        self._times = StepTimes(_clock)
        self._writing = logs.Guarded("CommunicationMonitor")
        self._totals = RunTotals()
        self._exchange: ExchangeMeter | None = None
        self._squares: Tensor | None = None
        self._measured: tuple[dict[str, float], Sequence[Any]] | None = None
        self._measures = self._has_stages = False
        self._warming_up = 0
        self._ranks = 1
        self._best_bandwidth = 0.0
        self._last_decision = 0
        self._metrics = dict.fromkeys(METRICS, math.nan)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay out the charts."""
        charts = {
            "Time": ["communication/.*_seconds"],
            "Bytes a step": ["communication/.*_bytes"],
            "Pipeline bubble": ["communication/pipeline_bubble.*"],
        }
        logs.layout(trainer, {"Communication": charts})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting."""
        self._ranks, self._warming_up = trainer.world_size, self.warm_up_steps
        self._exchange = ExchangeMeter(trainer, self.every_n_steps)
        self._measured = self._squares = None
        strategy = trainer.strategy
        before = strategy.compression_decisions() if isinstance(strategy, HasCompressionDecisions) else ()
        self._last_decision = max((step for step, _, _ in before), default=0)  # what a checkpoint tells was logged then
        self._totals = RunTotals()
        self._has_stages = isinstance(trainer.strategy, HasTimeline)
        self._times.begin(trainer, pl_module, self)
        self._exchange.take(0)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return logs.is_due(trainer, self.every_n_steps) and ends_step(trainer)

    def reads_between_steps(self, trainer: pl.Trainer) -> bool:
        """Looks at gradients where a window ends."""
        return self._is_due(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Have the passes of the last step of a window measured, if there are stages."""
        window = (logs.current_step(trainer) + 1) // self.every_n_steps
        self._measures = (
            self._has_stages
            and self._is_due(trainer)
            and (self._measured is None or window % self.pipeline_every_n_logs == 0)
        )
        if self._measures:
            trainer.strategy.measure_pipeline()  # type: ignore[attr-defined]
            self._times.begin_batch()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the norms of gradients, if they are to be logged."""
        if not self._is_due(trainer) or not has_whole_gradients(trainer):
            return
        self._squares = None
        with self._writing:
            self._squares = squared_norms(list(pl_module.parameters()))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, and log if the window is over."""
        self._log_decisions(trainer)
        if not self._times.is_running or not ends_step(trainer):
            return
        assert self._exchange is not None
        is_due = self._is_due(trainer)
        if self._measures:
            self._times.end_batch()
        self._times.settle(wait=is_due)
        self._times.steps += 1
        is_left_out = self._warming_up > 0
        self._warming_up = max(0, self._warming_up - 1)
        if not (is_due or is_left_out):
            return
        # What follows is a part of the next window.
        seconds, steps = self._times.seconds, self._times.steps
        exchange = self._exchange.take(steps)
        self._times.begin_window()
        if is_due:
            self._log(trainer, pl_module, seconds, 0 if is_left_out else steps, exchange)

    def _log_decisions(self, trainer: pl.Trainer) -> None:
        """Write down what the strategy has decided about compression, once each."""
        if not isinstance(trainer.strategy, HasCompressionDecisions):
            return
        for step, name, sentence in trainer.strategy.compression_decisions():
            if step > self._last_decision:
                self._last_decision = step
                with self._writing:
                    tag = "communication/compression"
                    logs.text(trainer, tag, f"step {step}, **{name}**: {sentence}", logs.current_step(trainer))

    def _log(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        seconds: dict[str, float],
        steps: int,
        exchange: Exchange,
    ) -> None:
        """Collective."""
        strategy: Any = trainer.strategy
        bubble: Bubble | None = None
        if self._measures:
            ranks = strategy.pipeline_timeline()
            self._measured = self._times.batch, ranks[strategy.mesh.pipeline_rank]
            bubble = bubble_of(ranks)
        squares, self._squares = self._squares, None
        if squares is None:
            squares = torch.full((sum(1 for _ in module.parameters()),), math.nan, device=strategy.root_device)
        norm = global_norm(trainer, squares)
        rows = gather_numbers(trainer, self._own(trainer, seconds, steps, exchange, bubble).row())
        if not steps:
            return
        nodes = max(1, trainer.num_nodes)
        window = over_ranks(rows, nodes)
        self._totals.add(window, steps)
        utilization = self._utilization(window)
        self._metrics = {
            "communication_time": window.communication_seconds,
            "computation_time": window.computation_seconds,
            "synchronization_overhead": window.exposed_share,
            "bandwidth_utilization": utilization,
            "load_balance_score": window.load_balance,
            "gradient_norm": norm,
            "parameter_staleness": window.staleness,
        }
        with self._writing:
            logs.scalars(trainer, values_to_log(window, utilization, norm, nodes), logs.current_step(trainer))

    def _own(
        self, trainer: pl.Trainer, seconds: dict[str, float], steps: int, exchange: Exchange, bubble: Bubble | None
    ) -> RankWindow:
        """What this rank has measured."""
        whole = sum(in_steps(seconds).values())
        if self._measured is not None:
            # One training step holds both passes; what follows it is communication.
            seconds = split_training_step({"forward": seconds.get("forward", 0.0)}, *self._measured)
        exposed, travelling = exchange.exposed_seconds, seconds.get("communication", 0.0)
        compute = seconds.get("forward", 0.0) + seconds.get("backward", 0.0)
        if self._measured is None:
            compute = max(compute - exposed, 0.0)  # unknown if that is
        staleness = trainer.strategy.parameter_staleness() if isinstance(trainer.strategy, HasStaleness) else 0.0
        return RankWindow(
            steps=steps,
            step_seconds=whole,
            compute_seconds=compute,
            exposed_seconds=exposed + travelling,
            hidden_seconds=exchange.hidden_seconds,
            inter_node_bytes=exchange.inter_node_bytes,
            intra_node_bytes=exchange.intra_node_bytes,
            dense_bytes=exchange.dense_bytes,
            skipped_steps=exchange.skipped_steps,
            residual_norm=exchange.residual_norm,
            compression_ratio=exchange.compression_ratio,
            staleness=float(staleness),
            bubble=bubble.measured if bubble else math.nan,
            ideal_bubble=bubble.ideal if bubble else math.nan,
        )

    def _utilization(self, window: Window) -> float:
        if math.isnan(window.bandwidth):
            return math.nan
        self._best_bandwidth = max(self._best_bandwidth, window.bandwidth)
        return window.bandwidth / (self.link_bandwidth or self._best_bandwidth)

    def get_performance_metrics(self) -> dict[str, float]:
        """What was measured in the last window, over all ranks. Not collective, and the same on every rank.

        Returns:
            NaN for what the strategy does not tell, and before the first window is over:

            - ``communication_time``: Seconds of communication in a step, hidden or not.
            - ``computation_time``: Seconds of forward and backward passes in a step, the mean over ranks.
            - ``synchronization_overhead``: Share of a step that communication has added.
            - ``bandwidth_utilization``: Achieved bandwidth over ``link_bandwidth``, or over the best window so far; NaN
              if nothing was sent.
            - ``load_balance_score``: Mean time that ranks compute over the longest, in (0, 1].
            - ``gradient_norm``: 2-norm of all gradients before they are clipped, at the window's last step.
            - ``parameter_staleness``: By how many steps parameters are behind.
        """
        return dict(self._metrics)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the Trainer."""
        self._end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the Trainer."""
        self._end()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the Trainer."""
        self._end()

    def _end(self) -> None:
        self._times.end()
        self._exchange = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """The best bandwidth so far, which others are compared with."""
        return {"best_bandwidth": self._best_bandwidth}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._best_bandwidth = float(state_dict["best_bandwidth"])

    def findings(self) -> Sequence[Finding]:
        """What communication has cost over all windows that were logged, and how evenly ranks were loaded."""
        return self._totals.findings(ranks=self._ranks)
