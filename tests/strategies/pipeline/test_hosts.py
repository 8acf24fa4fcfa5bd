"""A pipeline over two emulated hosts: what is trained, what crosses the link, and what the link costs."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbours with it
from lightning_modules import Wide, make_trainer
from test_training import EXACT, assert_alike, differences, pipelined, run

from danon_lightning.testing import run_distributed

pytestmark = [pytest.mark.hosts, pytest.mark.slow]

# One pipeline over both hosts; and one on each, that exchange gradients.
SIZES = {"four stages": 4, "two stages, two replicas": 2}


def train_on_two_hosts(folder):
    results = {}
    for name, size in SIZES.items():
        results[name] = run(f"{folder}/{name}.ckpt", pipelined(size, micro_batches=2), 2, num_nodes=2)
    strategy = pipelined(2, micro_batches=2, compression="int8")
    results["int8"] = run(f"{folder}/int8.ckpt", strategy, 2, num_nodes=2, precision=32, max_epochs=4, module=Wide)
    return results, strategy.communication_stats()


def test_a_pipeline_on_two_hosts_trains_as_one_process_does(emulated_hosts, tmp_path):
    ranks = run_distributed(train_on_two_hosts, 4, str(tmp_path), hosts=emulated_hosts(2), timeout=200)
    expected = run(tmp_path / "plain.ckpt")
    for name, size in SIZES.items():
        replicas = 4 // size
        losses = [results[name]["losses"] for results, _ in ranks[::size]]
        mean = [sum(found) / replicas for found in zip(*losses, strict=True)]
        assert mean == pytest.approx(expected["losses"], abs=EXACT), name
        for rank, (results, _) in enumerate(ranks):
            assert results[name]["losses"] == losses[rank // size], name
            assert_alike(results[name], expected, replicas)
        assert max(differences(tmp_path / f"{name}.ckpt", tmp_path / "plain.ckpt")) < EXACT, name

    for results, stats in ranks:
        losses = results["int8"]["losses"]
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
        assert stats["inter_node_bytes"] > 0 and stats["intra_node_bytes"] == 0
        assert stats["compression_ratio"] > 2


class Bulky(pl.LightningModule):
    """Next to nothing to compute, much to send: 800 kB for each of four micro-batches, forth and back."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.PReLU() for _ in range(4)])

    def training_step(self, batch, batch_idx):
        x = batch.repeat(1, 10000)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


LINK_SCHEDULES = ["1f1b", "zbv"]


def measure_link():
    return [link_timeline(schedule) for schedule in LINK_SCHEDULES]


def link_timeline(schedule):
    strategy = pipelined(2, schedule, micro_batches=4)
    strategy.measure_pipeline()
    trainer = make_trainer(strategy, 1, num_nodes=2, max_steps=1, max_epochs=-1, precision=32)
    trainer.fit(Bulky(), DataLoader(torch.ones(8, 10), 8))
    return strategy.pipeline_timeline()


def test_a_slow_link_shows_as_communication(emulated_hosts):
    """Hardly anything is computed: the last rank waits for what is on its way already."""
    one, two = run_distributed(measure_link, 2, hosts=emulated_hosts(2, rate_mbit=40), timeout=100)
    assert one == two
    for schedule, ranks in zip(LINK_SCHEDULES, one, strict=True):
        for passes in ranks:
            assert seconds(passes, "communication") > seconds(passes, "forward", "backward", "weights"), schedule
        assert seconds(ranks[1], "communication") > 2 * seconds(ranks[1], "waiting"), schedule


def seconds(passes, *kinds):
    return sum(p.end - p.start for p in passes if p.kind in kinds)
