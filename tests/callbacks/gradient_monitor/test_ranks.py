"""On several ranks: what each has alone, and what they have in common."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "strategies"))
sys.path.insert(0, str(Path(__file__).parents[2] / "strategies" / "pipeline"))
import lightning_modules
import plain_module
from monitored import BATCH, Network, by_layer, fit, gradients_of, hooks_of, loader, trainer_with, whole
from torch import nn
from torch.nn import functional as F

from danon_lightning.callbacks import GradientMonitor
from danon_lightning.strategies import DanonHybridStrategy, TopKCompressor
from danon_lightning.testing import run_distributed

RANKS, STEPS = 2, 4


class Untied(lightning_modules.Tied):
    """What comes before and after its layers is found to be on one stage in the first step. It learns nothing."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(lightning_modules.WIDTH, lightning_modules.VOCABULARY)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def monitor():
    return GradientMonitor(1, top_k=None, noise_decay=0.0)


def train_on_ranks(cases):
    """Several runs in one launch. All that this rank has logged, and whether any hook is left."""
    logged = {}
    for name, (strategy, options, module, data) in cases.items():
        trainer = trainer_with(monitor(), strategy=strategy(), devices=RANKS, max_steps=STEPS, **options)
        rank, made = trainer.global_rank, module()
        trainer.fit(made, data(rank))
        assert not hooks_of(trainer, made)
        logged[name] = trainer.logger.steps
    return logged


def share(rank):
    return loader(rank=rank, ranks=RANKS)


def plain_share(rank):
    return plain_module.loader(4, rank=rank, ranks=RANKS)


def whole_batch(rank):
    return lightning_modules.loader()


def ddp():
    return "ddp"


def hybrid():
    return "danon_hybrid"


def top_k():
    return DanonHybridStrategy(compression=TopKCompressor(0.05))


def sharded():
    return DanonHybridStrategy(optimizer_sharding=True)


def late():
    return DanonHybridStrategy(sync_mode="async")


def periodic():
    return DanonHybridStrategy(sync_mode="periodic")


def pipeline():
    return DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=4)


def zero_bubble():
    return DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=4, schedule="zbv")


CASES = {
    "ddp": (ddp, {}, Network, share),
    "danon_hybrid": (hybrid, {}, Network, share),
    "sharded": (sharded, {}, Network, share),
    "late": (late, {}, Network, share),
    "periodic": (periodic, {}, Network, share),
    "accumulated": (ddp, {"accumulate_grad_batches": 2, "max_epochs": -1}, Network, share),
    "top-k": (top_k, {}, plain_module.PlainModule, plain_share),
    "pipeline": (pipeline, {"precision": "64-true", "gradient_clip_val": 0.5}, lightning_modules.Tied, whole_batch),
    "untied": (pipeline, {"precision": "64-true"}, Untied, whole_batch),
    "zero bubble": (zero_bubble, {"precision": "64-true"}, lightning_modules.Tied, whole_batch),
}


@pytest.fixture(scope="module")
def logged():
    first, second = run_distributed(train_on_ranks, RANKS, CASES, timeout=200)
    assert all(steps == {} for steps in second.values())  # rank 0 alone writes
    return first


def expected_steps(accumulate=1):
    """By hand, on one process: the gradients of both ranks, and their mean."""
    module = Network()
    optimizer = module.configure_optimizers()
    shares = [list(share(rank)) for rank in range(RANKS)]
    for start in range(0, len(shares[0]), accumulate):
        batches = [batch for own in shares for batch in own[start : start + accumulate]]
        pieces = torch.stack([whole(gradients_of(module, module.loss(batch))) for batch in batches]).double()
        module.zero_grad()
        (sum(module.loss(batch) for batch in batches) / len(batches)).backward()
        before = by_layer({name: p.grad for name, p in module.named_parameters()})
        optimizer.step()
        yield before, pieces


def cosine_of(pieces):
    products = pieces @ pieces.T
    number = len(pieces)
    return float((products.sum() - products.trace()) / (number - 1) / products.trace())


def batches_of(pieces):
    """tr(Σ) of a batch, from the variance between its pieces, over the mean of all products of two of them."""
    products, number = pieces @ pieces.T, len(pieces)
    return float(pieces.var(0).sum() / number / ((products.sum() - products.trace()) / number / (number - 1)))


