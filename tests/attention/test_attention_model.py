"""The models around the cores."""

import sys
from pathlib import Path

import pytest
import torch

from danon_lightning.attention import (
    AttentionModel,
    AttentionModelOutput,
    FullAttentionConfig,
    MSRAModel,
)
from danon_lightning.attention.kept_bytes import KeptBytes

sys.path.insert(0, str(Path(__file__).parent))
from variants import BIDIRECTIONAL, VARIANTS, build, make_config, scramble  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:num_levels is fixed")


@pytest.mark.parametrize("length", [1, 9, 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("full", {}),
        ("full", {"type_vocab_size": 2, "learned_positions": True, "num_kv_heads": 1}),
        ("msra", {}),
        ("msra", {"feature_fusion": "weighted", "num_kv_heads": 2}),
        ("msra", {"feature_fusion": "concat"}),
        ("msra", {"num_levels": 1}),
        ("msra", {"num_levels": 1, "feature_fusion": "concat"}),
        ("msra", {"num_levels": 6, "attention_dropout": 0.1, "gradient_checkpointing": True}),
        ("dala", {}),
        ("dala", {"num_kv_heads": 2, "gradient_checkpointing": True, "state_update_frequency": 4}),
        ("dala", {"use_sparse_attention": False}),
        ("dala", {"use_recursive_state": False}),
        ("dala", {"use_sparse_attention": False, "use_recursive_state": False}),
        ("dala", {"use_adaptive_router": False}),
        ("ucsa", {}),
        ("ucsa", {"num_kv_heads": 2, "gradient_checkpointing": True, "error_compensation": 0.5}),
        ("super_hybrid", {"num_kv_heads": 2}),
        ("infinite", {}),
        ("infinite", {"memory_size": 5, "num_kv_heads": 2, "gradient_checkpointing": True}),
        ("infinite", {"sliding_window": 8}),
    ],
)
def test_every_parameter_receives_a_gradient(variant, settings, causal, length):
    if not causal and variant not in BIDIRECTIONAL:
        pytest.skip("this variant is causal")
    model = build(variant, causal=causal, **settings)
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, : length // 2] = 0
    output = model(torch.randint(0, 11, (2, length)), mask).last_hidden_state
    (output * torch.randn_like(output)).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []


