"""What users do with a Trainer besides one fit, with pipeline stages."""

import sys
import time
from collections import UserDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbours with it
from lightning_modules import Deferred, Tied, loader, make_trainer

from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import RankFailedError, run_distributed


def pipelined(**options):
    return DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=3, **options)


class Normed(Tied):
    """With a running mean after the layers, and a head that validation alone uses."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.judge = nn.Linear(16, 1)

    def body(self, batch):
        x = self.embedding(batch["tokens"])
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x.flatten(0, 1))

    def training_step(self, batch):
        logits = self.head(self.body(batch))
        self.log("gathered", float(self.all_gather(logits.detach().mean()).numel()))
        return F.cross_entropy(logits, batch["labels"].flatten())

    def validation_step(self, batch):
        self.log("judged", self.judge(self.body(batch)).square().mean())
        self.log("noise", torch.rand(()))

    test_step = validation_step

    on_validation_epoch_end = on_test_epoch_end = None


class Collated(UserDict):
    """A batch of a class that torch does not know."""


def collate(samples):
    length = 4 + len(samples) % 3
    tokens, labels = (torch.stack(column)[:, :length] for column in zip(*samples, strict=True))
    return Collated(tokens=tokens, labels=labels)


def use_it_again(folder):
    module = Normed()
    trainer = make_trainer(pipelined(), 2, max_epochs=1, num_sanity_val_steps=0)
    data = DataLoader(loader().dataset, batch_size=10, collate_fn=collate)  # of 48: the last has other shapes
    trainer.fit(module, data, data)
    noise = [float(trainer.callback_metrics["noise"])]
    trainer.save_checkpoint(f"{folder}/normed.ckpt")
    tested = trainer.test(module, data, verbose=False)[0]
    noise.append(tested["noise"])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data, data)
    return float(trainer.callback_metrics["gathered"]), noise, tested["judged"], module.norm.running_mean


@pytest.mark.slow
def test_a_trainer_is_used_again_and_buffers_are_saved_from_where_they_change(tmp_path):
    one, two = run_distributed(use_it_again, 2, str(tmp_path), timeout=100)
    assert one[:3] == two[:3]
    gathered, noise, judged, _ = one
    assert gathered == 1  # replica
    assert len(set(noise)) == 2
    assert judged > 0
    state = torch.load(tmp_path / "normed.ckpt", weights_only=True)["state_dict"]
    assert state["norm.running_mean"].abs().max() > 0
    assert state["norm.num_batches_tracked"] == 15  # micro-batches
    Normed().load_state_dict(state)


def defer(folder):
    module = Deferred()
    trainer = make_trainer(pipelined(), 2, max_epochs=1, precision=32)
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(f"{folder}/deferred.ckpt")
    after = trainer.test(module, loader(), verbose=False)[0]
    loaded = make_trainer(pipelined(), 2, precision=32)
    again = loaded.test(Deferred(), loader(), ckpt_path=f"{folder}/deferred.ckpt", verbose=False, weights_only=True)[0]
    return after, again


@pytest.mark.slow
def test_a_deferred_model_is_tested_after_training_and_from_a_checkpoint(tmp_path):
    for after, again in run_distributed(defer, 2, str(tmp_path), timeout=100):
        assert after == pytest.approx(again, rel=1e-6)


class FewSteps(Tied):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


def refuse(case):
    module, options = Tied(), {}
    if case == "synchronized":
        options["sync_batchnorm"] = True
    elif case == "norm":
        module.norm = nn.SyncBatchNorm(16)
    elif case == "lbfgs":
        module = FewSteps()
    trainer = make_trainer(pipelined(), 2, max_steps=1, max_epochs=-1, **options)
    trainer.fit(module, loader())
    if case == "again":
        make_trainer(pipelined(), 2, max_steps=1, max_epochs=-1).fit(module, loader())


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("synchronized", "SyncBatchNorm .* talks to all ranks"),
        pytest.param("norm", "SyncBatchNorm .* talks to all ranks", marks=pytest.mark.slow),
        pytest.param("lbfgs", "LBFGS decides by its own parameters", marks=pytest.mark.slow),
        ("again", "has been trained with pipeline stages by another Trainer"),
    ],
)
def test_what_cannot_work_is_refused(case, message):
    with pytest.raises(RankFailedError, match=message):
        run_distributed(refuse, 2, case, timeout=60)


class Dying(Tied):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_rank == 1 and self.trainer.global_step == 2:
            raise ZeroDivisionError("out of luck")
        return super().training_step(batch, batch_idx)


def die():
    try:
        make_trainer(pipelined(), 2).fit(Dying(), loader())
    except Exception as error:
        message = str(error)
    dist.destroy_process_group()  # as the end of the process would
    return message, time.monotonic()


def test_a_rank_that_fails_ends_the_others_within_seconds():
    (lost, end), (cause, begin) = run_distributed(die, 2, timeout=100)
    assert cause == "out of luck"
    assert "rank 0 (stage 0 of the pipeline) has lost another rank, which must have failed" in lost
    assert end - begin < 10