@pytest.mark.parametrize(("name", "accumulate"), [("ddp", 1), ("danon_hybrid", 1), ("sharded", 1), ("accumulated", 2)])
def test_local_gradients_are_compared(logged, name, accumulate):
    which = "ranks" if accumulate == 1 else "micro_batches"
    steps = list(zip(logged[name].values(), expected_steps(accumulate), strict=False))
    assert len(steps) >= 2
    for values, (before, pieces) in steps:
        assert values["grad/total/norm"] == pytest.approx(float(whole(before).norm()), rel=1e-3)
        for layer, gradient in before.items():
            assert values[f"grad/norm/{layer}"] == pytest.approx(float(gradient.norm()), rel=1e-3)
        assert values[f"grad/cosine/between_{which}"] == pytest.approx(cosine_of(pieces), rel=1e-3, abs=1e-4)
        if (batches := batches_of(pieces)) > 0:
            assert values["grad/noise/scale_to_batch"] == pytest.approx(batches, rel=1e-2)
            assert values["grad/noise/scale"] == pytest.approx(batches * RANKS * accumulate * BATCH, rel=1e-2)


def test_what_compression_owes(logged):
    """With residuals in the gradient, nothing can be told of what ranks have in common."""
    for values in logged["top-k"].values():
        residual, norm = values["grad/compression/residual_norm"], values["grad/total/norm"]
        assert 0 < residual and values["grad/compression/residual_to_gradient"] == pytest.approx(residual / norm)
        assert values["grad/compression/skipped_steps"] == 0
        assert not any("cosine" in tag or "noise" in tag for tag in values)
    assert not any("compression" in tag for values in logged["danon_hybrid"].values() for tag in values)


def test_updates_are_seen_wherever_the_state_of_the_optimizer_lies(logged):
    for name in ("danon_hybrid", "sharded"):
        for step, values in logged[name].items():
            assert values == pytest.approx(logged["ddp"][step], rel=1e-4)
            assert values["grad/total/update_ratio"] > 0


def test_replicas_that_do_not_average_each_step_are_not_compared(logged):
    for name in ("late", "periodic"):
        assert logged[name]
        for values in logged[name].values():
            assert values["grad/total/norm"] > 0
            assert not any("cosine" in tag or "noise" in tag for tag in values)


@pytest.mark.parametrize("name", ["pipeline", "zero bubble"])
def test_stages_together_are_the_model(logged, name):
    options = {key: value for key, value in CASES[name][1].items()}
    alone = fit(monitor(), lightning_modules.Tied(), lightning_modules.loader(), max_steps=STEPS, **options)
    for step, values in logged[name].items():
        stages = [value for tag, value in values.items() if tag.startswith("grad/stage/")]
        assert len(stages) == {"pipeline": 2, "zero bubble": 4}[name]
        assert sum(stage**2 for stage in stages) == pytest.approx(values["grad/total/norm"] ** 2)
        common = {tag for tag in values if not tag.startswith(("grad/stage/", "grad/noise/", "grad/cosine/"))}
        assert common == set(alone[step])
        assert {tag: values[tag] for tag in common} == pytest.approx(alone[step], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "module", "step", "watched"),
    [
        ("pipeline", lightning_modules.Tied, 0, "layers"),
        ("zero bubble", lightning_modules.Tied, 0, "layers"),
        ("untied", Untied, 0, "layers"),
        ("untied", Untied, 1, ""),
    ],
)
def test_micro_batches_of_a_pipeline_are_compared(logged, name, module, step, watched):
    """What stages share does not take part; before the first step nobody knows of what is not in layers."""
    module = module().double()
    tokens, labels = list(lightning_modules.loader())[step]
    pieces = []
    for part in range(4):
        module.zero_grad()
        logits = module(tokens[2 * part : 2 * part + 2]).flatten(0, 1)
        F.cross_entropy(logits, labels[2 * part : 2 * part + 2].flatten()).backward()
        pieces.append(torch.cat([p.grad.flatten() for n, p in module.named_parameters() if n.startswith(watched)]))
    pieces = torch.stack(pieces)
    values = logged[name][step]
    assert values["grad/cosine/between_micro_batches"] == pytest.approx(cosine_of(pieces), rel=1e-6)
    batches = batches_of(pieces)
    if batches > 0:
        assert values["grad/noise/scale_to_batch"] == pytest.approx(batches, rel=1e-6)
        assert values["grad/noise/scale"] == pytest.approx(batches * 8, rel=1e-6)
