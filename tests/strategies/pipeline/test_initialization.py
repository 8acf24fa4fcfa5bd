"""Models of which each rank makes its own part, with the weights of a whole one."""

import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbours with it
from lightning_modules import Deferred, loader, make_trainer

from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.strategies.pipeline.initialization import made_in_part, reproducible
from danon_lightning.testing import RankFailedError, run_distributed


def make(module):
    with reproducible(7):
        module.configure_model()


@pytest.mark.parametrize("wanted", [{"layers.0.0.weight"}, {"shift", "layers.3.2.weight"}, set()])
def test_a_part_has_the_weights_of_the_whole(wanted):
    whole, part = Deferred(), Deferred()
    make(whole)
    with made_in_part(part, lambda: make(part), lambda: wanted, torch.device("cpu")):
        part.configure_model()
    embedding = {"embedding.weight"}  # was there before
    assert {name for name, parameter in part.named_parameters() if not parameter.is_meta} == wanted | embedding
    for name, parameter in part.named_parameters():
        if name in wanted:
            assert torch.equal(parameter, whole.get_parameter(name)), name
        else:
            assert parameter.shape == whole.get_parameter(name).shape
    for name, buffer in part.named_buffers():
        assert torch.equal(buffer, whole.get_buffer(name)), name


def fill(device):
    """In every way; returns what is on the CPU in any case."""
    first, second, third = (torch.empty(6, 4, device=device) for _ in range(3))
    last = torch.empty(4, 4)
    nn.init.trunc_normal_(first)
    nn.init.orthogonal_(second)
    nn.init.kaiming_uniform_(last)
    third.uniform_()
    nn.init.orthogonal_(last[:2])
    last[2].normal_()
    last[3].normal_()
    return torch.stack([*last, torch.randn(4), torch.rand(4)])


def test_draws_do_not_depend_on_which_tensors_have_data_and_leave_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with reproducible(1):
        whole = fill("cpu")
    assert torch.equal(torch.rand(1), expected)
    with reproducible(1):
        assert torch.equal(fill("meta"), whole)
    with reproducible(2):
        assert not (fill("meta") == whole).any()
    assert whole.unique().numel() == whole.numel()


def save_first_weights(folder, size, steps):
    strategy = DanonHybridStrategy(**({"pipeline_parallel_size": size} if size > 1 else {}))
    trainer = make_trainer(
        strategy, int(os.environ["WORLD_SIZE"]), max_steps=steps, max_epochs=-1, precision=32, num_sanity_val_steps=0
    )
    module = Deferred()
    kwargs = trainer.strategy.distributed_sampler_kwargs
    trainer.fit(module, loader(kwargs["num_replicas"], kwargs["rank"]))
    trainer.save_checkpoint(f"{folder}/{size} x {kwargs['num_replicas']}.ckpt")
    return sum(p.numel() for p in module.parameters() if type(p) is nn.Parameter)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_on_every_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    held = {}
    for ranks, size in [(1, 1), (2, 2), (2, 1), (4, 4), (4, 2)]:
        held[ranks, size] = run_distributed(save_first_weights, ranks, str(tmp_path), size, 1, timeout=60)
    first, *others = sorted(tmp_path.glob("*.ckpt"))
    assert len(others) == 4
    expected = torch.load(first, weights_only=True)["state_dict"]
    for file in others:
        found = torch.load(file, weights_only=True)["state_dict"]
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=f"{file.name}: {name}")
    assert max(held[4, 4]) < 0.5 * held[1, 1][0]


class Large(Deferred):
    """Four layers of 64 MiB each: 1 GiB with gradients and the state of AdamW."""

    @staticmethod
    def layer():
        return nn.Sequential(nn.Linear(16, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 16))


def train_within(limit, size):
    """Two steps in so many bytes of address space more than the process has before."""
    strategy = DanonHybridStrategy(pipeline_parallel_size=size, num_microbatches=2) if size > 1 else "auto"
    trainer = make_trainer(strategy, size, max_steps=2, max_epochs=-1, precision=32, num_sanity_val_steps=0)
    module = Large()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    trainer.fit(module, loader())
    return float(trainer.callback_metrics["loss"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of the address space are those of Linux")
def test_a_model_that_is_too_large_for_any_rank_trains(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # each arena of another thread takes 64 MiB of addresses
    limit = 700 << 20
    losses = run_distributed(train_within, 4, limit, 4, timeout=100)
    assert len(set(losses)) == 1
    assert losses[0] > 0
    with pytest.raises(RankFailedError, match="memory"):
        run_distributed(train_within, 1, limit, 1, timeout=100)
