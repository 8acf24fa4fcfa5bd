"""What all callbacks have found, in one report."""

import io
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from danon_lightning.callbacks import Finding, HealthReport
from danon_lightning.callbacks.health.gathering import merge
from danon_lightning.testing import run_distributed


class Line(pl.LightningModule):
    """Fits y = 3x."""

    def __init__(self, rate=0.1, spoil_from=None, schedule=None):
        super().__init__()
        self.layer, self.rate, self.spoil_from, self.schedule = nn.Linear(1, 1), rate, spoil_from, schedule

    def training_step(self, batch, batch_idx):
        (x,) = batch
        loss = (self.layer(x) - 3 * x).square().mean()
        if self.spoil_from is not None and batch_idx >= self.spoil_from:
            loss = loss * float("nan")
        return loss

    def validation_step(self, batch, batch_idx):
        time.sleep(0.05)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate)
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Doctor(pl.Callback):
    def __init__(self, *findings):
        self.findings = lambda: findings


class Clumsy(pl.Callback):
    def findings(self):
        raise RuntimeError("lost my notes")


NOTE = Finding("note", "bytes", "3.2 MB a step")
WARNING = Finding("warning", "data_loading | x", "waited 31 % of the time", "more workers")
ERROR = Finding("error", "gradients of model.layers.3", "NaN at step 17", "lower the learning rate")


def batches(count=80):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(torch.utils.data.TensorDataset(torch.randn(count * 4, 1, generator=generator)), batch_size=4)


def fit(module, *callbacks, report=None, **settings):
    """The report, in a terminal that is wide enough."""
    shown = io.StringIO()
    report = report or HealthReport(console=Console(file=shown, width=200))
    report._console = Console(file=shown, width=200)
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    options |= {"enable_checkpointing": False, "logger": False, "limit_val_batches": 0}
    trainer = pl.Trainer(callbacks=[report, *callbacks], **{**options, **settings})
    try:
        trainer.fit(module, batches(), DataLoader(range(2)))
    except ZeroDivisionError:
        pass
    return [line for line in shown.getvalue().splitlines() if line.startswith("│")], shown.getvalue()


def test_findings_of_all_callbacks_are_sorted_by_severity(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="log")
    report = HealthReport(tmp_path / "deep" / "health.md")
    rows, whole = fit(Line(), Doctor(NOTE, WARNING), Clumsy(), Doctor(ERROR), report=report, logger=logger)
    severities = [row.split("│")[1].strip() for row in rows]
    assert [severity for severity in severities if severity] == ["error", "warning", "note", "note", "note", "note"]
    assert "NaN at step 17" in rows[0] and "lower the learning rate" in rows[0]
    assert any("lost my notes" in row for row in rows)
    assert "80 batches" in whole and "it fell: mean of the first 32 batches" in whole
    written = (tmp_path / "deep" / "health.md").read_text()
    assert "| warning | data\\_loading \\| x | waited 31 % of the time | more workers |" in written
    log = EventAccumulator(str(tmp_path / "log"), size_guidance={"tensors": 0}).Reload()
    (event,) = log.Tensors("health/text_summary")
    assert event.tensor_proto.string_val[0].decode() in written and event.step == 80


def test_what_went_wrong_with_the_loss_is_found():
    def about(subject, *callbacks, **settings):
        rows, _ = fit(*callbacks, **settings)
        return [[cell.strip() for cell in row.split("│")[1:4]] for row in rows if row.split("│")[2].strip() == subject]

    ((severity, _, text),) = about("loss", Line(spoil_from=70))
    assert (severity, text) == ("error", "it was NaN or infinite in 10 of 80 batches, and at the end")
    ((severity, _, text),) = about("loss", Line(rate=0.0))
    assert severity == "warning" and text.startswith("it did not fall")
    ((severity, _, text),) = about("loss", Line(rate=2.0), gradient_clip_val=1e9)
    assert severity in ("error", "warning") and not text.startswith("it fell")
    ((severity, _, text),) = about("learning rate", Line(schedule=lambda step: float(step < 60)))
    assert (severity, text) == ("warning", "it was zero for 21 batches in a row, of 80")
    ((severity, _, text),) = about("validation", Line(), limit_val_batches=2, val_check_interval=10)
    assert severity == "warning"
    assert about("learning rate", Line()) == about("validation", Line()) == []


def test_the_loss_is_told_as_it_was_returned():
    class Constant(Line):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0 + 6.0

    _, whole = fit(Constant(), accumulate_grad_batches=4)
    assert "mean of the first 32 batches 6," in whole


def test_a_run_that_failed_is_reported_too():
    class Fails(Line):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) / (0 if batch_idx == 5 else 1) if batch_idx < 5 else 1 // 0

    rows, _ = fit(Fails(), Doctor(WARNING))
    assert "ended by ZeroDivisionError: integer division or modulo by zero" in rows[0]
    assert "waited" in rows[1] and "5 batches" in rows[-1]


def test_callbacks_that_give_something_else_are_named():
    rows, _ = fit(Line(), Doctor("all is well"))
    assert any("Doctor" in row and "'all is well' is no Finding" in row for row in rows)


def test_a_full_disk_is_survived(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="HealthReport could not write"):
        rows, _ = fit(Line(), report=HealthReport(tmp_path / "file" / "health.md"))
    assert rows


def test_same_findings_of_several_ranks_are_one():
    twice = [Finding("warning", "a", "slow: 3 s"), Finding("warning", "a", "slow: 4.5 s")]
    merged = merge(
        [
            [NOTE, ERROR, *twice],
            [ERROR, Finding("note", "bytes", "3.4 MB a step")],
            [],
            [NOTE, WARNING, ERROR, twice[0]],
        ]
    )
    assert merged == [
        (ERROR, "ranks 0, 1, 3"),
        (WARNING, "rank 3"),
        (twice[0], "ranks 0, 3"),
        (twice[1], "rank 0"),
        (NOTE, "ranks 0, 1, 3 (numbers of rank 0)"),
    ]
    layers = [[Finding("warning", "x", f"layers.{rank} is odd")] for rank in range(2)]
    assert [ranks for _, ranks in merge(layers)] == ["rank 0", "rank 1"]
    assert merge([[NOTE]]) == [(NOTE, "")]


def gathered(fails):
    rank = torch.distributed.get_rank()
    own = Finding("warning", "memory", f"ünusual on this rank: {'x' * 5000 * rank}")

    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if fails and rank == 0 and trainer.global_step == 3:
                raise ZeroDivisionError

    rows, _ = fit(
        Line(), Doctor(ERROR), *([Doctor(own)] if rank else []), Fails(), strategy="ddp", devices=2, max_steps=8,
        num_sanity_val_steps=0, max_epochs=-1,
    )  # fmt: skip
    return rows


def test_ranks_are_gathered():
    rows, silent = run_distributed(gathered, 2, False, timeout=120)
    assert silent == []
    assert "NaN at step 17" in rows[0] and rows[0].rstrip("│ ").endswith("all ranks")
    assert "ünusual" in rows[1] and "rank 1" in rows[1]
    assert sum(row.count("x") for row in rows) >= 5000
