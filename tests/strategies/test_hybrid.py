"""The strategy inside a Trainer. Bodies run on each rank; Lightning finds its place in the environment variables."""

import json
import os
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import StrategyRegistry
from torch.utils.data import DataLoader

import danon_lightning
from danon_lightning.strategies import DanonHybridStrategy, ErrorFeedback, TopKCompressor
from danon_lightning.testing import RankFailedError, run_distributed

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # each rank imports this file anew, and its neighbour with it
from plain_module import PlainModule, loader, trainer_with  # noqa: E402

GLOBAL_BATCH = 8


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


def train_log(strategy_options, epochs, checkpoint=None):
    log, module = LossLog(), PlainModule(optimizer="sgd")
    trainer = trainer_with(DanonHybridStrategy(**strategy_options), ranks=3, max_epochs=epochs, callbacks=[log])
    trainer.fit(module, loader(2, rank=trainer.global_rank, ranks=3), ckpt_path=checkpoint, weights_only=True)
    return trainer, log.losses, parameters(module)


EXACT = {
    "dense": {},
    "int8": {"compression": "int8"},
    "topk": {"compression": TopKCompressor(0.05), "residual_checkpoint": "per_rank"},
    "powersgd": {"compression": "powersgd", "residual_checkpoint": "per_rank"},
    "momentum": {
        "compression": TopKCompressor(0.05),
        "error_feedback": ErrorFeedback(momentum=0.5, flush_every=5),
        "residual_checkpoint": "per_rank",
    },
}


def interrupted_and_not(folder):
    results = {}
    for name, options in EXACT.items():
        _, whole, weights = train_log(options, 3)
        trainer, first, _ = train_log(options, 1)
        trainer.save_checkpoint(f"{folder}/{name}.ckpt")
        _, second, weights_again = train_log(options, 3, f"{folder}/{name}.ckpt")
        results[name] = whole, first + second, torch.equal(weights, weights_again)
    return results


def test_a_resumed_run_repeats_an_uninterrupted_one_to_the_bit(tmp_path):
    for results in run_distributed(interrupted_and_not, 3, str(tmp_path), timeout=200):
        for name, (whole, pieces, equal_weights) in results.items():
            assert len(whole) == 24, name
            assert pieces == whole, name
            assert equal_weights, name


def go_on_with_three(checkpoint, strategy, epochs):
    """From a checkpoint of two ranks."""
    trainer = trainer_with(strategy, ranks=3, max_epochs=epochs)
    module = PlainModule(optimizer="sgd")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        share = loader(2, rank=trainer.global_rank, ranks=3)
        trainer.fit(module, share, ckpt_path=checkpoint, weights_only=True)
    messages = [str(warning.message) for warning in caught]
    stats = getattr(trainer.strategy, "communication_stats", dict)()
    return parameters(module), trainer.global_step, stats.get("residual_norm"), messages


def resume_elsewhere(folder):
    results = {}
    for form in ("mean", "per_rank"):
        checkpoint = f"{folder}/{form}.ckpt"
        strategy = DanonHybridStrategy(compression="topk", residual_checkpoint=form)
        results[form] = go_on_with_three(checkpoint, strategy, 3)
    results["ddp"] = go_on_with_three(f"{folder}/mean.ckpt", "ddp", 3)
    return results


def save_with_two(folder):
    for form in ("mean", "per_rank"):
        strategy = DanonHybridStrategy(compression="topk", residual_checkpoint=form)
        trainer = trainer_with(strategy, ranks=2, max_epochs=1)
        trainer.fit(PlainModule(optimizer="sgd"), loader(4, rank=trainer.global_rank, ranks=2))
        trainer.save_checkpoint(f"{folder}/{form}.ckpt")
        trainer.save_checkpoint(f"{folder}/{form}-weights.ckpt", weights_only=True)


@pytest.mark.slow
def test_a_checkpoint_with_residuals_serves_other_numbers_of_devices_and_plain_strategies(tmp_path):
    run_distributed(save_with_two, 2, str(tmp_path), timeout=120)
    checkpoint = torch.load(tmp_path / "mean.ckpt", weights_only=True)
    kept = checkpoint["danon_gradient_memory"]["mean"]["residual"]
    assert {name: tensor.numel() for name, tensor in kept.items()} == {"layers.3.weight": 96 * 96}
    assert kept["layers.3.weight"].any()
    bare = torch.load(tmp_path / "mean-weights.ckpt", weights_only=True)
    assert "danon_gradient_memory" not in bare

    results = run_distributed(resume_elsewhere, 3, str(tmp_path), timeout=150)
    for form in ("mean", "per_rank", "ddp"):
        weights, steps, norm, _ = results[0][form]
        assert steps == 6 + 2 * 8
        assert all(torch.equal(other[form][0], weights) for other in results)
        assert norm is None or norm > 0
    said = [any("not to the bit" in message for message in results[0][form][3]) for form in ("mean", "per_rank")]
    assert said == [False, True]  # only where it was asked for

    for strategy in ("auto", "danon_hybrid", DanonHybridStrategy(compression="topk")):
        module = PlainModule(optimizer="sgd")
        trainer = trainer_with(strategy, max_epochs=2)
        trainer.fit(module, loader(8), ckpt_path=tmp_path / "mean.ckpt", weights_only=True)
        assert trainer.global_step == 12


# ---- steps that are not finite


