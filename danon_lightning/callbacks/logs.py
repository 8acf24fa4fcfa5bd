"""Writing to whatever loggers a Trainer has, without ever ending a run because of it.

All functions write on rank 0 only and are no collective operations. A logger that cannot take something (a CSV file has
no room for a figure) is passed over. If one logger fails the others are served first, then its error is raised: call
them inside of a :class:`Guarded`, where an error becomes one warning.
"""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from matplotlib.figure import Figure

# Category → title of a chart → regular expressions of the tags that it shows.
Layout = Mapping[str, Mapping[str, Sequence[str]]]

# TensorBoard takes one layout a run, so what several callbacks ask for is put together.
_layouts: "WeakKeyDictionary[pl.Trainer, dict[str, dict[str, list[str]]]]" = WeakKeyDictionary()
_unwritten: "WeakKeyDictionary[pl.Trainer, bool]" = WeakKeyDictionary()


class Guarded:
    """A context in which a monitor writes: whatever fails there is warned of once, and training goes on.

    Keep one for the life of the monitor: ``with self._writing: logs.scalars(…)``. Later failures are silent, but are
    tried: a full disk may have been cleared. Nothing collective belongs in it, since other ranks would wait for a rank
    that has left early. ``KeyboardInterrupt`` and the like pass.

    Args:
        name: Who writes, for the warning: the name of the callback.
        doing: What it could not do, for the warning.

    Attributes:
        failures: How many blocks have ended with an error.
    """

    def __init__(self, name: str, doing: str = "write what it has measured") -> None:
        """See the class."""
        self.name, self.doing = name, doing
        self.failures = 0

    def __enter__(self) -> "Guarded":
        """Nothing to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Swallow an error, with a warning if it is the first."""
        if not isinstance(error, Exception):
            return False
        self.failures += 1
        if self.failures == 1:
            text = (
                f"{self.name} could not {self.doing} ({type(error).__name__}: {error}): training goes on, later "
                "failures of this kind are not mentioned"
            )
            try:
                rank_zero_warn(text, stacklevel=4)
            except Warning:  # warnings have been made errors: not a reason to end a run either
                pass
        return True


def current_step(trainer: pl.Trainer) -> int:
    """Where a value belongs on the horizontal axis, so that it lies above those of ``self.log``.

    It is the number of batches before this one after which an optimizer has made a step: the same for all batches whose
    gradients are accumulated, and counted once for several optimizers.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_due(trainer: pl.Trainer, every_n_steps: int) -> bool:
    """Whether the present step is one to be logged, by the rule of ``Trainer(log_every_n_steps=…)``. In agreement."""
    return (current_step(trainer) + 1) % every_n_steps == 0


def scalars(trainer: pl.Trainer, values: Mapping[str, float], step: int) -> None:
    """Write numbers to every logger.

    Args:
        trainer: Whose loggers.
        values: By tag, as plain numbers: tensors on a device would be read one by one.
        step: As from :func:`current_step`.
    """
    if not values:
        return
    _write_layout(trainer)
    _each(trainer, lambda logger: logger.log_metrics(dict(values), step=step))


def figure(trainer: pl.Trainer, tag: str, figure: "Figure", step: int) -> None:
    """Write a figure of matplotlib, to loggers that take figures (TensorBoard) or images (Weights & Biases)."""

    def write(logger: "Logger") -> None:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_figure"):
            experiment.add_figure(tag, figure, step, close=False)
        elif hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[_pixels(figure)], step=step)

    _each(trainer, write)


def text(trainer: pl.Trainer, tag: str, markdown: str, step: int) -> None:
    """Write Markdown, to loggers that take text (TensorBoard, Weights & Biases)."""

    def write(logger: "Logger") -> None:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_text"):
            experiment.add_text(tag, markdown, step)
        elif hasattr(logger, "log_text"):
            logger.log_text(key=tag, columns=["text"], data=[[markdown]], step=step)

    _each(trainer, write)


def histogram(trainer: pl.Trainer, tag: str, values: Tensor, step: int) -> None:
    """Write how values are spread, to loggers that take histograms (TensorBoard). What is not finite is left out.

    All values travel to the host: meant for now and then.
    """
    if not trainer.is_global_zero:
        return
    values = values.detach().flatten().to("cpu", torch.float32)
    values = values[values.isfinite()]
    if not values.numel():
        return

    def write(logger: "Logger") -> None:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_histogram"):
            experiment.add_histogram(tag, values, step)

    _each(trainer, write)


def layout(trainer: pl.Trainer, charts: Layout) -> None:
    """Have TensorBoard draw several tags in one chart, on its page of custom scalars.

    Call it in ``on_fit_start``; it is written with the next :func:`scalars`, together with what others have asked for.

    Args:
        trainer: Whose loggers.
        charts: ``{"Gradients": {"norm": ["grad/norm/.*"]}}``: category, title, regular expressions of tags.
    """
    known = _layouts.setdefault(trainer, {})
    for category, titles in charts.items():
        known.setdefault(category, {}).update({title: list(tags) for title, tags in titles.items()})
    _unwritten[trainer] = True


def _write_layout(trainer: pl.Trainer) -> None:
    if not _unwritten.pop(trainer, False):
        return
    charts = {
        category: {title: ["Multiline", tags] for title, tags in titles.items()}
        for category, titles in _layouts[trainer].items()
    }

    def write(logger: "Logger") -> None:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_custom_scalars"):
            experiment.add_custom_scalars(charts)

    _each(trainer, write)


def _each(trainer: pl.Trainer, write: "Callable[[Logger], None]") -> None:
    """Serve all loggers before the first error is raised."""
    if not trainer.is_global_zero:
        return
    failed: Exception | None = None
    for logger in trainer.loggers:
        try:
            write(logger)
        except Exception as error:  # a logger may raise anything
            failed = failed or error
    if failed is not None:
        raise failed


def _pixels(figure: "Figure") -> Any:
    """A figure as an array [height, width, 4] of bytes."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
