"""The strategy inside a Trainer. Bodies run on each rank; Lightning finds its place in the environment variables."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

import danon_lightning
from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import RankFailedError, run_distributed

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # each rank imports this file anew, and its neighbour with it
from plain_module import PlainModule, loader  # noqa: E402

GLOBAL_BATCH = 8


def trainer_with(strategy, *, folder=None, ranks=1, nodes=1, **options):
    return pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=ranks,
        num_nodes=nodes,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # Lightning's would shuffle
        **{"enable_checkpointing": False, **options},
    )


def parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def fit(strategy, ranks, nodes, dtype, module_options=None, **options):
    module = PlainModule(dtype, **(module_options or {}))
    trainer = trainer_with(strategy, ranks=ranks, nodes=nodes, max_steps=5, **options)
    world = ranks * nodes
    trainer.fit(module, loader(GLOBAL_BATCH // world, dtype, rank=trainer.global_rank, ranks=world))
    assert trainer.global_step == 5
    return parameters(module)


@pytest.mark.parametrize(
    ("nodes", "ranks", "dtype", "tolerance", "options"),
    [
        (1, 2, "float32", 1e-5, {}),
        (1, 2, "float64", 1e-10, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
        (2, 2, "float32", 1e-5, {"gradient_clip_val": 0.1}),
    ],
)
def test_ranks_train_like_one_process_on_the_same_global_batches(nodes, ranks, dtype, tolerance, options):
    alone = fit("auto", 1, 1, dtype, **options)
    together = run_distributed(
        fit_by_name, nodes * ranks, ranks, nodes, dtype, options, ranks_per_node=ranks, timeout=120
    )
    for other in together:
        assert torch.equal(other, together[0])
        torch.testing.assert_close(other, alone, rtol=tolerance, atol=tolerance)


def fit_by_name(ranks, nodes, dtype, options):
    return fit("danon_hybrid", ranks, nodes, dtype, **options)


def fit_compressed():
    sgd = {"optimizer": "sgd"}
    dense = fit(DanonHybridStrategy(), 2, 1, "float32", sgd)
    strategy = DanonHybridStrategy(compression="int8")
    coded = fit(strategy, 2, 1, "float32", sgd)
    stats = strategy.communication_stats()
    assert stats["steps"] == 5
    assert stats["intra_node_bytes"] < 0.5 * stats["dense_bytes"]  # flat between two ranks: a quarter, and biases
    return dense, coded


def test_int8_training_stays_close_to_dense_and_ranks_stay_identical():
    (dense, coded), (_, other) = run_distributed(fit_compressed, 2, timeout=120)
    assert torch.equal(coded, other)
    assert not torch.equal(coded, dense)
    start = parameters(PlainModule())
    assert (coded - dense).norm() < 0.02 * (dense - start).norm()


def fit_and_save(folder):
    module = PlainModule()
    trainer = trainer_with("danon_hybrid", ranks=2, max_epochs=2)
    share = loader(4, rank=trainer.global_rank, ranks=2)
    trainer.fit(module, share, share)
    trainer.save_checkpoint(f"{folder}/run.ckpt")
    return float(trainer.callback_metrics["val_loss"])


def test_the_checkpoint_serves_a_plain_trainer_without_the_plugin(tmp_path):
    losses = run_distributed(fit_and_save, 2, str(tmp_path), timeout=120)
    script = """
import json, sys
import lightning.pytorch as pl
from plain_module import PlainModule, loader
trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
[metrics] = trainer.validate(PlainModule(), loader(8), ckpt_path=sys.argv[1], weights_only=True, verbose=False)
assert not any(name.startswith("danon_lightning") for name in sys.modules)
print("RESULT", json.dumps(metrics))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run.ckpt")],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert json.loads(line[7:])["val_loss"] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0] == losses[1]


