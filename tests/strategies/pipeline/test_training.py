"""A Trainer with pipeline stages does what a plain Trainer does."""

import os
import sys
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbours with it
from lightning_modules import Tied, Wide, loader, losses_of, make_trainer

from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import RankFailedError, run_distributed

EXACT = 1e-10


def pipelined(size, schedule="1f1b", micro_batches=3, **options):
    return DanonHybridStrategy(
        pipeline_parallel_size=size, num_microbatches=micro_batches, schedule=schedule, **options
    )


def own_loader(trainer, **options):
    kwargs = trainer.strategy.distributed_sampler_kwargs if trainer.world_size > 1 else {"num_replicas": 1, "rank": 0}
    return loader(kwargs["num_replicas"], kwargs["rank"], **options)


def run(file, strategy="auto", devices=1, checkpoint=None, module=Tied, ignored=False, **options):
    """Train, validate, test, predict and save."""
    trainer, module = make_trainer(strategy, devices, **options), module()
    trainer.fit(
        module,
        own_loader(trainer, ignored=ignored),
        own_loader(trainer, seed=1, ignored=ignored),
        ckpt_path=checkpoint,
        weights_only=True,
    )  # fmt: skip
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.save_checkpoint(file)
    tested = trainer.test(module, own_loader(trainer, seed=2), verbose=False)[0]
    predicted = trainer.predict(module, own_loader(trainer, seed=3))
    return {"losses": losses_of(trainer), "logged": logged, "tested": tested, "predicted": predicted}


def differences(one, other):
    """Of two checkpoints: the largest of weights and of optimizer states; names and settings must be the same."""
    one, other = (torch.load(file, weights_only=True) for file in (one, other))
    assert list(one["state_dict"]) == list(other["state_dict"])
    assert one["global_step"] == other["global_step"]
    (a,), (b,) = one["optimizer_states"], other["optimizer_states"]
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    weights = [(one["state_dict"][name] - other["state_dict"][name]).abs().max() for name in one["state_dict"]]
    states = [(a["state"][i][k] - b["state"][i][k]).abs().max() for i in a["state"] for k in a["state"][i]]
    return float(max(weights)), float(max(states))


def assert_alike(found, expected, replicas=1):
    assert found["logged"].keys() == expected["logged"].keys()
    for name, value in expected["logged"].items():
        # A metric that is logged in a step has seen the samples of one replica.
        if name in ("accuracy_step", "accuracy") and replicas > 1:
            continue
        assert found["logged"][name] == pytest.approx(value, abs=1e-6), name
    assert found["tested"] == pytest.approx(expected["tested"], abs=1e-6)


# ---- against a plain Trainer

CASES = {
    "1f1b": {"size": 2},
    "gpipe": {"size": 2, "schedule": "gpipe"},
    "interleaved_1f1b": {"size": 2, "schedule": "interleaved_1f1b"},
    "looped_bfs": {"size": 2, "schedule": "looped_bfs", "micro_batches": 4},
    "interleaved_zero_bubble": {"size": 2, "schedule": "interleaved_zero_bubble", "micro_batches": 4},
    "zbv": {"size": 2, "schedule": "zbv"},
    "checkpointed": {"size": 2, "activation_checkpointing": True},
    "offloaded": {"size": 2, "activation_checkpointing": "offload", "schedule": "interleaved_1f1b"},
    "cut by hand": {"size": 2, "stage_cut": [3], "pipeline_layers": "layers"},
}
FLAGS = {
    "clipped": {"gradient_clip_val": 0.5},
    "accumulated": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "limited": {"max_steps": 5, "max_epochs": -1, "limit_val_batches": 2, "num_sanity_val_steps": 0},
}


def train_in_a_pipeline(folder):
    results = {}
    for name, options in CASES.items():
        results[name] = run(f"{folder}/{name}.ckpt", pipelined(**options), 2, ignored=True)
    for name, options in FLAGS.items():
        results[name] = run(f"{folder}/{name}.ckpt", pipelined(2), 2, ignored=True, **options)
    return results


def test_a_pipeline_trains_as_one_process_does(tmp_path):
    ranks = run_distributed(train_in_a_pipeline, 2, str(tmp_path), timeout=300)
    plain = {name: run(tmp_path / f"plain {name}.ckpt", ignored=True, **FLAGS.get(name, {})) for name in ["", *FLAGS]}
    for name in (*CASES, *FLAGS):
        expected = plain[name if name in FLAGS else ""]
        for found in (rank[name] for rank in ranks):
            assert found["losses"] == pytest.approx(expected["losses"], abs=EXACT), name
            assert_alike(found, expected)
            for one, other in zip(found["predicted"], expected["predicted"], strict=True):
                assert torch.equal(one["tokens"], other["tokens"])
        file = f"plain {name if name in FLAGS else ''}.ckpt"
        assert max(differences(tmp_path / f"{name}.ckpt", tmp_path / file)) < EXACT, name


def train_on_both_axes(folder):
    return run(f"{folder}/hybrid.ckpt", pipelined(2, micro_batches=2), 4, gradient_clip_val=0.5)