class Disturbed(PlainModule):
    """On one rank the loss of some batches is infinite; or these batches do not exist."""

    def __init__(self, bad, optimizer, *, rank=1, by=float("inf")):
        super().__init__(optimizer=optimizer)
        self.bad, self.bad_rank, self.by = bad, rank, by
        self.scales, self.finite = [], []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.by if batch_idx in self.bad and self.global_rank == self.bad_rank else loss

    def on_train_batch_end(self, *args):
        self.finite.append(self.trainer.strategy.gradients_finite)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.scales.append(scaler.get_scale())


def some_batches(without=()):
    rank = int(os.environ["RANK"])
    batches = list(loader(4, rank=rank, ranks=2))
    return DataLoader([batch for index, batch in enumerate(batches) if index not in without], batch_size=None)


def skip_bad_steps():
    """With bad batches, and without these batches."""
    results = {}
    for name, options, optimizer in [
        ("int4", {"compression": "int4", "error_feedback": True}, "adamw"),
        ("topk", {"compression": TopKCompressor(0.05, warmup_steps=2)}, "adamw"),
        ("randomk", {"compression": "randomk"}, "sgd"),
        ("powersgd", {"compression": "powersgd"}, "adamw"),
        ("momentum", {"compression": "topk", "error_feedback": ErrorFeedback(momentum=0.5)}, "sgd"),
    ]:
        outcomes = []
        for bad, batches in ([(1, 3), some_batches()], [(), some_batches(without=(1, 3))]):
            strategy = DanonHybridStrategy(**options)
            module = Disturbed(bad, optimizer)
            trainer = trainer_with(strategy, ranks=2, max_epochs=2)
            trainer.fit(module, batches)
            stats = strategy.communication_stats()
            state = trainer.optimizers[0].state_dict()["state"]
            skips = stats["skipped_steps"], module.finite.count(False), module.finite.count(None)
            outcomes.append((parameters(module), state, stats["residual_norm"], skips))
        results[name] = outcomes
    return results


def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimizer_nor_residuals():
    for results in run_distributed(skip_bad_steps, 2, timeout=150):
        for name, (disturbed, undisturbed) in results.items():
            assert torch.isfinite(disturbed[0]).all(), name
            assert torch.equal(disturbed[0], undisturbed[0]), name
            assert disturbed[1].keys() == undisturbed[1].keys(), name
            for index, state in disturbed[1].items():
                for key, value in state.items():
                    assert value is None or torch.equal(value, undisturbed[1][index][key]), f"{name}, {key}"
            assert disturbed[2] == undisturbed[2], name
            assert (disturbed[3], undisturbed[3]) == ((4, 4, 0), (0, 0, 0)), name


class ScaledLoss(MixedPrecision):
    """Mixed precision with all its scaling, but in float32: so that nothing else is rounded."""

    def __init__(self, scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        super().__init__("16-mixed", "cpu", scaler)

    def forward_context(self):
        return nullcontext()


def fit_with_scaler():
    results = {}
    for name, options in {
        "topk": {"compression": "topk"},
        "randomk": {"compression": "randomk"},
        "int4": {"compression": "int4", "error_feedback": True},
    }.items():
        for scale, bad in ((2.0**4, ()), (2.0**14, ()), (2.0**14, (1, 3))):
            module = Disturbed(bad, "sgd")
            trainer = trainer_with(DanonHybridStrategy(**options), ranks=2, max_epochs=1, plugins=[ScaledLoss(scale)])
            trainer.fit(module, some_batches(without=() if bad else (1, 3)))
            stats = trainer.strategy.communication_stats()
            results[name, scale, bool(bad)] = parameters(module), stats["residual_norm"], module.scales
    return results


def test_a_gradient_scaler_leaves_residuals_alone_and_skips_bad_steps_on_all_ranks():
    for results in run_distributed(fit_with_scaler, 2, timeout=150):
        for name in ("topk", "randomk", "int4"):
            weights, norm, scales = results[name, 2.0**14, False]
            other_weights, other_norm, _ = results[name, 2.0**4, False]
            assert torch.equal(weights, other_weights), name
            assert norm == other_norm > 0, name
            assert scales == [2.0**14] * 4
            bad_weights, bad_norm, bad_scales = results[name, 2.0**14, True]
            assert bad_scales == [2.0**14, 2.0**13, 2.0**13, 2.0**12, 2.0**12, 2.0**12], name
            assert torch.equal(bad_weights, weights), name
            assert bad_norm == norm, name


# ---- failures and what else users do


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


@pytest.mark.slow
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


def fit_manual(ranks, strategy):
    module = Manual()
    trainer = trainer_with(strategy, ranks=ranks, max_epochs=1)
    trainer.fit(module, loader(8 // ranks, rank=trainer.global_rank, ranks=ranks))
    return parameters(module)


def fit_manual_on_two_ranks():
    strategy = DanonHybridStrategy(compression="int4", error_feedback=True)
    return fit_manual(2, "danon_hybrid"), fit_manual(2, strategy), strategy.communication_stats()


@pytest.mark.slow
def test_manual_optimization_with_two_optimizers_trains_like_one_process():
    alone, start = fit_manual(1, "auto"), parameters(Manual())
    (dense, coded, stats), (other_dense, other_coded, _) = run_distributed(fit_manual_on_two_ranks, 2, timeout=120)
    assert torch.equal(dense, other_dense) and torch.equal(coded, other_coded)
    torch.testing.assert_close(dense, alone, rtol=1e-5, atol=1e-5)
    assert 0 < (coded - dense).norm() < 0.3 * (dense - start).norm()
    assert stats["steps"] == 12


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