@pytest.mark.parametrize(
    ("variant", "causal"), [*((variant, True) for variant in VARIANTS), *((name, False) for name in BIDIRECTIONAL)]
)
def test_padding_changes_nothing_and_gives_zeros(variant, causal):
    model = scramble(build(variant, causal=causal).double())
    ids = torch.randint(0, 11, (3, 30))
    mask = torch.ones(3, 30, dtype=torch.int64)
    mask[0, :7], mask[1, 20:], mask[2] = 0, 0, 0
    output = model(ids, mask).last_hidden_state
    assert torch.count_nonzero(output[mask == 0]) == 0 and output.isfinite().all()
    changed = torch.where(mask == 1, ids, (ids + 3) % 11)
    torch.testing.assert_close(model(changed, mask).last_hidden_state, output, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(ids, mask.bool()).last_hidden_state, output, rtol=0, atol=0)
    # Right padding leaves positions and blocks where they are: the padded row equals the shorter sequence.
    alone = model(ids[1:2, :20]).last_hidden_state
    torch.testing.assert_close(output[1:2, :20], alone, rtol=0, atol=1e-12)
    output.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_left_padding_equals_a_shift_under_full_attention():
    model, ids = scramble(build("full").double()), torch.randint(0, 11, (1, 12))
    mask = torch.tensor([[0] * 5 + [1] * 12])
    padded = model(torch.cat([ids[:, :5], ids], dim=1), mask).last_hidden_state[:, 5:]
    torch.testing.assert_close(padded, model(ids).last_hidden_state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_future_does_not_leak(variant):
    model = scramble(build(variant).double())
    ids = torch.randint(0, 11, (2, 40))
    output = model(ids).last_hidden_state
    for position in (1, 8, 17, 39):
        changed = ids.clone()
        changed[:, position:] = (changed[:, position:] + 1) % 11
        other = model(changed).last_hidden_state
        torch.testing.assert_close(other[:, :position], output[:, :position], rtol=0, atol=1e-13)
        assert not torch.allclose(other[:, position], output[:, position])


@pytest.mark.parametrize("variant", BIDIRECTIONAL)
def test_both_sides_are_seen_when_not_causal(variant):
    model = scramble(build(variant, causal=False).double())
    ids = torch.randint(0, 11, (1, 40))
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 11
    difference = (model(changed).last_hidden_state - model(ids).last_hidden_state).abs().amax(dim=-1)
    assert (difference > 1e-9).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("saving", ["gradient_checkpointing", "memory_efficient"])
def test_recomputation_changes_nothing(variant, saving):
    settings = {"dropout": 0.2, "attention_dropout": 0.2}
    plain, checkpointed = build(variant, **settings), build(variant, **settings, **{saving: True})
    ids, results = torch.randint(0, 11, (2, 40)), []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        loss = model(ids, torch.ones_like(ids)).last_hidden_state.square().mean()
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_recomputation_keeps_less():
    kept = []
    for saving in ({}, {"memory_efficient": True}, {"gradient_checkpointing": True}):
        model = build("msra", max_sequence_length=512, **saving)
        counter = KeptBytes(model.parameters())
        with counter:
            model(torch.randint(0, 11, (1, 512)))
        kept.append(counter.count)
    assert kept[1] < 0.7 * kept[0] and kept[2] < 0.7 * kept[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_queries_and_keys_of_unit_scale(variant):
    ids, outputs = torch.randint(0, 11, (2, 40)), {}
    for factor in (0.0, 0.5, 1.0):
        for scale in (1.0, 1000.0):
            model = build(variant, stability_factor=factor)
            with torch.no_grad():
                model.layers[0].qkv.weight[:32].mul_(scale)
            outputs[factor, scale] = model(ids).last_hidden_state
    assert not torch.allclose(outputs[0.0, 1.0], outputs[0.5, 1.0])
    # The norm of queries and keys forgets their scale.
    torch.testing.assert_close(outputs[1.0, 1000.0], outputs[1.0, 1.0], rtol=0, atol=1e-3)
    assert not torch.allclose(outputs[0.5, 1000.0], outputs[0.5, 1.0], rtol=0, atol=1e-3)


def test_a_branch_that_leaves_its_scale_is_drawn_back():
    model = build("full", calibration_factor=1.0, num_layers=1)
    stability, block = model.layers[0].stability, model.layers[0]
    ids = torch.randint(0, 11, (2, 40))
    for _ in range(stability.warmup_steps + 1):
        model(ids)
    usual = stability.get_stability_metrics()["historical_mean"]
    with torch.no_grad():
        block.output.weight.mul_(50)
    model.eval()
    branches = []
    stability.register_forward_hook(lambda _, args, output: branches.append((args[0], output)))
    model(ids)
    before, after = (x.square().mean(dim=-1).sqrt().mean().item() for x in branches[0])
    assert before == pytest.approx(50 * usual, rel=0.2) and after == pytest.approx(usual, rel=0.1)
    assert build("full").layers[0].stability is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_acts_in_training_only(variant):
    ids = torch.randint(0, 11, (2, 40))
    for settings in ({"dropout": 0.3}, {"attention_dropout": 0.3}):
        model = scramble(build(variant, **settings))
        assert not torch.allclose(model(ids).last_hidden_state, model(ids).last_hidden_state)
        model.eval()
        torch.testing.assert_close(model(ids).last_hidden_state, model(ids).last_hidden_state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        *((variant, {}) for variant in VARIANTS),
        ("msra", {"feature_fusion": "weighted"}),
        ("msra", {"feature_fusion": "concat"}),
    ],
)
def test_bf16_autocast_runs_and_stays_close(variant, settings):
    model, ids = build(variant, **settings), torch.randint(0, 11, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    expected = model(ids, mask).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, mask).last_hidden_state
        chunk = model(ids, mask, state=model.init_state(2)).last_hidden_state
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.15)
    torch.testing.assert_close(chunk.float(), expected, rtol=0, atol=0.15)
    output.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_outputs():
    model, ids = build("msra"), torch.randint(0, 11, (2, 9))
    output = model(ids, output_hidden_states=True)
    assert isinstance(output, AttentionModelOutput) and output.state is None
    assert [tuple(hidden.shape) for hidden in output.all_hidden_states] == [(2, 9, 16)] * 3
    torch.testing.assert_close(model.final_norm(output.all_hidden_states[-1]), output.last_hidden_state)
    last, state = model(ids, state=model.init_state(2), return_dict=False)
    assert last.shape == (2, 9, 16) and state["position"] == 9
    assert len(model(ids, return_dict=False)) == 1