def test_stages_and_replicas_go_together(tmp_path):
    ranks = run_distributed(train_on_both_axes, 4, str(tmp_path), timeout=200)
    expected = run(tmp_path / "plain.ckpt", gradient_clip_val=0.5)
    for found in ranks:
        assert_alike(found, expected, replicas=2)
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert max(differences(tmp_path / "hybrid.ckpt", tmp_path / "plain.ckpt")) < EXACT


# ---- checkpoints


def resume(folder, before, after, size):
    """One more epoch from a checkpoint."""
    run(f"{folder}/{after}.ckpt", pipelined(size), dist_size(), f"{folder}/{before}.ckpt")


def dist_size():
    return int(os.environ["WORLD_SIZE"])


def first_epoch(folder):
    run(f"{folder}/first.ckpt", pipelined(2), 2, max_epochs=1)


def test_a_checkpoint_resumes_on_any_layout(tmp_path):
    run_distributed(first_epoch, 2, str(tmp_path), timeout=100)
    run(tmp_path / "through.ckpt")
    run(tmp_path / "plain first.ckpt", max_epochs=1)
    run(tmp_path / "plain.ckpt", checkpoint=tmp_path / "first.ckpt")
    run(tmp_path / "plain resumed.ckpt", checkpoint=tmp_path / "plain first.ckpt")
    run_distributed(resume, 4, str(tmp_path), "first", "two times two", 2, timeout=100)
    run_distributed(resume, 4, str(tmp_path), "plain first", "four", 4, timeout=100)
    # A plain Trainer loads weights before it makes the module float64.
    assert max(differences(tmp_path / "plain.ckpt", tmp_path / "plain resumed.ckpt")) < EXACT
    for name in ("two times two", "four"):
        assert max(differences(tmp_path / f"{name}.ckpt", tmp_path / "through.ckpt")) < EXACT, name


# ---- callbacks


def use_callbacks(folder):
    module = Tied()
    checkpoints = ModelCheckpoint(folder, monitor="validation_loss", save_top_k=1)
    stopping = EarlyStopping("validation_loss", patience=0, min_delta=100)
    trainer = make_trainer(
        pipelined(2), 2, max_epochs=9, enable_checkpointing=True, logger=pl.loggers.CSVLogger(folder),
        precision="bf16-mixed",
    )  # fmt: skip
    trainer.callbacks += [checkpoints, stopping, LearningRateMonitor()]
    trainer.fit(module, loader(), loader(seed=1))
    return trainer.current_epoch, checkpoints.best_model_path, module.layers[3][0].weight.device.type


@pytest.mark.slow
def test_the_usual_callbacks_work(tmp_path):
    one, two = run_distributed(use_callbacks, 2, str(tmp_path), timeout=100)
    assert one == two
    epochs, best, _ = one
    assert epochs == 2  # nothing improves by a hundred
    module = Tied()
    module.load_state_dict(torch.load(best, weights_only=True)["state_dict"])
    assert "lr-AdamW" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()


# ---- half precision


