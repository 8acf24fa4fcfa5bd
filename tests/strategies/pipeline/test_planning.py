"""Which layers each stage has, and which ranks are neighbours: as measured, and as the first batch tells."""

import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbours with it
from lightning_modules import LENGTH, WIDTH, Tied, loader, losses_of, make_trainer

from danon_lightning.strategies import DanonHybridStrategy, Mesh
from danon_lightning.strategies.communication.compressors import get_compressor
from danon_lightning.strategies.pipeline.placement import gradient_bytes, traffic_between_nodes
from danon_lightning.strategies.pipeline.schedules import resolve_schedule
from danon_lightning.testing import RankFailedError, run_distributed

# ---- bytes from node to node


def traffic(mesh, *, hierarchical=True, schedule="1f1b"):
    resolved = resolve_schedule(schedule, mesh.pipeline_parallel_size)
    gradients = [1000.0 * (rank + 1) for rank in range(mesh.pipeline_parallel_size)]
    activations = [10.0 * (stage + 1) for stage in range(resolved.stages - 1)]
    found = traffic_between_nodes(mesh, resolved, gradients, activations, hierarchical=hierarchical)
    return found.gradients, found.activations


def test_pipelines_inside_nodes_send_gradients_and_those_across_send_activations():
    # Stages of 1,000 and 2,000 bytes on two nodes, out and back; 10 bytes forward and back for each of two replicas.
    assert traffic(Mesh(2, 2, 0, 2)) == (2 * 3000, 0)
    assert traffic(Mesh(2, 2, 0, 2, pipelines_across_nodes=True)) == (0, 2 * 2 * 10)


def test_a_pipeline_over_two_nodes_sends_both():
    # Replicas 0 and 1 on two nodes each: only the middle of three cuts lies between nodes.
    assert traffic(Mesh(4, 2, 0, 4)) == (2 * (1000 + 2000 + 3000 + 4000), 2 * 2 * 20)


def test_without_levels_every_pair_of_replicas_counts():
    # Four replicas on two nodes: 8 of 12 ordered pairs are apart, each of them with a quarter, out and back.
    assert traffic(Mesh(2, 4, 0, 2), hierarchical=False) == (2 * 8 * 3000 / 4, 0)


def test_stages_of_one_rank_are_no_traffic():
    # zbv: ranks 0, 1, 1, 0.
    assert traffic(Mesh(2, 2, 0, 2, pipelines_across_nodes=True), schedule="zbv") == (0, 2 * 2 * (10 + 30))


def test_coded_gradients_count_as_what_is_sent():
    weight, bias = torch.empty(1000, 1000, device="meta"), torch.empty(5000, device="meta")
    assert gradient_bytes(weight, None, 2) == 4e6
    assert gradient_bytes(bias, get_compressor("int8"), 2) == 20_000
    assert 1e6 < gradient_bytes(weight, get_compressor("int8"), 2) < 1.1e6
    assert gradient_bytes(weight, get_compressor("powersgd"), 2) < 1e5
    few, many = (gradient_bytes(weight, get_compressor("topk"), nodes) for nodes in (2, 4))
    assert many == 2 * few < 4e5


# ---- placement


class Parameters(Tied):
    """Many parameters, few activations."""

    @staticmethod
    def layer():
        return nn.Sequential(nn.Linear(WIDTH, 500), nn.GELU(), nn.Linear(500, WIDTH))

    def train_dataloader(self):
        return own_loader(self.trainer)


class Activations(Tied):
    """Few parameters, many activations."""

    def forward(self, tokens):
        x = self.embedding(tokens).repeat(1, 50, 1)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.unflatten(1, (50, -1)).mean(1))

    def train_dataloader(self):
        return own_loader(self.trainer)


def own_loader(trainer):
    kwargs = trainer.strategy.distributed_sampler_kwargs if trainer.world_size > 1 else {"num_replicas": 1, "rank": 0}
    return loader(kwargs["num_replicas"], kwargs["rank"])


MODULES = {"across": Parameters, "inside": Activations}


def place(folder):
    results = {}
    for name, cls in MODULES.items():
        strategy = DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=2)
        trainer = make_trainer(strategy, 2, num_nodes=2)
        trainer.fit(cls())
        trainer.save_checkpoint(f"{folder}/{name}.ckpt")
        mesh = strategy.mesh
        results[name] = mesh.pipelines_across_nodes, mesh.pipeline_rank, mesh.data_parallel_rank, losses_of(trainer)
    return results


@pytest.mark.slow
def test_the_heavier_traffic_stays_inside_nodes(tmp_path):
    ranks = run_distributed(place, 4, str(tmp_path), ranks_per_node=2, timeout=120)
    for name, cls in MODULES.items():
        trainer = make_trainer()
        trainer.fit(cls())
        plain = trainer.lightning_module.state_dict()
        placed = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        assert all(torch.allclose(plain[key], placed[key], rtol=0, atol=1e-10) for key in plain), name
        for replica in (0, 1):
            losses = [rank[name][3] for rank in ranks if rank[name][2] == replica]
            assert losses[0] == losses[1]
    assert [rank["inside"][:3] for rank in ranks] == [(False, 0, 0), (False, 1, 0), (False, 0, 1), (False, 1, 1)]
    assert [rank["across"][:3] for rank in ranks] == [(True, 0, 0), (True, 0, 1), (True, 1, 0), (True, 1, 1)]