def test_token_types_and_positions_are_added():
    model = scramble(build("full", type_vocab_size=3, learned_positions=True).double())
    ids = torch.randint(0, 11, (2, 9))
    plain = model(ids).last_hidden_state
    zeros, counted = torch.zeros_like(ids), torch.arange(9)
    for positions, types in ((counted, zeros), (counted.expand(2, 9), zeros.bool()), (counted.int(), zeros.byte())):
        same = model(ids, token_type_ids=types, position_ids=positions).last_hidden_state
        torch.testing.assert_close(same, plain, rtol=0, atol=0)
    assert not torch.allclose(model(ids, token_type_ids=zeros + 2).last_hidden_state, plain)
    assert not torch.allclose(model(ids, position_ids=counted + 1).last_hidden_state, plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(5, dtype=torch.int64)}, r"input_ids has shape \[5\]"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, r"input_ids has shape \[2, 0\]"),
        ({"input_ids": torch.zeros(2, 5)}, "input_ids has dtype torch.float32"),
        ({"input_ids": torch.zeros(2, 65, dtype=torch.int64)}, "65 tokens, more than max_sequence_length=64"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \[2, 4\], but input_ids has shape \[2, 5\]"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask has dtype torch.float32; it must be boolean or integer"),
        ({"token_type_ids": torch.zeros(2, 5, dtype=torch.int64)}, "type_vocab_size=0"),
        ({"position_ids": torch.zeros(5, dtype=torch.int64)}, "learned_positions=False"),
        ({"position_ids": torch.zeros(3, dtype=torch.int64)}, r"position_ids must be \[2, 5\] or \[5\]"),
        ({"input_ids": torch.tensor([[3, 11]])}, "input_ids holds 11, but vocab_size=11; it must lie between 0 and 10"),
        ({"input_ids": torch.tensor([[3, -1]])}, "input_ids holds -1, but vocab_size=11"),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_errors_name_the_argument(variant, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(variant)(**{"input_ids": torch.zeros(2, 5, dtype=torch.int64), **arguments})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_type_ids", 3, "token_type_ids holds 3, but type_vocab_size=3; it must lie between 0 and 2"),
        ("token_type_ids", -2, "token_type_ids holds -2, but type_vocab_size=3"),
        ("position_ids", 64, "position_ids holds 64, but max_sequence_length=64; it must lie between 0 and 63"),
    ],
)
def test_ids_out_of_range_are_named(name, value, message):
    model, ids = build("full", type_vocab_size=3, learned_positions=True), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        model(ids, **{name: torch.tensor([[0, value]])})


def test_constructors():
    config = make_config("msra")
    assert MSRAModel(config, num_layers=1).config.num_layers == 1
    assert config.num_layers == 2
    assert MSRAModel(config).state_dict().keys() == AttentionModel(config).state_dict().keys()
    with pytest.raises(TypeError, match="must be an instance of MSRAConfig"):
        MSRAModel(FullAttentionConfig())
    with pytest.raises(TypeError, match="blocksize: not a setting of this model; use one of .*block_size"):
        MSRAModel(blocksize=4)
    with pytest.raises(ValueError, match="AttentionConfig belongs to no attention variant"):
        AttentionModel()


