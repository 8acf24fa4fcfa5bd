"""The callback: when to measure, and where to write it."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from danon_lightning.callbacks import logs
from danon_lightning.callbacks.gradient_monitor import findings, tags
from danon_lightning.callbacks.gradient_monitor.arguments import check_arguments
from danon_lightning.callbacks.gradient_monitor.facts import loss_scale, loss_scaler, may_clip, samples_of
from danon_lightning.callbacks.gradient_monitor.figures import heat_map, norm_plot
from danon_lightning.callbacks.gradient_monitor.histograms import write_histograms
from danon_lightning.callbacks.gradient_monitor.history import History
from danon_lightning.callbacks.gradient_monitor.local_norms import LocalNorms
from danon_lightning.callbacks.gradient_monitor.measurement import Measured, Row, StepMeasurement
from danon_lightning.callbacks.gradient_monitor.noise import NoiseScale
from danon_lightning.callbacks.gradient_monitor.pieces import pieces_of
from danon_lightning.callbacks.gradient_monitor.placement import Placement, check_strategy
from danon_lightning.callbacks.health.finding import Finding


@runtime_checkable
class _HasStats(Protocol):
    def communication_stats(self) -> Mapping[str, Any]: ...


@runtime_checkable
class _HasStaleness(Protocol):
    def parameter_staleness(self) -> float: ...


class GradientMonitor(pl.Callback):
    """Measures the gradients of every n-th step: how large, how noisy, and what the optimizer makes of them.

    Works with any LightningModule on a single device, with DDP, with ``danon_hybrid`` and with its pipelines; with any
    logger, though only TensorBoard gets the layout. A layer is a module with parameters of its own. All values are of
    the whole model, whatever the ranks hold; what stages share counts once.

    A logged step costs one operation over all gradients for each statistic, for local gradients one more a parameter
    and backward pass, one all-reduce of nine numbers a layer, and one read by the host (one more for a compressor's
    residual). Other steps cost nothing.

    Keys logged:
        ``grad/total/norm``, ``grad/total/clipped_norm``: 2-norm of the gradient that the optimizer was given, averaged
        over replicas, and unscaled, before and after clipping.
        ``grad/total/update_ratio``: norm of what the step has added to the weights, divided by theirs.
        ``grad/total/zeros``, ``grad/total/nonfinite``: share of elements.
        ``grad/norm/<layer>``, ``grad/clipped_norm/<layer>``, ``grad/update_ratio/<layer>``, ``grad/zeros/<layer>``: of
        the ``top_k`` layers; ``grad/nonfinite/<layer>`` of each layer that has any.
        ``grad/stage/<number>``: norm of a pipeline stage.
        ``grad/cosine/between_ranks``: mean of gᵢ · gⱼ over all pairs of replicas, divided by the mean of |gᵢ|², where
        gᵢ are the gradients before they are averaged. With several backward passes a step (``accumulate_grad_batches``,
        or the micro-batches of a pipeline) ``grad/cosine/between_micro_batches``: the same over all pairs of these.
        ``grad/noise/scale``, ``grad/noise/scale_to_batch``: gradient noise scale, in samples and divided by the batch.
        A batch far below it averages too little, one far above wastes samples.
        ``grad/compression/residual_norm``: norm of what compression owes to later steps, the root of its mean square
        over replicas; ``grad/compression/residual_to_gradient``: divided by that of the gradient.
        ``grad/compression/skipped_steps``, ``grad/scaler/skipped_steps``, ``grad/scaler/scale``: steps without an
        update since the start, and the factor of the loss in 16-bit training.
        ``grad/heat_map`` (figure): norms, layers × steps. ``grad/histogram/<layer>`` (histogram), if asked for.

    Not known, and left out: cosine and noise scale with a single device and no accumulation (there is nothing to
    compare), where error feedback adds residuals of earlier steps to the gradient, and where replicas do not average
    the gradients of a step in this step (``sync_mode`` "async" or "periodic"; norms of replicas that differ are the
    root of their mean square); parameters that several stages
    share (tied embeddings) do not enter these two. They rest on losses being means over samples, micro-batches being
    equally large and their gradients being independent. In manual optimization they are known between ranks only, and
    gradients are measured when ``optimizer.step()`` is called: after clipping by hand.

    Args:
        every_n_steps: How often, in steps of the optimizer.
        include: Patterns of names of parameters, as for files (``"model.layers.*"``): only these are watched. Totals
            are of what is watched.
        exclude: And none of these.
        top_k: How many layers have charts of their own; None for all, 0 for none. The heat map shows all.
        top_by: By which running average the first are chosen: ``"norm"`` or ``"update_ratio"``.
        update_ratio: Whether to compare the weights before and after a step. Takes the memory of one more copy of the
            watched weights, during the optimizer's step, on logged steps only.
        local: Whether to look at gradients before they are averaged: for cosine and noise scale.
        noise_decay: Weight of earlier steps in the averages of which the noise scale is made, for each logged step.
        heat_map: Whether to draw it; "auto" if matplotlib is installed.
        plot_path: A PNG file for a plot of norms on a logarithmic scale; None for none. Needs matplotlib.
        draw_every_n_steps: How often the heat map and the plot are made anew; they are at the end of training too.
        histogram_every_n_steps: How often histograms of all layers are written; None for never. Costly: gradients
            travel to the host. Of rank 0, so of its stages only.

    Raises:
        ValueError: For an argument out of range; at the start of ``fit``, if no parameter is watched.
        ModuleNotFoundError: If a picture is asked for without matplotlib.
        TypeError: At the start of ``fit``, with a strategy that shards gradients (FSDP, DeepSpeed).

    Reference:
        McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.1.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        top_k: int | None = 10,
        top_by: Literal["norm", "update_ratio"] = "norm",
        update_ratio: bool = True,
        local: bool = True,
        noise_decay: float = 0.95,
        heat_map: bool | Literal["auto"] = "auto",
        plot_path: str | Path | None = None,
        draw_every_n_steps: int = 500,
        histogram_every_n_steps: int | None = None,
    ) -> None:
        """See the class."""
        check_arguments(
            every_n_steps=every_n_steps,
            draw_every_n_steps=draw_every_n_steps,
            histogram_every_n_steps=histogram_every_n_steps,
            include=include,
            exclude=exclude,
            top_k=top_k,
            top_by=top_by,
            update_ratio=update_ratio,
            noise_decay=noise_decay,
        )
        can_draw = find_spec("matplotlib") is not None
        if not can_draw and (heat_map is True or plot_path is not None):
            wanted = "heat_map=True" if heat_map is True else f"plot_path={str(plot_path)!r}"
            raise ModuleNotFoundError(f"{wanted} needs matplotlib: pip install matplotlib, or leave it out")
        self.every_n_steps, self.draw_every_n_steps = every_n_steps, draw_every_n_steps
        self.histogram_every_n_steps = histogram_every_n_steps
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.top_by, self.update_ratio, self.local = top_by, update_ratio, local
        self.heat_map = can_draw if heat_map == "auto" else heat_map
        self.plot_path = plot_path
        self.noise = NoiseScale(noise_decay)
        self.history = History()
        self.skipped_steps = 0
        self._leaders = tags.Leaders(top_k)
        self._current: StepMeasurement | None = None
        self._handles: list[RemovableHandle] = []
        self._attempted = self._made = self._drawn = 0
        self._said = False
        self._measuring = logs.Guarded("GradientMonitor", "measure gradients")
        self._writing = logs.Guarded("GradientMonitor")

    # ---- start and end

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot be watched, and ask for charts."""
        check_strategy(trainer)
        if not self._placement(trainer, pl_module).layers:
            names = [name for name, _ in pl_module.named_parameters()]
            raise ValueError(
                f"no parameter matches include={list(self.include)} but not exclude={list(self.exclude)}: names are "
                f"such as {names[0]!r}"
                if names
                else "GradientMonitor has nothing to watch: the module has no parameters"
            )
        logs.layout(trainer, tags.LAYOUT)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the optimizers' steps."""
        self._remove()
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the whole run."""
        self._remove()
        self._draw(trainer, logs.current_step(trainer))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._remove()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._current is not None:
            self._current.drop()
            self._current = None

    # ---- a step

    def reads_between_steps(self, trainer: pl.Trainer) -> bool:
        """Looks at weights and gradients of the steps that are logged."""
        return self._current is not None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to watch, if the step that this batch belongs to is one to be logged."""
        step = logs.current_step(trainer)
        if self._current is not None and self._current.step != step:
            self._current.drop()
            self._current = None
        if not logs.is_due(trainer, self.every_n_steps):
            return
        if self._current is None:
            self._current = self._begin(trainer, pl_module, step)
        self._current.samples += samples_of(batch)

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> StepMeasurement:
        placement = self._placement(trainer, module)
        device, clips = trainer.strategy.root_device, may_clip(trainer, module)
        current = StepMeasurement(step, placement, device, self._measuring, clips=clips)
        several = placement.replicas > 1 or placement.stages or trainer.accumulate_grad_batches > 1
        if self.local and several:
            with current.guarded():
                current.local = LocalNorms(
                    [
                        (name, placement.places[name].layer, parameter)
                        for name, parameter in module.named_parameters()
                        if name in placement.places and parameter.requires_grad and placement.places[name].is_whole
                    ],
                    current.guarded,
                )
        elif self.local and not self._said:
            self._said = True
            rank_zero_info(
                "GradientMonitor: no gradient noise scale and no cosine, for there is only one gradient a step: they "
                "need two ranks, or accumulate_grad_batches=2"
            )
        return current

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the gradients: averaged and unscaled, but not clipped."""
        self._attempted += 1
        current = self._current
        if current is None:
            return
        with current.guarded():
            # Who holds what may have been settled only in this step.
            current.placement = self._placement(trainer, pl_module)
            current.loss_scale = loss_scale(trainer)
            current.stale |= _is_stale(trainer)
            current.before_step(optimizer, pl_module.named_parameters(), updates=self.update_ratio)
        every = self.histogram_every_n_steps
        if every is not None and trainer.is_global_zero and (current.step + 1) % every < self.every_n_steps:
            with self._writing:
                write_histograms(trainer, pl_module, optimizer, current.placement, current.step)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Look at weights, and at clipped gradients."""
        self._made += 1
        if self._current is not None:
            with self._current.guarded(), torch.no_grad():
                self._current.after_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up over ranks, read, and write."""
        if loss_scaler(trainer) is not None:
            self.skipped_steps += self._attempted - self._made
        self._attempted = self._made = 0
        current = self._current
        if current is None or trainer.fit_loop._should_accumulate():
            return
        self._current = None
        stats: Mapping[str, Any] = {}
        with current.guarded():
            if isinstance(trainer.strategy, _HasStats):
                stats = trainer.strategy.communication_stats()
            current.stale |= _is_stale(trainer)
        measured = current.finish(float(stats.get("residual_norm", 0.0)), trainer.world_size)
        values: dict[str, float] = {}
        with self._measuring:
            values = self._digest(trainer, measured)
        if stats.get("compression_ratio", 1.0) != 1.0:
            values["grad/compression/skipped_steps"] = float(stats.get("skipped_steps", 0))
        with self._writing:
            logs.scalars(trainer, values, measured.step)
        if (measured.step + 1) % self.draw_every_n_steps < self.every_n_steps:
            self._draw(trainer, measured.step)

    def _digest(self, trainer: pl.Trainer, measured: Measured) -> dict[str, float]:
        """Remember a step, and say it in tags."""
        values: dict[str, float] = {}
        if measured.active.any():
            if self.history.layers != measured.placement.layers:
                self.history, self._drawn = History(measured.placement.layers), 0
            self.history.add(measured)
            pieces = pieces_of(measured, trainer.accumulate_grad_batches)
            if pieces is not None:
                self.noise.update(pieces)
            ranked = measured.ratios() if self.top_by == "update_ratio" else measured.norms(Row.SQUARE)
            charted = self._leaders.update(tags.by_layer(measured, ranked))
            values |= tags.total_tags(measured) | tags.layer_tags(measured, charted)
            values |= tags.noise_tags(pieces, self.noise) | tags.exchange_tags(measured)
        if loss_scaler(trainer) is not None and isfinite(measured.loss_scale):
            values["grad/scaler/skipped_steps"] = float(self.skipped_steps)
            values["grad/scaler/scale"] = measured.loss_scale
        return values

    def _placement(self, trainer: pl.Trainer, module: pl.LightningModule) -> Placement:
        return Placement.find(trainer, module, self.include, self.exclude)

    # ---- pictures

    def _draw(self, trainer: pl.Trainer, step: int) -> None:
        if not trainer.is_global_zero or self._drawn == self.history.logged:
            return
        self._drawn = self.history.logged
        if self.heat_map and trainer.loggers:
            with self._writing:
                logs.figure(trainer, "grad/heat_map", heat_map(self.history), step)
        if self.plot_path is not None:
            with self._writing:
                Path(self.plot_path).parent.mkdir(parents=True, exist_ok=True)
                norm_plot(self.history).savefig(self.plot_path, dpi=150)

    # ---- what is kept

    @override
    def state_dict(self) -> dict[str, Any]:
        """The averages of the noise scale, and the count of skipped steps. The heat map begins anew."""
        return {"noise": self.noise.state_dict(), "skipped_steps": self.skipped_steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.noise.load_state_dict(state_dict["noise"])
        self.skipped_steps = state_dict["skipped_steps"]

    def findings(self) -> list[Finding]:
        """What the gradients of the run say about it, most important first. Not collective."""
        return findings.find(self.history, self.noise, self.skipped_steps)


def _is_stale(trainer: pl.Trainer) -> bool:
    """Whether the gradient is not the mean of what the replicas have found in this step."""
    return isinstance(trainer.strategy, _HasStaleness) and trainer.strategy.parameter_staleness() > 0