def keep_to_what_was_asked():
    strategy = DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=2)
    trainer = make_trainer(strategy, 2, num_nodes=2, max_steps=1, max_epochs=-1)
    trainer.fit(Parameters(), own_loader(trainer))
    return strategy.mesh.pipelines_across_nodes


@pytest.mark.slow
def test_nothing_moves_under_a_sampler_that_has_been_made():
    assert run_distributed(keep_to_what_was_asked, 4, ranks_per_node=2) == [False] * 4


# ---- cuts as measured


class SlowHead(Tied):
    """The embedding and the first layer take much longer than their numbers of parameters tell."""

    def __init__(self):
        super().__init__(layers=6)
        self.steps = 0
        self.seen = []

    def forward(self, tokens):
        self.steps += 1
        self.seen.append(tokens)
        time.sleep(0.05)
        return super().forward(tokens)


def cut_as_measured(file):
    strategy = DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=2, stage_cut="measured")
    trainer, module = make_trainer(strategy, 2), SlowHead()
    counts = []
    trainer.callbacks[0].on_train_start = lambda *_: counts.append((module.steps, len(module.seen)))
    trainer.fit(module, loader())
    trainer.save_checkpoint(file)
    return counts, strategy._staged.cuts.bounds, float(module.accuracy._update_count)


@pytest.mark.slow
def test_cuts_follow_what_was_measured_and_nothing_else_changes(tmp_path):
    ranks = run_distributed(cut_as_measured, 2, str(tmp_path / "cut.ckpt"))
    trainer, plain = make_trainer(), SlowHead()
    trainer.fit(plain, loader())

    state = torch.load(tmp_path / "cut.ckpt", weights_only=True)["state_dict"]
    assert all(torch.allclose(state[name], value, rtol=0, atol=1e-10) for name, value in plain.state_dict().items())
    for counts, bounds, _ in ranks:
        assert counts == [(0, 0)]
        assert bounds == (0, 1, 6)  # by numbers of parameters it would be (0, 3, 6)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(8, 2, LENGTH, dtype=torch.long))


class NoWhole(Tied):
    def configure_model(self):
        self.layers = nn.ModuleList([self.layer() for _ in range(4)])


def measure_what_cannot_be(case):
    strategy = DanonHybridStrategy(pipeline_parallel_size=2, stage_cut="measured")
    trainer = make_trainer(strategy, 2, max_steps=1, max_epochs=-1)
    trainer.fit(NoWhole() if case == "part" else Tied(), loader() if case == "part" else DataLoader(Stream(), 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("stream", "stage_cut='measured' needs a first batch that is not lost by looking at it"),
        ("part", "stage_cut='measured' needs the whole module on every rank, but configure_model makes a part"),
    ],
)
def test_what_cannot_be_measured_is_refused(case, message):
    with pytest.raises(RankFailedError, match=message):
        run_distributed(measure_what_cannot_be, 2, case)


# ---- means over something else than samples


class OwnMean(Tied):
    """Takes a mean over labelled tokens by itself."""

    def training_step(self, batch, batch_idx):
        tokens, labels = batch
        logits = self(tokens).flatten(0, 1)
        counts = labels.flatten() != -100
        each = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="none")
        loss = (each * counts).sum() / counts.sum()
        self.log("loss", loss)
        return loss


def labelled(batch):
    return (batch[1] != -100).sum()


def train_with_own_mean(weighted):
    options = {"microbatch_weight": labelled} if weighted else {}
    strategy = DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=3, **options)
    trainer = make_trainer(strategy, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(OwnMean(), loader(ignored=True))
    said = any("say so by DanonHybridStrategy(microbatch_weight" in str(one.message) for one in caught)
    return losses_of(trainer), float(trainer.callback_metrics["loss"]), said


@pytest.mark.slow
def test_a_mean_of_ones_own_is_exact_if_its_divisor_is_named():
    trainer = make_trainer()
    trainer.fit(OwnMean(), loader(ignored=True))
    plain, logged = losses_of(trainer), float(trainer.callback_metrics["loss"])

    for losses, last, said in run_distributed(train_with_own_mean, 2, True):
        assert losses == pytest.approx(plain, abs=1e-10)
        assert last == pytest.approx(logged, abs=1e-10)
        assert not said
    (losses, _, said), _ = run_distributed(train_with_own_mean, 2, False)
    assert said
    assert losses != pytest.approx(plain, abs=1e-4)


def train_with_weights():
    for weight in (float("nan"), -1.0, 0.0):
        strategy = DanonHybridStrategy(pipeline_parallel_size=2, microbatch_weight=lambda batch, weight=weight: weight)
        with pytest.raises(ValueError, match="microbatch_weight has given .* finite numbers that are not negative"):
            make_trainer(strategy, 2, max_steps=1, max_epochs=-1).fit(Tied(), loader())


@pytest.mark.slow
def test_weights_that_make_no_mean_are_refused():
    run_distributed(train_with_weights, 2)