@pytest.mark.parametrize("fusion", ["adaptive", "weighted", "concat"])
def test_initial_values_also_after_the_meta_device(fusion):
    model = build("msra", initializer_range=0.05, hidden_size=64, feature_fusion=fusion)
    with torch.device("meta"):
        later = build("msra", initializer_range=0.05, hidden_size=64, feature_fusion=fusion)
    later.to_empty(device="cpu")
    for module in later.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    for name, expected in model.state_dict().items():
        found = later.state_dict()[name]
        assert found.std().item() == pytest.approx(expected.std().item(), rel=0.2, abs=1e-6), name
        assert found.mean().item() == pytest.approx(expected.mean().item(), abs=0.01), name
    core = model.layers[0].core
    assert torch.count_nonzero(core.pool_query) == 0
    assert torch.equal(core.key_maps, torch.eye(16).expand_as(core.key_maps))
    assert model.layers[0].qkv.weight.std().item() == pytest.approx(0.05, rel=0.1)
    if fusion == "adaptive":
        assert torch.count_nonzero(core.level_bias.weight) == 0


# How much work selected blocks make depends on the values: compilers leave that part out, and exporters cannot.
WHOLE_GRAPHS = [variant for variant in VARIANTS if variant not in ("ucsa", "super_hybrid")]


@pytest.mark.parametrize("variant", WHOLE_GRAPHS)
def test_export_keeps_the_results(variant):
    model = scramble(build(variant, num_layers=1)).eval()
    program = torch.export.export(model, (torch.randint(0, 11, (2, 40)),), kwargs={"return_dict": False})
    other = torch.randint(0, 11, (2, 40))
    exported = program.module()(other, return_dict=False)[0]
    torch.testing.assert_close(exported, model(other).last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "settings"), [*((variant, {}) for variant in [*WHOLE_GRAPHS, "ucsa"]), ("msra", {"num_levels": 1})]
)
def test_compiled_gradients_are_the_same(variant, settings):
    model, ids = scramble(build(variant, num_layers=1, **settings).double()), torch.randint(0, 11, (2, 40))
    results, whole = [], variant in WHOLE_GRAPHS
    for forward in (model, torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=whole)):
        model.zero_grad()
        forward(ids).last_hidden_state.sin().sum().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation", "relu"),
        ("activation", "swish"),
        ("layer_norm_eps", 0.1),
        ("rope_base", 100.0),
        ("rope_base", None),
        ("stability_factor", 0.5),
    ],
)
@pytest.mark.parametrize("variant", ["full", "super_hybrid"])  # the latter is made of all others
def test_shared_settings_act(variant, name, value):
    model, other = scramble(build(variant)), build(variant, **{name: value})
    other.load_state_dict(model.state_dict())
    ids = torch.randint(0, 11, (2, 40))
    assert not torch.allclose(model(ids).last_hidden_state, other(ids).last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_those_of_the_settings(variant):
    model = build(variant, num_layers=3, num_heads=8, num_kv_heads=2, intermediate_size=24, vocab_size=13)
    block = model.layers[0]
    assert len(model.layers) == 3 and model.token_embedding.weight.shape == (13, 16)
    assert block.qkv.weight.shape == (16 + 2 * 2 * 2, 16) and block.mlp_in.weight.shape == (24, 16)
    assert model(torch.randint(0, 13, (2, 40))).last_hidden_state.shape == (2, 40, 16)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"stability_factor": 1.5}, r"stability_factor=1.5 must lie in \[0, 1\]"),
        ({"calibration_factor": -0.1}, r"calibration_factor=-0.1 must lie in \[0, 1\]"),
    ],
)
def test_shared_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        make_config("full", **setting)