class LossLog(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def train_log(compression, epochs, checkpoint=None):
    log = LossLog()
    trainer = trainer_with(DanonHybridStrategy(compression=compression), ranks=3, max_epochs=epochs, callbacks=[log])
    trainer.fit(PlainModule(), loader(2, rank=trainer.global_rank, ranks=3), ckpt_path=checkpoint, weights_only=True)
    return trainer, log.losses


def interrupted_and_not(folder, compression):
    _, whole = train_log(compression, 3)
    trainer, first = train_log(compression, 1)
    trainer.save_checkpoint(f"{folder}/half.ckpt")
    _, second = train_log(compression, 3, f"{folder}/half.ckpt")
    return whole, first + second


@pytest.mark.parametrize("compression", [None, "int8"])
def test_a_resumed_run_repeats_an_uninterrupted_one_to_the_bit(tmp_path, compression):
    for whole, pieces in run_distributed(interrupted_and_not, 3, str(tmp_path), compression, timeout=120):
        assert len(whole) == 24
        assert pieces == whole


def fail_in_training():
    class Failing(PlainModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2 and self.global_rank == 1:
                raise ArithmeticError("the third batch of rank 1 is bad")
            return super().training_step(batch, batch_idx)

    trainer_with("danon_hybrid", ranks=2, max_steps=5).fit(Failing(), loader(4))


def test_a_failing_rank_ends_the_job_in_seconds_with_its_own_error():
    start = time.monotonic()
    with pytest.raises(RankFailedError, match="the third batch of rank 1 is bad"):
        run_distributed(fail_in_training, 2)
    assert time.monotonic() - start < 40


def test_one_rank_needs_no_exchange():
    strategy = DanonHybridStrategy(compression="int8")
    alone = fit("auto", 1, 1, "float32")
    [same] = run_distributed(fit_by_name, 1, 1, 1, "float32", {})
    assert torch.equal(same, alone)
    assert strategy.communication_stats() == {}


def sampler_keys():
    trainer = trainer_with("danon_hybrid", ranks=2, nodes=2)
    return trainer.strategy.distributed_sampler_kwargs, trainer.distributed_sampler_kwargs, str(trainer.strategy.mesh)


def test_samplers_are_keyed_on_the_data_parallel_rank():
    results = run_distributed(sampler_keys, 4, ranks_per_node=2)
    for rank, (own, trainers, mesh) in enumerate(results):
        assert own == trainers == {"num_replicas": 4, "rank": rank}
        assert mesh == "2 nodes × 2 ranks"


def test_importing_the_package_registers_the_strategy():
    assert danon_lightning.DanonHybridStrategy is DanonHybridStrategy
    assert "danon_hybrid" in StrategyRegistry.available_strategies()
    assert isinstance(pl.Trainer(strategy="danon_hybrid", accelerator="cpu", devices=1).strategy, DanonHybridStrategy)


def test_bad_arguments_name_the_valid_ones():
    with pytest.raises(ValueError, match="compression='zip'.*one of: 'bf16', 'fp16', 'int4', 'int8'"):
        DanonHybridStrategy(compression="zip")
    with pytest.raises(ValueError, match="hierarchical='always' must be True, False or 'auto'"):
        DanonHybridStrategy(hierarchical="always")
    with pytest.raises(TypeError, match="unexpected keyword argument 'comression'"):
        DanonHybridStrategy(comression="int8")


def fit_twice():
    """One Trainer after the other, and one of them twice, in the same processes."""
    module = PlainModule()
    trainer = trainer_with("danon_hybrid", ranks=2, max_steps=2)
    share = loader(4, rank=trainer.global_rank, ranks=2)
    trainer.fit(module, share, share)
    trainer.validate(module, share, verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, share, share)
    again = trainer_with("danon_hybrid", ranks=2, max_steps=2)
    again.fit(module, share)
    return trainer.global_step, again.strategy.communication_stats()["steps"], parameters(module)


def test_trainers_can_follow_one_another():
    first, second = run_distributed(fit_twice, 2, timeout=120)
    assert first[:2] == second[:2] == (4, 2)
    assert torch.equal(first[2], second[2])


def fit_sparse():
    module = PlainModule()
    module.table = torch.nn.Embedding(4, 4, sparse=True)
    with pytest.raises(ValueError, match=r"table \(Embedding\) has sparse=True.*set sparse=False"):
        trainer_with("danon_hybrid", ranks=2, max_steps=1).fit(module, loader(4))


def test_sparse_gradients_are_refused_before_training():
    run_distributed(fit_sparse, 2)


def fit_static_twice():
    """Lightning flushes the first step of a static graph by hand; every fit has a first step."""
    module = Manual()
    strategy = DanonHybridStrategy(static_graph=True)
    trainer = trainer_with(strategy, ranks=2, max_epochs=1)
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, loader(4, rank=trainer.global_rank, ranks=2))
    return strategy.communication_stats()["steps"], parameters(module)


def test_a_static_graph_is_exchanged_in_every_fit():
    (steps, first), (_, second) = run_distributed(fit_static_twice, 2, timeout=120)
    assert steps > 0
    assert torch.equal(first, second)


def fit_unused():
    module = PlainModule()
    module.unused = torch.nn.Linear(2, 2)
    share = loader(4, rank=int(os.environ["RANK"]), ranks=2)
    with pytest.raises(RuntimeError, match=r"strategy=DanonHybridStrategy\(find_unused_parameters=True\)"):
        trainer_with("danon_hybrid", ranks=2, max_steps=3).fit(module, share)


def fit_unused_allowed():
    module = PlainModule()
    module.unused = torch.nn.Linear(2, 2)
    trainer = trainer_with(DanonHybridStrategy(find_unused_parameters=True), ranks=2, max_steps=3)
    trainer.fit(module, loader(4, rank=trainer.global_rank, ranks=2))
    return parameters(module)


def test_unused_parameters_are_an_error_with_the_remedy_or_allowed():
    run_distributed(fit_unused, 2)
    first, second = run_distributed(fit_unused_allowed, 2)
    assert torch.equal(first, second)


def threads_in_training():
    seen = [torch.get_num_threads()]

    class Watching(PlainModule):
        def training_step(self, batch, batch_idx):
            seen.append(torch.get_num_threads())
            return super().training_step(batch, batch_idx)

    trainer_with("danon_hybrid", ranks=2, max_steps=2).fit(Watching(), loader(4))
    return seen


def test_training_keeps_its_threads():
    for before, *during in run_distributed(threads_in_training, 2, env={"OMP_NUM_THREADS": "2"}):
        assert during == [before, before]


class Manual(PlainModule):
    """Two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward((self.layers(batch[0]) - batch[1]).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.layers[i].parameters(), lr=0.05) for i in (0, 3)]


def fit_manual(ranks):
    module = Manual()
    trainer = trainer_with("danon_hybrid" if ranks > 1 else "auto", ranks=ranks, max_epochs=1)
    trainer.fit(module, loader(8 // ranks, rank=trainer.global_rank, ranks=ranks))
    return parameters(module)


def test_manual_optimization_trains_like_one_process():
    for together in run_distributed(fit_manual, 2, 2, timeout=120):
        torch.testing.assert_close(together, fit_manual(1), rtol=1e-5, atol=1e-5)


def fit_on_cuda(compression):
    module = PlainModule()
    trainer = pl.Trainer(
        strategy=DanonHybridStrategy(compression=compression),
        accelerator="gpu",
        devices=2,
        max_steps=5,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader(4, rank=trainer.global_rank, ranks=2))
    return parameters(module).cpu()


@pytest.mark.cuda
def test_two_gpus_train_like_one_process():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for together in run_distributed(fit_on_cuda, 2, None, timeout=200):
        torch.testing.assert_close(together, fit("auto", 1, 1, "float32"), rtol=1e-4, atol=1e-4)
    first, second = run_distributed(fit_on_cuda, 2, "int8", timeout=200)
    assert torch.equal(first, second)
