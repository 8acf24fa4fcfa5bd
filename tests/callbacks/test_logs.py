"""Writing to loggers: each gets what it can take, and none can end a run."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from danon_lightning.callbacks import logs


class Images(Logger):
    """Takes numbers, images and tables, as the one of Weights & Biases does."""

    name, version, experiment = "images", 0, None

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.calls.append(("metrics", metrics, step))

    def log_image(self, key, images, step=None):
        self.calls.append(("image", key, images[0].shape, step))

    def log_text(self, key, columns, data, step=None):
        self.calls.append(("text", key, columns, data, step))


class Broken(Images):
    def log_metrics(self, metrics, step=None):
        raise OSError(28, "No space left on device")


def trainer_with(folder, *loggers):
    return pl.Trainer(accelerator="cpu", devices=1, logger=list(loggers), default_root_dir=folder)


def read(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def layouts(events):
    """What is written as layout, the last one last."""
    found = []
    for event in events.Tensors("custom_scalars__config__"):
        layout = layout_pb2.Layout()
        layout.ParseFromString(event.tensor_proto.string_val[0])
        found.append({c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category})
    return found


def test_numbers_go_to_every_logger(tmp_path):
    images = Images()
    board, table = TensorBoardLogger(tmp_path, name="board", version=""), CSVLogger(tmp_path, "table", "")
    trainer = trainer_with(tmp_path, board, table, images)
    logs.scalars(trainer, {"grad/norm/total": 2.5, "grad/other": 1}, 7)
    logs.scalars(trainer, {}, 8)
    for logger in trainer.loggers:
        logger.finalize("success")
    (event,) = read(tmp_path / "board").Scalars("grad/norm/total")
    assert (event.step, event.value) == (7, 2.5)
    head, row = (tmp_path / "table/metrics.csv").read_text().splitlines()
    assert dict(zip(head.split(","), row.split(","), strict=True)) == {
        "grad/norm/total": "2.5", "grad/other": "1", "step": "7",
    }  # fmt: skip
    assert images.calls == [("metrics", {"grad/norm/total": 2.5, "grad/other": 1}, 7)]


def test_a_logger_without_pictures_is_passed_over(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(2, 1), dpi=100)
    drawn.add_subplot().plot([1, 2])
    images = Images()
    board = TensorBoardLogger(tmp_path, name="board", version="")
    trainer = trainer_with(tmp_path, board, CSVLogger(tmp_path), images)
    logs.figure(trainer, "grad/heat", drawn, 3)
    logs.text(trainer, "report", "*well*", 3)
    logs.histogram(trainer, "grad/all", torch.tensor([1.0, 2.0, float("nan"), float("inf")]), 3)
    logs.histogram(trainer, "grad/none", torch.tensor([float("nan")]), 3)
    board.finalize("success")
    events = read(tmp_path / "board")
    assert [event.step for event in events.Images("grad/heat")] == [3]
    assert events.Tensors("report/text_summary")[0].tensor_proto.string_val[0] == b"*well*"
    (histogram,) = events.Histograms("grad/all")
    assert (histogram.histogram_value.num, histogram.histogram_value.sum) == (2, 3)
    assert events.Tags()["histograms"] == ["grad/all"]
    assert images.calls == [("image", "grad/heat", (100, 200, 4), 3), ("text", "report", ["text"], [["*well*"]], 3)]


def test_layouts_of_several_callbacks_are_one(tmp_path):
    """TensorBoard reads the last layout of a run only."""
    board = TensorBoardLogger(tmp_path, name="board", version="")
    trainer, other = trainer_with(tmp_path, board), trainer_with(tmp_path, board)
    logs.layout(trainer, {"Gradients": {"norm": ["grad/norm/.*"]}})
    logs.layout(trainer, {"Gradients": {"clipped": ["grad/clipped"]}, "Time": {"step": ["time/step"]}})
    logs.scalars(trainer, {"grad/norm/a": 1.0}, 0)
    logs.scalars(trainer, {"grad/norm/a": 1.0}, 1)
    logs.scalars(other, {"grad/norm/b": 1.0}, 1)  # it has none
    logs.layout(trainer, {"Memory": {"peak": ["memory/peak"]}})
    logs.scalars(trainer, {"grad/norm/a": 1.0}, 2)
    board.finalize("success")
    first, last = layouts(read(tmp_path / "board"))
    assert first == {
        "Gradients": {"norm": ["grad/norm/.*"], "clipped": ["grad/clipped"]}, "Time": {"step": ["time/step"]},
    }  # fmt: skip
    assert last == first | {"Memory": {"peak": ["memory/peak"]}}


def test_a_failing_logger_is_warned_of_once_and_others_are_served(tmp_path):
    broken, images = Broken(), Images()
    trainer = trainer_with(tmp_path, broken, images)
    guarded = logs.Guarded("SomeMonitor")
    with pytest.warns(UserWarning, match="SomeMonitor could not write .*No space left on device.*training goes on"):
        with guarded:
            logs.scalars(trainer, {"a": 1.0}, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with guarded:
            logs.scalars(trainer, {"a": 2.0}, 1)
    assert [step for *_, step in images.calls] == [0, 1]
    assert guarded.failures == 2
    with pytest.raises(OSError, match="No space left"):
        logs.scalars(trainer, {"a": 3.0}, 2)


def test_only_errors_are_swallowed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a user may have made warnings errors
        with logs.Guarded("SomeMonitor"):
            raise ValueError("broken")
    with pytest.raises(KeyboardInterrupt), logs.Guarded("SomeMonitor"):
        raise KeyboardInterrupt


class Steps(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append((logs.current_step(trainer), logs.is_due(trainer, 2)))


class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.log("loss", self.weight)
        return self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


def test_steps_are_those_of_self_log(tmp_path):
    images, steps = Images(), Steps()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=images, callbacks=[steps], max_steps=4, accumulate_grad_batches=2,
        log_every_n_steps=2, default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Line(), torch.utils.data.DataLoader(torch.zeros(8)))
    assert steps.seen == [(step, step % 2 == 1) for step in range(4) for _ in range(2)]
    assert [call[2] for call in images.calls if "loss" in call[1]] == [1, 3]
