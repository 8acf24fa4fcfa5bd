"""Sharded optimizers: the same weights to the bit, and a part of the memory."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn, optim

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "pipeline")]
from lightning_modules import Tied  # noqa: E402
from lightning_modules import loader as token_loader  # noqa: E402
from plain_module import PlainModule, loader, trainer_with  # noqa: E402

from danon_lightning.optim import OneBitAdam  # noqa: E402
from danon_lightning.strategies import DanonHybridStrategy  # noqa: E402
from danon_lightning.strategies.optimizer_sharding import ShardedOptimizer, check_shardable  # noqa: E402
from danon_lightning.testing import run_distributed  # noqa: E402

BATCH = 8


class Scheduled(PlainModule):
    """Many layers, two groups of parameters, and schedules inside a schedule."""

    def __init__(self, depth=8):
        super().__init__()
        torch.manual_seed(0)
        hidden = [layer for _ in range(depth) for layer in (nn.Linear(32, 32), nn.GELU())]
        self.layers = nn.Sequential(nn.Linear(20, 32), *hidden, nn.Linear(32, 1))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        optimizer = optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others}], lr=1e-2)
        parts = [
            optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
            optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        ]
        schedule = optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.device.type != "meta"}


def state_bytes(optimizer):
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, (dict, list)):
        pairs = [(one[key], other[key]) for key in one] if isinstance(one, dict) else list(zip(one, other, strict=True))
        assert len(one) == len(other)
        for pair in pairs:
            assert_same(*pair)
    else:
        assert one == other


def fit(sharding, folder, devices=2, rank=0, **options):
    resumed = options.pop("ckpt_path", None)
    module = Scheduled(options.pop("depth", 8))
    strategy = DanonHybridStrategy(optimizer_sharding=sharding) if devices > 1 else "auto"
    trainer = trainer_with(
        strategy,
        ranks=devices,
        folder=folder,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        **{"max_epochs": 2, **options},
    )
    batches = loader(BATCH // devices, rank=trainer.global_rank if devices > 1 else 0, ranks=devices)
    trainer.fit(module, batches, ckpt_path=resumed, weights_only=True if resumed else None)
    return trainer, module


def shard_and_resume(folder):
    folder = Path(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain, plain_module = fit(False, folder)
        logger = CSVLogger(folder, name="logs")
        trainer, module = fit(True, folder, logger=logger, callbacks=[LearningRateMonitor()], log_every_n_steps=1)
    assert not [w for w in caught if "lr_scheduler" in str(w.message)]
    assert isinstance(trainer.optimizers[0], ShardedOptimizer)
    assert "lr-AdamW/pg1" in trainer.callback_metrics or any("lr-AdamW/pg1" in row for row in logger.experiment.metrics)
    assert_same(weights(plain_module), weights(module))
    share = state_bytes(trainer.optimizers[0]) / state_bytes(plain.optimizers[0])

    # One ordinary checkpoint: the same as without sharding.
    for one, name in ((plain, "plain"), (trainer, "sharded")):
        one.save_checkpoint(folder / f"{name}.ckpt")
    saved = [torch.load(folder / f"{name}.ckpt", weights_only=True) for name in ("plain", "sharded")]
    for key in ("optimizer_states", "lr_schedulers", "state_dict"):
        assert_same(saved[0][key], saved[1][key])

    # From either, with either.
    ends = []
    for name, sharding in (("plain", False), ("plain", True), ("sharded", True), ("sharded", False)):
        _, resumed = fit(sharding, folder, max_epochs=4, ckpt_path=folder / f"{name}.ckpt")
        ends.append(weights(resumed))
    for end in ends[1:]:
        assert_same(ends[0], end)
    _, uninterrupted = fit(True, folder, max_epochs=4)
    assert_same(ends[0], weights(uninterrupted))
    return share, ends[0]


def test_weights_are_the_same_to_the_bit_and_so_are_checkpoints(tmp_path):
    results = run_distributed(shard_and_resume, 2, str(tmp_path), timeout=200)
    shares = [share for share, _ in results]
    assert sum(shares) == pytest.approx(1)
    assert max(shares) <= 1.1 / 2
    # A plain Trainer goes on from the checkpoint of both ranks.
    _, module = fit(False, tmp_path, devices=1, max_epochs=4, ckpt_path=tmp_path / "sharded.ckpt")
    for name, value in weights(module).items():
        torch.testing.assert_close(value, results[0][1][name], rtol=1e-4, atol=1e-5)


def shard_over_all(folder):
    runs = [fit(sharding, Path(folder), devices=4, depth=32, max_epochs=1) for sharding in (False, True)]
    assert_same(*(weights(module) for _, module in runs))
    return [state_bytes(trainer.optimizers[0]) for trainer, _ in runs]


def test_four_ranks_keep_a_quarter_each(tmp_path):
    whole, parts = zip(*run_distributed(shard_over_all, 4, str(tmp_path), timeout=200), strict=True)
    assert len(set(whole)) == 1 and sum(parts) == whole[0]
    assert max(parts) <= 1.1 / 4 * whole[0]


class Adam(Tied):
    def configure_optimizers(self):
        return optim.AdamW(self.parameters(), lr=1e-2)


def shard_stages(folder):
    ends, states, sizes = [], [], []
    for sharding in (False, True):
        strategy = DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=2, optimizer_sharding=sharding)
        trainer = trainer_with(
            strategy, ranks=4, folder=folder, precision="64-true", gradient_clip_val=0.1, max_epochs=1
        )
        module = Adam()
        batches = token_loader(2, strategy.mesh.data_parallel_rank)
        trainer.fit(module, batches)
        path = Path(folder) / f"{sharding}.ckpt"
        trainer.save_checkpoint(path)
        states.append(torch.load(path, weights_only=True) if trainer.is_global_zero else None)
        sizes.append(state_bytes(trainer.optimizers[0]))
        trainer = trainer_with(strategy := DanonHybridStrategy(
            pipeline_parallel_size=2, num_microbatches=2, optimizer_sharding=not sharding
        ), ranks=4, folder=folder, precision="64-true", gradient_clip_val=0.1, max_epochs=2)  # fmt: skip
        module = Adam()
        trainer.fit(module, token_loader(2, strategy.mesh.data_parallel_rank), ckpt_path=path, weights_only=True)
        ends.append({name: value for name, value in module.state_dict().items() if type(value) is torch.Tensor})
    return ends, states, sizes


def test_stages_shard_over_their_replicas(tmp_path):
    results = run_distributed(shard_stages, 4, str(tmp_path), timeout=250)
    for ends, _, _ in results:
        assert_same(*ends)
    plain, sharded = results[0][1]
    assert_same(plain["state_dict"], sharded["state_dict"])
    assert_same(plain["optimizer_states"], sharded["optimizer_states"])
    # Ranks 0 and 2 are replicas of the first stage, 1 and 3 of the last one.
    for first, second in ((0, 2), (1, 3)):
        whole, parts = results[first][2][0], [results[rank][2][1] for rank in (first, second)]
        assert sum(parts) == whole and min(parts) > 0


@pytest.mark.parametrize(("optimizer", "options"), [(optim.LBFGS, {}), (OneBitAdam, {"freeze_step": 3})])
def test_optimizers_that_need_all_at_once_are_refused(optimizer, options):
    with pytest.raises(ValueError, match=f"optimizer_sharding=True cannot be used with {optimizer.__name__}"):
        check_shardable(optimizer([nn.Parameter(torch.ones(2))], **options))


def test_one_process_has_nothing_to_share(tmp_path):
    module = Scheduled()
    trainer = trainer_with(DanonHybridStrategy(optimizer_sharding=True), folder=tmp_path, max_steps=1, max_epochs=-1)
    trainer.fit(module, loader(BATCH))
    assert type(trainer.optimizers[0]) is optim.AdamW
