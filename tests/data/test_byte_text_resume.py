"""A resumed run goes on with the batch after the last one trained, whatever wrote the checkpoint."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor

from danon_lightning.data import ByteTextDataModule

BATCHES = 10
"""Batches of an epoch in these tests."""

Seen = list[tuple[int, int, list[list[int]]]]


class Recorder(LightningModule):
    """Notes epoch, batch number and content of every batch it is trained on."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: Seen = []
        self.fail_at = fail_at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if len(self.seen) == self.fail_at:
            raise KeyError("planted")
        self.seen.append((self.current_epoch, batch_idx, batch.tolist()))
        return self.weight * batch.float().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def make_data(random_file: Callable[[int], Path], tmp_path: Path) -> Callable[..., ByteTextDataModule]:
    # 90 % of the file are 8 * (10 * 4 + 3) bytes and a few more: ten batches, and two windows over.
    path = random_file(390)

    def make(**changes: Any) -> ByteTextDataModule:
        settings: dict[str, Any] = {"context_length": 8, "global_batch_size": 4, "cache_dir": tmp_path / "cache"}
        return ByteTextDataModule(**{"path": path, **settings, **changes})

    return make


def _fit(
    data: ByteTextDataModule,
    callbacks: list[Callback] | None = None,
    ckpt_path: Path | None = None,
    fail_at: int | None = None,
    **arguments: Any,
) -> Seen:
    model = Recorder(fail_at)
    if not {"max_epochs", "max_steps"} & set(arguments):
        arguments["max_epochs"] = 3
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        # Without one of the test's own, Lightning would write checkpoints into the current folder.
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks or []),
        **arguments,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*your dataloader is not resumable.*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*`ModelCheckpoint.*|.*Checkpoint directory.*")
        try:
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        except KeyError:
            assert fail_at is not None
    return model.seen


def _content(seen: Seen) -> list[list[list[int]]]:
    return [batch for _, _, batch in seen]


def _every_step(folder: Path, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1, **arguments)


def test_uninterrupted_run(make_data):
    seen = _fit(make_data())
    assert [(epoch, index) for epoch, index, _ in seen] == [(e, i) for e in range(3) for i in range(BATCHES)]
    for epoch in range(3):
        windows = [bytes(row) for at, _, batch in seen if at == epoch for row in batch]
        assert len(set(windows)) == 4 * BATCHES


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 3 * BATCHES}], ids=["epochs", "steps"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_after_any_step(make_data, tmp_path: Path, num_workers: int, limit: dict[str, int]):
    whole = _fit(make_data(), [_every_step(tmp_path)], **limit)
    assert len(whole) == 3 * BATCHES
    # Middle and both ends of the first and the second epoch. Starting workers takes its time.
    for step in (1, 4, 9, 10, 11, 17, 20, 21) if num_workers == 0 else (4, 10, 17, 20):
        resumed = _fit(make_data(num_workers=num_workers), ckpt_path=tmp_path / f"step={step}.ckpt", **limit)
        assert resumed == whole[step:], f"resumed after step {step}"


def test_resume_of_a_run_that_was_cut_off(make_data, tmp_path: Path):
    whole = _fit(make_data())
    saved_at = 12
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    before = _fit(make_data(num_workers=2), [checkpoint], fail_at=15)
    assert before == whole[:15]
    assert _fit(make_data(), ckpt_path=tmp_path / f"step={saved_at}.ckpt") == whole[saved_at:]


def test_resume_twice(make_data, tmp_path: Path):
    whole = _fit(make_data())
    _fit(make_data(), [_every_step(tmp_path)], max_steps=3)
    second = _fit(make_data(), [_every_step(tmp_path)], ckpt_path=tmp_path / "step=3.ckpt", max_steps=16)
    assert second == whole[3:16]
    assert _fit(make_data(), ckpt_path=tmp_path / "step=16.ckpt") == whole[16:]


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 3 * BATCHES}], ids=["epochs", "steps"])
@pytest.mark.parametrize("validation", [{}, {"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}])
def test_resume_at_the_end_of_an_epoch(make_data, tmp_path: Path, limit: dict[str, int], validation: dict[str, int]):
    at_end = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = _fit(make_data(), [at_end], **limit, **validation)
    for epoch, num_workers in ((0, 0), (1, 0), (1, 2)):
        data = make_data(num_workers=num_workers)
        resumed = _fit(data, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **limit, **validation)
        # With max_steps, Lightning itself may number the first batches as if the finished epoch went on.
        assert _content(resumed) == _content(whole[(epoch + 1) * BATCHES :]), f"resumed after epoch {epoch}"


class _SaveAtTheVeryEnd(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("unit", ["max_epochs", "max_steps"])
def test_longer_run_from_a_finished_one(make_data, tmp_path: Path, unit: str):
    each = 1 if unit == "max_epochs" else BATCHES
    whole = _fit(make_data(), **{unit: 3 * each})
    for epochs in (1, 2):
        path = tmp_path / f"{epochs}.ckpt"
        assert _fit(make_data(), [_SaveAtTheVeryEnd(path)], **{unit: epochs * each}) == whole[: epochs * BATCHES]
        resumed = _fit(make_data(), ckpt_path=path, **{unit: 3 * each})
        assert _content(resumed) == _content(whole[epochs * BATCHES :])


def test_resume_from_a_checkpoint_of_validation(make_data, tmp_path: Path):
    after_validation = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)
    whole = _fit(make_data(), [after_validation], val_check_interval=4)
    for step in (4, 8, 14):
        resumed = _fit(make_data(), ckpt_path=tmp_path / f"step={step}.ckpt", val_check_interval=4)
        assert resumed == whole[step:], f"resumed after step {step}"


def test_batch_that_failed_is_trained_again(make_data, tmp_path: Path):
    # It was fetched, but not trained.
    whole = _fit(make_data())
    before = _fit(make_data(num_workers=2), [OnExceptionCheckpoint(tmp_path, "stopped")], fail_at=13)
    assert before == whole[:13]
    assert _fit(make_data(), ckpt_path=tmp_path / "stopped.ckpt") == whole[13:]


def test_resume_of_a_run_that_resumed_after_an_exception(make_data, tmp_path: Path):
    # Lightning's own count within the epoch is one too low from here on, and it would train a batch twice.
    whole = _fit(make_data())
    _fit(make_data(), [OnExceptionCheckpoint(tmp_path, "stopped")], fail_at=13)
    _fit(make_data(), [_every_step(tmp_path)], ckpt_path=tmp_path / "stopped.ckpt", max_steps=16)
    resumed = _fit(make_data(), ckpt_path=tmp_path / "step=16.ckpt", max_steps=3 * BATCHES)
    assert _content(resumed) == _content(whole[16:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_with_accumulation(make_data, tmp_path: Path, num_workers: int):
    whole = _fit(make_data(), [_every_step(tmp_path)], accumulate_grad_batches=2)
    for step in (2, 5, 8):
        data = make_data(num_workers=num_workers)
        resumed = _fit(data, ckpt_path=tmp_path / f"step={step}.ckpt", accumulate_grad_batches=2)
        assert resumed == whole[2 * step :], f"resumed after step {step}"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_with_shortened_epochs(make_data, tmp_path: Path, num_workers: int):
    whole = _fit(make_data(num_workers=num_workers), [_every_step(tmp_path)], limit_train_batches=5)
    assert [index for _, index, _ in whole] == [0, 1, 2, 3, 4] * 3
    # An epoch goes on where the one before was cut, so that all of the text is seen.
    assert _content(whole) == _content(_fit(make_data())[:15])
    for step in (3, 5, 8):
        data = make_data(num_workers=num_workers)
        assert _fit(data, ckpt_path=tmp_path / f"step={step}.ckpt", limit_train_batches=5) == whole[step:]


@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(1, 2), (4, 1), (2, 4)])
def test_resume_on_another_number_of_ranks(
    make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks_before: int, ranks_after: int
):
    def fit_as_every_rank(num_replicas: int, **arguments: Any) -> Seen:
        """Run one rank after the other, and join what they have seen."""
        seen = []
        for rank in range(num_replicas):
            share = {"num_replicas": num_replicas, "rank": rank}
            monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", property(lambda self, share=share: share))
            seen.append(_fit(make_data(), **arguments))
        assert all([step[:2] for step in one] == [step[:2] for step in seen[0]] for one in seen)
        return [(*steps[0][:2], sum((batch for _, _, batch in steps), [])) for steps in zip(*seen, strict=True)]

    whole = fit_as_every_rank(1)
    before = fit_as_every_rank(ranks_before, callbacks=[_every_step(tmp_path)], max_steps=13)
    assert before == whole[:13]
    assert fit_as_every_rank(ranks_after, ckpt_path=tmp_path / "step=13.ckpt") == whole[13:]


def test_second_fit_of_a_trainer_goes_on(make_data):
    model, data = Recorder(), make_data(num_workers=1)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=2,
                      enable_progress_bar=False, reload_dataloaders_every_n_epochs=1)  # fmt: skip
    trainer.fit(model, datamodule=data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, datamodule=data)
    assert model.seen == _fit(make_data())


def test_debugging_modes_of_the_trainer(make_data):
    assert _fit(make_data(), fast_dev_run=2) == _fit(make_data())[:2]
    # Lightning puts a sampler of its own in the place of this one, and takes the first windows in every epoch.
    overfit = _content(_fit(make_data(num_workers=1), overfit_batches=2))
    assert len(overfit) == 6 and overfit[:2] == overfit[2:4] == overfit[4:]


def test_loader_outside_a_fit_starts_at_the_beginning(make_data):
    data = make_data()
    seen = _fit(data, max_steps=3)
    assert next(iter(data.train_dataloader())).tolist() == seen[0][2]


def test_loader_without_its_data_module_refuses_to_resume(make_data, tmp_path: Path):
    _fit(make_data(), [_every_step(tmp_path)], max_steps=3)
    alone = make_data()
    alone.setup("fit")
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=1)
    with pytest.raises(RuntimeError, match=r"call Trainer.fit\(model, datamodule=...\)"):
        trainer.fit(Recorder(), train_dataloaders=alone.train_dataloader(), ckpt_path=tmp_path / "step=3.ckpt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 2}, "written with global_batch_size=4, and this run has global_batch_size=2"),
        ({"context_length": 6}, "written with context_length=8, and this run has context_length=6"),
        ({"seed": 7}, "written with seed=0, and this run has seed=7"),
        ({"val_fraction": 0.2},
         r"written with corpus=\w{32} \(351 bytes to train on, .*\), and this run has corpus=\w{32} \(312 bytes to"),
        ({"seed": 7, "global_batch_size": 2}, "written with global_batch_size=4, seed=0, and this run"),
    ],
)  # fmt: skip
def test_other_order_of_samples_is_refused(make_data, tmp_path: Path, changes: dict[str, Any], message: str):
    _fit(make_data(), [_every_step(tmp_path)], max_steps=1)
    with pytest.raises(ValueError, match=f"cannot resume: the checkpoint was {message}") as caught:
        _fit(make_data(**changes), ckpt_path=tmp_path / "step=1.ckpt")
    assert "load the weights alone and do not pass ckpt_path" in str(caught.value)


def test_other_text_is_refused_and_other_times_are_not(make_data, tmp_path: Path, random_file):
    text = random_file(390)
    whole = _fit(make_data(), [_every_step(tmp_path)])
    copy = tmp_path / "elsewhere" / text.name
    copy.parent.mkdir()
    copy.write_bytes(text.read_bytes())
    assert _fit(make_data(path=copy), ckpt_path=tmp_path / "step=25.ckpt") == whole[25:]
    copy.write_bytes(text.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="cannot resume: the checkpoint was written with corpus="):
        _fit(make_data(path=copy), ckpt_path=tmp_path / "step=25.ckpt")


def test_validating_a_checkpoint_on_other_data_is_allowed(make_data, tmp_path: Path):
    _fit(make_data(), [_every_step(tmp_path)], max_steps=1)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.validate(Recorder(), datamodule=make_data(global_batch_size=2), ckpt_path=tmp_path / "step=1.ckpt")


def test_validation_batches_are_the_same_every_time(make_data):
    class Watcher(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.validated: list[list[list[int]]] = []

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.validated.append(batch.tolist())

    model = Watcher()
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=2,
                      enable_progress_bar=False, num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(model, datamodule=make_data())
    # 39 bytes: four windows of 8, one batch, after each of two epochs.
    assert len(model.validated) == 2 and model.validated[0] == model.validated[1]
