import io
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
from rich.console import Console

from danon_lightning.callbacks import RunSummary, TextSampler
from danon_lightning.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "strategies"))
from plain_module import PlainModule, loader  # noqa: E402


def fit(folder, *, ranks=1, strategy="auto", module=None, callbacks=(), **options):
    console = Console(file=io.StringIO(), width=200)
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=ranks, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[RunSummary("val_loss", console=console), *callbacks], **options,
    )  # fmt: skip
    trainer.fit(module or PlainModule(), loader(8), loader(8))
    return console.file.getvalue()


def test_it_says_what_will_happen_and_what_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = fit(tmp_path, max_epochs=2)
    parameters = sum(p.numel() for p in PlainModule().parameters())
    for said in (
        f"PlainModule, {parameters:,} parameters to train",
        "SingleDeviceStrategy on 1 × cpu",
        "val_loss",
        " at step 12",
    ):
        assert said in text
    assert "tensorboard --logdir lightning_logs/version_0" in text
    assert list((tmp_path / "lightning_logs/version_0/checkpoints").glob("*.ckpt"))
    assert "best checkpoint │ lightning_logs/version_0/checkpoints/" in text


def test_a_run_without_logger_or_end_is_no_obstacle(tmp_path):
    text = fit(tmp_path, logger=False, enable_checkpointing=False, max_epochs=-1, max_time={"seconds": 1})
    assert "until stopped" in text
    assert "tensorboard" not in text


def fit_by_epochs(folder):
    return fit(folder, ranks=2, strategy="ddp", max_epochs=2)


def test_any_strategy_counted_in_epochs(tmp_path):
    """The number of steps is found out by all ranks together."""
    first, second = run_distributed(fit_by_epochs, 2, str(tmp_path))
    assert "DDPStrategy on 2 × cpu" in first
    assert second == ""


def test_a_sampler_needs_a_module_that_generates(tmp_path):
    with pytest.raises(TypeError, match="PlainModule has none: leave the callback out"):
        fit(tmp_path, max_epochs=1, callbacks=[TextSampler()])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", ""),
        *[("max_new_bytes", wrong) for wrong in (0, 2.5)],
        *[("temperature", wrong) for wrong in (-1.0, float("nan"), float("inf"))],
        *[("top_k", wrong) for wrong in (0, 1.5)],
    ],
)
def test_a_sampler_checks_its_arguments(name, value):
    with pytest.raises(ValueError, match=name):
        TextSampler(**{name: value})


class TooLong(PlainModule):
    def generate_text(self, prompt, *, max_new_bytes, temperature, top_k, seed):
        raise ValueError("the text would be too long")


def test_a_sampler_that_fails_warns_and_training_goes_on(tmp_path):
    with pytest.warns(UserWarning, match="TextSampler has no sample of step 6: the text would be too long"):
        fit(tmp_path, module=TooLong(), max_epochs=1, callbacks=[TextSampler()])
