"""What the settings of the hybrid do, and what its monitor measures."""

import sys
import time
from pathlib import Path

import pytest
import torch

from danon_lightning.attention import SuperHybridConfig, SuperHybridModel
from danon_lightning.attention.hybrid import component_prior

sys.path.insert(0, str(Path(__file__).parent))
from variants import SETTINGS, SIZES, build, make_config, scramble  # noqa: E402

IDS = torch.randint(0, 11, (2, 40), generator=torch.Generator().manual_seed(0))
SMALL = {name: SETTINGS[name] for name in ("msra", "dala")}


def test_one_component_is_that_variant():
    model = scramble(build("super_hybrid", components="msra", settings={"msra": SMALL["msra"]}).double())
    alone = build("msra").double()
    alone.load_state_dict({name.replace("components.msra.", ""): x for name, x in model.state_dict().items()})
    torch.testing.assert_close(model(IDS).last_hidden_state, alone(IDS).last_hidden_state, rtol=0, atol=0)


def test_components_start_with_equal_shares_and_are_weighed_by_the_token():
    config = {"components": "msra+dala", "settings": SMALL, "num_layers": 1}
    model = build("super_hybrid", **config).double()
    output = model(IDS)
    assert [tuple(weights.shape) for weights in output.component_weights] == [(2, 2, 4, 40)]
    torch.testing.assert_close(output.component_weights[0], torch.full((2, 2, 4, 40), 0.5).double())
    scramble(model)
    weights = model(IDS).component_weights[0]
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 4, 40).double())
    assert weights.std(dim=-1).min() > 1e-6
    # The weighted sum of what the components give on the same queries, keys and values.
    core = model.layers[0].core
    x, q, k, v = torch.randn(2, 40, 16).double(), *torch.randn(3, 2, 4, 40, 4).double().unbind(0)
    mixed, _ = core(x, q, k, v)
    share = core._weights(x).unsqueeze(-1)
    parts = [part(x, q, k, v)[0] for part in core.components.values()]
    torch.testing.assert_close(mixed, share[:, 0] * parts[0] + share[:, 1] * parts[1], rtol=0, atol=1e-12)


def test_temperature_and_prior_steer_the_gate():
    config = {"components": "msra+dala", "settings": SMALL, "num_layers": 1}
    plain = scramble(build("super_hybrid", **config))
    weights = plain(IDS).component_weights[0]

    def same_parameters(**settings):
        model = build("super_hybrid", **config, **settings)
        model.load_state_dict(plain.state_dict())
        return model(IDS).component_weights[0]

    assert (same_parameters(router_temperature=4.0) - 0.5).abs().mean() < (weights - 0.5).abs().mean() / 2
    assert (same_parameters(prior={"dala": 1.0})[:, 1] > weights[:, 1]).all()
    odds = torch.logit(same_parameters(prior={"dala": 1.0})[:, 1]) - torch.logit(weights[:, 1])
    torch.testing.assert_close(odds, torch.ones_like(odds), rtol=0, atol=1e-4)
    # Both are divided by the temperature.
    both = torch.logit(same_parameters(prior={"dala": 1.0}, router_temperature=2.0)[:, 1])
    torch.testing.assert_close(both, (torch.logit(weights[:, 1]) + 1) / 2, rtol=0, atol=1e-4)


def test_layers_take_turns():
    model = build("super_hybrid", components="msra, dala+msra ,dala", settings=SMALL, num_layers=4)
    kinds = [list(block.core.components) for block in model.layers]
    assert kinds == [["msra"], ["dala", "msra"], ["dala"], ["msra"]]
    assert model(IDS).component_weights[1].shape[1] == 2


def test_settings_reach_the_components():
    config = SuperHybridConfig(components="msra+dala", num_levels=2, settings={"dala": {"memory_size": 7}})
    assert config.component_config("msra").num_levels == 2 and config.component_config("dala").memory_size == 7
    assert SuperHybridConfig(components="msra", compression_ratio=0.125).component_config("msra").pool_factor == 8
    plain = SuperHybridConfig(components="dala", enable_all_optimizations=False)
    assert not plain.component_config("dala").use_recursive_state
    assert not plain.component_config("dala").use_adaptive_router
    given = {"dala": {"use_recursive_state": True}}
    assert (
        SuperHybridConfig(components="dala", enable_all_optimizations=False, settings=given)
        .component_config("dala")
        .use_recursive_state
    )


def test_prior_is_the_weighted_sum_of_scores():
    scores = {"msra": 0.9, "dala": 0.5}
    prior = component_prior(scores, {"msra": 1, "dala": 2}, {"msra": 3, "dala": 4}, speed_weight=10, memory_weight=100)
    assert prior == {"msra": pytest.approx(310.9), "dala": pytest.approx(420.5)}
    with pytest.raises(ValueError, match="scores of different components"):
        component_prior(scores, scores, {"msra": 1.0})