class Overflowing(Tied):
    """In the second batch a gradient is too large once it is scaled, on the last stage alone."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        return loss + (1e37 if batch_idx == 1 else 0.0) * self.shift.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def scaled_training():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    module = Overflowing()
    trainer = make_trainer(
        pipelined(2), 2, max_steps=3, max_epochs=-1, num_sanity_val_steps=0, limit_val_batches=0, precision=None,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    weights = []
    trainer.callbacks.append(
        LambdaCallback(
            on_train_batch_end=lambda t, m, *_: weights.append(m.layers[3 * t.global_rank][0].weight.clone())
        )
    )
    trainer.fit(module, loader())
    return scaler.get_scale(), [before[f"layers.{3 * trainer.global_rank}.0.weight"], *weights]


@pytest.mark.slow
def test_a_step_that_overflows_is_skipped_on_all_ranks():
    for scale, weights in run_distributed(scaled_training, 2, timeout=60):
        assert scale == 2.0**9
        moved = [not torch.equal(one, other) for one, other in pairwise(weights)]
        assert moved == [True, False, True]


# ---- refusals


class Manual(Tied):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Reading(Tied):
    def training_step(self, batch, batch_idx):
        if self.embedding(batch[0]).sum() > 0:
            return super().training_step(batch, batch_idx)
        return super().training_step(batch, batch_idx)


def try_to_fit(case):
    module, data = Tied(), loader()
    trainer = make_trainer(pipelined(2), 2, max_steps=1, max_epochs=-1)
    if case == "manual":
        module = Manual()
    elif case == "average":
        trainer.callbacks.append(StochasticWeightAveraging(1e-2))
    elif case == "reading":
        module = Reading()
    elif case == "batches":
        data = loader(seed=trainer.global_rank)
    elif case == "cut":
        trainer = make_trainer(pipelined(2, stage_cut=[7]), 2)
    trainer.fit(module, data)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("manual", "need automatic optimization, but Manual sets automatic_optimization=False"),
        pytest.param("average", "StochasticWeightAveraging copies the whole module", marks=pytest.mark.slow),
        ("reading", r"test_training.py|lightning_modules.py"),
        pytest.param("batches", "the ranks of a pipeline have been given different batches", marks=pytest.mark.slow),
        pytest.param("cut", r"cuts \(0, 7, 4\) must ascend from 0 to 4, the number of blocks", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_work_is_refused_on_every_rank(case, message):
    with pytest.raises(RankFailedError, match=message):
        run_distributed(try_to_fit, 2, case, timeout=60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size=0 must be at least 1"),
        ({"pipeline_layers": "layers"}, "set pipeline_parallel_size to 2 or more"),
        (
            {"pipeline_parallel_size": 3, "stage_cut": [4, 2]},
            r"stage_cut=\[4, 2\] must give the first layers of stages 1",
        ),
        (
            {"pipeline_parallel_size": 3, "stage_cut": [2]},
            r"stage_cut=\[2\] must give the first layers of stages 1 to 2",
        ),
        (
            {"pipeline_parallel_size": 2, "stage_cut": "even"},
            "stage_cut='even' must be 'parameters', 'measured' or a list",
        ),
        ({"pipeline_parallel_size": 2, "pipeline_placement": "near"}, "pipeline_placement='near' must be 'auto'"),
        ({"pipeline_placement": "across_nodes"}, "pipeline_placement are for pipeline stages"),
        ({"microbatch_weight": len}, "microbatch_weight are for pipeline stages"),
        ({"pipeline_parallel_size": 2, "num_microbatches": 0}, "num_microbatches=0 must be at least 1, or 'auto'"),
        ({"activation_checkpointing": True}, "set pipeline_parallel_size to 2 or more"),
        ({"pipeline_parallel_size": 2, "activation_checkpointing": "disk"}, "must be True, False or 'offload'"),
        (
            {"pipeline_parallel_size": 2, "activation_checkpointing": True, "schedule": "zbv"},
            "cannot be used with schedule='zbv'",
        ),
        ({"pipeline_parallel_size": 2, "schedule": "fifo"}, "schedule='fifo' must be one of gpipe"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DanonHybridStrategy(**options)


def try_three_ranks():
    make_trainer(pipelined(2), 3, max_steps=1, max_epochs=-1).fit(Tied(), loader())


@pytest.mark.slow
def test_ranks_must_divide_into_replicas():
    with pytest.raises(RankFailedError, match="pipeline_parallel_size=2 must divide the number of ranks, 3"):
        run_distributed(try_three_ranks, 3, timeout=60)


# ---- compressed gradients between replicas


def train_compressed(folder):
    results = {}
    for name in ("int8", "topk", "powersgd"):
        strategy = pipelined(2, micro_batches=2, compression=name, residual_checkpoint="per_rank")
        results[name] = run(f"{folder}/{name}.ckpt", strategy, 4, max_epochs=4, precision=32, module=Wide)
        strategy = pipelined(2, micro_batches=2, compression=name, residual_checkpoint="per_rank")
        run(f"{folder}/{name} half.ckpt", strategy, 4, max_epochs=2, precision=32, module=Wide)
        strategy = pipelined(2, micro_batches=2, compression=name, residual_checkpoint="per_rank")
        half = f"{folder}/{name} half.ckpt"
        run(f"{folder}/{name} resumed.ckpt", strategy, 4, half, max_epochs=4, precision=32, module=Wide)
        results[name]["stats"] = strategy.communication_stats()
    return results


@pytest.mark.slow
def test_replicas_of_a_pipeline_exchange_compressed_gradients_and_resume_to_the_bit(tmp_path):
    ranks = run_distributed(train_compressed, 4, str(tmp_path), timeout=200)
    plain = run(tmp_path / "plain.ckpt", max_epochs=4, precision=32, module=Wide)
    for name in ("int8", "topk", "powersgd"):
        assert all(rank[name]["stats"]["compression_ratio"] > 2 for rank in ranks), name
        start, end = (sum(losses) / 3 for losses in (plain["losses"][:3], ranks[0][name]["losses"][-3:]))
        assert end < 0.9 * start, name
        assert differences(tmp_path / f"{name}.ckpt", tmp_path / f"{name} resumed.ckpt") == (0.0, 0.0), name
        memory = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["danon_gradient_memory"]
        assert len(memory["ranks"]) == 4


# ---- the end of the process


def train_and_leave():
    trainer = make_trainer(pipelined(2, compression="int8"), 4, max_epochs=1, precision=32)
    module = Tied()
    trainer.fit(module, own_loader(trainer))
    gloo = gloo_threads()
    dist.destroy_process_group()
    return gloo, gloo_threads(), trainer.current_epoch, module.accuracy.num_classes


def gloo_threads():
    """Names of the threads that run collectives."""
    names = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if name == "pt_gloo_runloop"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed in /proc on Linux only")
def test_no_thread_of_gloo_outlives_the_process_groups():
    """Such a thread aborts the process if it gives back a tensor while the interpreter shuts down."""
    for before, after, *_ in run_distributed(train_and_leave, 4):
        assert before and not after
