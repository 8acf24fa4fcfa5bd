"""Two processes under Lightning's own DDP."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from danon_lightning.data import ByteTextDataModule


class Recorder(LightningModule):
    """Writes the batches of each rank to a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder = folder
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch.tolist())
        return self.weight * batch.float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(self.seen))


class MissingTextOnRankOne(ByteTextDataModule):
    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        if self.trainer.global_rank == 1:
            self.path = str(self.path) + ".missing"
        super().setup(stage)


def _trainer(devices: int, **arguments) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **arguments,
    )


def _fit(data: ByteTextDataModule, folder: Path, devices: int, ckpt_path: Path | None = None, **arguments):
    trainer = _trainer(devices, **arguments)
    trainer.fit(Recorder(folder), datamodule=data, ckpt_path=ckpt_path)
    shares = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(devices)]
    return trainer, [sum(parts, []) for parts in zip(*shares, strict=True)]


def test_two_processes_go_on_where_one_stopped(random_file: Callable[[int], Path], tmp_path: Path):
    data = ByteTextDataModule(
        path=random_file(390), context_length=8, global_batch_size=4, cache_dir=tmp_path / "cache"
    )
    _, whole = _fit(data, tmp_path / "whole", 1, max_steps=20)
    trainer, before = _fit(data, tmp_path / "before", 1, max_steps=13)
    trainer.save_checkpoint(tmp_path / "13.ckpt")
    _, after = _fit(data, tmp_path / "after", 2, ckpt_path=tmp_path / "13.ckpt", max_steps=20)
    assert before == whole[:13] and after == whole[13:]


def test_a_failure_of_one_process_is_named_by_all(random_file: Callable[[int], Path], tmp_path: Path):
    data = MissingTextOnRankOne(path=random_file(390), context_length=8, global_batch_size=4)
    # Whichever process is reported first, the message is the same.
    with pytest.raises(Exception, match=r"ValueError: rank 1: path='.*\.missing' does not exist"):
        _trainer(2, max_epochs=1).fit(Recorder(tmp_path / "out"), datamodule=data)