def test_the_monitor_measures():
    model = scramble(build("super_hybrid", components="msra+dala,dala", settings=SMALL, num_layers=2))
    assert model.get_performance_stats().passes == 0
    with model.performance_monitor() as stats:
        for _ in range(3):
            weights = model(IDS).component_weights[0]
    assert model.get_performance_stats() is stats and stats.passes == 3
    assert set(stats.computation_time) == {"msra", "dala"} and stats.computation_time["dala"] > 0
    share = weights.mean(dim=(0, 2, 3))
    torch.testing.assert_close(stats.attention_distribution["msra"], share[0].item())
    torch.testing.assert_close(stats.attention_distribution["dala"], (share[1].item() + 1) / 2)
    # Twice as long an input keeps about twice as much; nothing is kept without gradients.
    kept = stats.memory_usage
    with model.performance_monitor() as double:
        model(IDS.repeat(2, 1))
    assert 1.8 * kept["dala"] < double.memory_usage["dala"] < 2.2 * kept["dala"]
    with model.performance_monitor() as without, torch.no_grad():
        model(IDS)
    assert without.memory_usage == {"msra": 0, "dala": 0}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_monitor_counts_recomputed_passes_once():
    model = build("super_hybrid", components="msra+dala", settings=SMALL, gradient_checkpointing=True)
    with model.performance_monitor() as stats:
        output = model(IDS).last_hidden_state
        spent = dict(stats.computation_time)
        output.sum().backward()
    assert stats.passes == 1 and stats.computation_time == spent and stats.memory_usage == {"msra": 0, "dala": 0}


def test_a_component_that_fails_leaves_nothing_behind():
    model = build("super_hybrid", components="msra+dala", settings=SMALL)
    dala = model.layers[0].core.components["dala"]

    def broken(*args, **kwargs):
        raise ArithmeticError("broken")

    with model.performance_monitor() as stats:
        forward, dala.forward = dala.forward, broken
        with pytest.raises(ArithmeticError, match="broken"):
            model(IDS)
        dala.forward = forward
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        model(IDS)
    assert stats.passes == 1
    with model.performance_monitor() as alone:
        model(IDS)
    assert stats.memory_usage == alone.memory_usage


def test_time_is_that_of_the_component():
    model = build("super_hybrid", components="msra+dala", settings=SMALL, num_layers=1)
    dala, forward = model.layers[0].core.components["dala"], model.layers[0].core.components["dala"].forward

    def slow(*args, **kwargs):
        time.sleep(0.2)
        return forward(*args, **kwargs)

    dala.forward = slow
    with model.performance_monitor() as stats:
        model(IDS)
    assert 0.2 <= stats.computation_time["dala"] and stats.computation_time["msra"] < stats.computation_time["dala"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": "msra+nothing"}, "name='nothing' is not an attention variant"),
        ({"components": ["msra"]}, "components=.'msra'. must be a string"),
        ({"components": "msra+msra"}, "each once a layer"),
        ({"components": "msra,,dala"}, "each once a layer"),
        ({"components": "super_hybrid"}, "must name other variants"),
        ({"components": "msra", "settings": {"dala": {}}}, "settings names dala, but components='msra' does not"),
        ({"components": "msra", "prior": {"dala": 1.0}}, "prior names dala, but components='msra' does not"),
        ({"components": "msra", "settings": {"msra": {"block_size": 0}}}, "block_size=0"),
        ({"settings": {"msra": {"causal": False}}}, "settings gives msra causal=False, but components share it: set"),
        ({"settings": {"msra": {"num_heads": 8}}}, "settings gives msra num_heads=8, but components share it"),
        ({"settings": {"msra": {"blocks": 8}}}, "settings gives msra blocks=8, which it does not have: .*block_size"),
        ({"components": "msra", "router_temperature": 0.0}, "router_temperature=0.0 must be positive"),
        ({"components": "msra", "compression_ratio": 0.4}, "compression_ratio=0.4 must be one over an integer"),
        ({"components": "msra", "diversity_weight": -1.0}, "diversity_weight=-1.0 must not be negative"),
        ({"components": "msra+dala", "causal": False}, "causal=False is not possible with dala"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SuperHybridModel(**{**SIZES, **settings})


def test_signatures_tell_hybrids_apart():
    one, other = (
        build("super_hybrid", settings={**make_config("super_hybrid").settings, "dala": d})
        for d in ({}, {"block_size": 8})
    )
    with pytest.raises(ValueError, match="another configuration"):
        one(IDS, state=other.init_state(2))
