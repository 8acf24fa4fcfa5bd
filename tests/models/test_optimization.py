"""What is decayed, the schedule, and each optimizer."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from danon_lightning.attention import available_variants
from danon_lightning.models import OptimizerConfig, SequenceClassifier
from danon_lightning.models.optimization import build_optimizer, warmup_cosine
from danon_lightning.optim import OneBitAdam

sys.path.insert(0, str(Path(__file__).parent))
from small_models import config_of, scrambled  # noqa: E402


class Map(nn.Linear):
    """A linear layer of one's own, with a matrix that is none of its weights."""

    def __init__(self):
        super().__init__(4, 3)
        self.gain = nn.Parameter(torch.ones(2, 3))


def test_only_weights_of_linear_layers_are_decayed():
    model = nn.ModuleDict({"e": nn.Embedding(5, 4), "l": Map(), "c": nn.Conv1d(3, 3, 2), "n": nn.LayerNorm(3)})
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert {name for name, p in model.named_parameters() if decay[id(p)] == 0.3} == {"l.weight"}


@pytest.mark.parametrize("variant", available_variants())
def test_without_gradients_only_weights_of_linear_layers_shrink(variant):
    config = config_of(variant, max_sequence_length=64, learned_positions=True, type_vocab_size=2)
    module = scrambled(SequenceClassifier(variant, 3, config))
    optimizer = build_optimizer(module, OptimizerConfig(learning_rate=0.1))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(20):
        optimizer.step()
    linear = [f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    for name, parameter in module.named_parameters():
        left = 0.99**20 if name in linear else 1.0  # 1 - learning rate times decay
        torch.testing.assert_close(parameter.detach(), left * before[name], msg=name)


def test_a_tied_embedding_is_not_decayed():
    model = nn.ModuleDict({"e": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["e"].weight
    optimizer = build_optimizer(model, OptimizerConfig())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


def test_the_learning_rate_rises_and_falls():
    factor = warmup_cosine(OptimizerConfig(warmup_steps=10, final_learning_rate=0.1), total_steps=110)
    assert [factor(0), factor(4), factor(9)] == [0.1, 0.5, 1.0]
    assert factor(10) == 1.0
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == factor(10_000) == pytest.approx(0.1)
    assert all(factor(step) >= factor(step + 1) for step in range(10, 110))


def test_an_endless_run_keeps_its_peak():
    factor = warmup_cosine(OptimizerConfig(warmup_steps=0), float("inf"))
    assert factor(0) == factor(1_000_000) == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", 0.0), ("weight_decay", -1.0), ("beta2", 1.0), ("warmup_steps", -1), ("final_learning_rate", 2)],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{field: value})


def test_it_minimises():
    model = nn.Linear(3, 1)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.1, weight_decay=0.0))
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-2


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("onebit_adam", OneBitAdam)]
)
def test_each_optimizer_minimises(name, kind):
    parameter = nn.Parameter(torch.tensor([3.0, -2.0]))
    module = nn.Module()
    module.x = parameter
    optimizer = build_optimizer(module, OptimizerConfig(name=name, learning_rate=0.05, freeze_step=20))
    assert type(optimizer) is kind
    for _ in range(200):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
    assert parameter.abs().max() < 0.1


def test_an_unknown_optimizer_is_named_with_the_valid_ones():
    with pytest.raises(ValueError, match="name='lion' must be one of: 'adamw', 'sgd', 'onebit_adam'"):
        OptimizerConfig(name="lion")
