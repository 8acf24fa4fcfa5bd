"""Draws what the ranks of a pipeline do in a training step, as it was measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from typing_extensions import override

from danon_lightning.callbacks.pipelines import HasTimeline, Pass

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    "forward": "#4477aa",
    "backward": "#228833",
    "weights": "#66ccee",
    "communication": "#ee6677",
    "waiting": "#eecc66",
}
_COMPUTE = ("forward", "backward", "weights")


class PipelineTimeline(pl.Callback):
    """Measures every n-th training step of a pipeline, and draws it: ranks × time.

    Forward and backward passes carry the number of their micro-batch. Between them a rank waits for what another one
    has not computed yet, or for what is on its way (communication); what is blank is neither. The picture goes to every
    logger that takes figures (TensorBoard), and to a file if one is named. Needs matplotlib.

    Keys logged:
        ``pipeline/timeline`` (figure).

    Args:
        every_n_steps: How often. The first picture is of step ``every_n_steps − 1``: the very first is slower than all
            others.
        path: A PNG file, written anew each time.

    Raises:
        ValueError: If ``every_n_steps`` is not positive.
        TypeError: At the start of ``fit``, if the strategy has no pipeline stages.
    """

    def __init__(self, every_n_steps: int = 100, path: str | Path | None = None) -> None:
        """See the class."""
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps, self.path = every_n_steps, path
        self._measuring = False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a strategy without stages."""
        import matplotlib  # noqa: F401  # rather now than at the end of the first step

        if not isinstance(trainer.strategy, HasTimeline):
            raise TypeError(
                f"PipelineTimeline needs pipeline stages, {type(trainer.strategy).__name__} has none: leave it out, or "
                "train with strategy=DanonHybridStrategy(pipeline_parallel_size=2)"
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Have the step measured."""
        self._measuring = (trainer.global_step + 1) % self.every_n_steps == 0
        if self._measuring:
            trainer.strategy.measure_pipeline()  # type: ignore[attr-defined]

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw it."""
        if not self._measuring:
            return
        ranks = trainer.strategy.pipeline_timeline()  # type: ignore[attr-defined]  # on all ranks
        if not trainer.is_global_zero:
            return
        figure = draw_timeline(ranks, f"step {trainer.global_step}")
        if self.path is not None:
            figure.savefig(self.path, dpi=150)
        for logger in trainer.loggers:
            writer: Any = getattr(logger, "experiment", None)
            if hasattr(writer, "add_figure"):
                writer.add_figure("pipeline/timeline", figure, trainer.global_step)


def draw_timeline(ranks: Sequence[Sequence[Pass]], title: str = "") -> "Figure":
    """A row for each rank of a pipeline, time to the right.

    Args:
        ranks: What each has done, in the order of time.
        title: Above the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 1.2 + 0.7 * len(ranks)), layout="constrained")
    axes = figure.add_subplot()
    end = max((one.end for passes in ranks for one in passes), default=0.0)
    stages = 1 + max((one.stage for passes in ranks for one in passes), default=0)
    several = stages > len(ranks)
    for row, passes in enumerate(ranks):
        for one in passes:
            start, length = one.start * 1e3, (one.end - one.start) * 1e3
            computes = one.kind in _COMPUTE
            edge = {"edgecolor": "white", "linewidth": 0.5} if computes else {"linewidth": 0}
            axes.broken_barh([(start, length)], (row - 0.4, 0.8), facecolor=_COLOURS[one.kind], **edge)
            if computes and length > 0.012 * end * 1e3:
                label = f"{one.micro_batch}" + (f"\ns{one.stage}" if several else "")
                axes.text(start + length / 2, row, label, ha="center", va="center", color="white", fontsize=7)
    axes.set_yticks(range(len(ranks)), [f"rank {row}" for row in range(len(ranks))])
    axes.invert_yaxis()
    axes.set_xlim(0, end * 1e3 or 1)
    axes.set_xlabel("milliseconds")
    axes.set_title(title)
    shown = {one.kind for passes in ranks for one in passes}
    names = {"weights": "gradients of weights", "waiting": "waiting for another rank"}
    handles = [Patch(color=colour, label=names.get(kind, kind)) for kind, colour in _COLOURS.items() if kind in shown]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=5, frameon=False)
    return figure
