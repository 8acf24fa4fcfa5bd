"""The signal that SLURM sends before it takes nodes away finds ranks in different steps; they save the same one."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment

sys.path.insert(0, str(Path(__file__).parent / "pipeline"))  # each rank imports this file anew, and its neighbours too
from lightning_modules import Wide, loader, make_trainer

from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.strategies.pipeline.batches import tensors_in
from danon_lightning.strategies.preemption import PostponedRequeue
from danon_lightning.testing import run_distributed

STRATEGIES = {
    "replicas": {"compression": "topk", "residual_checkpoint": "per_rank"},
    "stages": {"pipeline_parallel_size": 2, "num_microbatches": 2},
}


class Signalled(Wide):
    """Rank 1 gets the signal in the middle of its third step, rank 0 a step later."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3 - self.trainer.global_rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().training_step(batch, batch_idx)


class Cluster(SLURMEnvironment):
    """The processes are not started by srun, which would number them."""

    def global_rank(self):
        return int(os.environ["RANK"])

    def local_rank(self):
        return int(os.environ["LOCAL_RANK"])


def be_signalled(folder, name):
    strategy = DanonHybridStrategy(cluster_environment=Cluster(auto_requeue=True), **STRATEGIES[name])
    trainer = make_trainer(strategy, 2, max_steps=6, max_epochs=-1, precision=32, default_root_dir=folder)
    trainer.fit(Signalled(), loader(*strategy.distributed_sampler_kwargs.values()))
    return trainer.global_step


def train_undisturbed(folder, name, steps):
    strategy = DanonHybridStrategy(**STRATEGIES[name])
    trainer = make_trainer(strategy, 2, max_steps=steps, max_epochs=-1, precision=32)
    trainer.fit(Wide(), loader(*strategy.distributed_sampler_kwargs.values()))
    trainer.save_checkpoint(f"{folder}/undisturbed.ckpt")


def test_lightning_gets_its_handler_back():
    trainer = make_trainer("auto", 1)
    connector = trainer._signal_connector
    postponed = PostponedRequeue(trainer, torch.device("cpu"))
    connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)
    assert postponed._signal == signal.SIGUSR1
    postponed.end()
    assert connector._slurm_sigusr_handler_fn.__func__ is type(connector)._slurm_sigusr_handler_fn


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_all_ranks_save_the_same_step_and_the_job_is_asked_for_again(tmp_path, name):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    slurm = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "17",
        "SLURM_NODEID": "0",
    }
    env = {**slurm, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    assert run_distributed(be_signalled, 2, str(tmp_path), name, env=env) == [6, 6]
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    [file] = tmp_path.glob("hpc_ckpt_*.ckpt")
    saved = torch.load(file, weights_only=True)
    assert 2 < saved["global_step"] < 6

    run_distributed(train_undisturbed, 2, str(tmp_path), name, saved["global_step"])
    expected = torch.load(tmp_path / "undisturbed.ckpt", weights_only=True)
    for part in ("state_dict", "optimizer_states", "danon_gradient_memory"):
        found, wanted = (tensors_in(checkpoint.get(part)) for checkpoint in (saved, expected))
        assert len(found) == len(wanted) and (found or name == "stages")
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)), part
