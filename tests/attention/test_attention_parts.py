"""The pieces that variants are made of."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from danon_lightning.attention import (
    AttentionConfig,
    AttentionModel,
    FullAttentionConfig,
    MSRAConfig,
    available_variants,
    get_variant,
    register_variant,
)
from danon_lightning.attention.conv import DepthwiseConv
from danon_lightning.attention.core import AttentionCore, map_state
from danon_lightning.attention.full import FullAttention, full_attention
from danon_lightning.attention.layers import keep_in_graph
from danon_lightning.attention.merging import MASKED, attention_part, has_visible_keys, merge_parts
from danon_lightning.attention.pooling import pool_cells, token_cells
from danon_lightning.attention.registry import variant_of
from danon_lightning.attention.rotary import apply_rotary, cell_positions


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_merged_parts_equal_one_softmax_over_all_keys():
    torch.manual_seed(0)
    q, k, v, bias = double(2, 6, 4), double(2, 10, 4), double(2, 10, 4), double(2, 3, 10)
    expanded = bias.repeat_interleave(2, dim=-2)
    expected = torch.softmax(q @ k.mT + expanded, dim=-1) @ v
    cuts = [slice(0, 3), slice(3, 9), slice(9, 10)]
    merged = merge_parts([attention_part(q, k[:, cut], v[:, cut], bias[..., cut]) for cut in cuts])
    torch.testing.assert_close(merged.output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged.lse, torch.logsumexp(q @ k.mT + expanded, dim=-1), rtol=0, atol=1e-12)

    def through(output, lse):
        return torch.autograd.grad((output.sin().sum(), lse.square().sum()), (q, k, v))

    lse = torch.logsumexp(q @ k.mT + expanded, dim=-1)
    for ours, theirs in zip(through(merged.output, merged.lse), through(expected, lse), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_part_without_visible_keys_weighs_nothing():
    torch.manual_seed(0)
    q, k, v = double(1, 2, 4), double(1, 3, 4), double(1, 3, 4)
    seen = attention_part(q, k, v, torch.zeros(1, 1, 3, dtype=torch.float64))
    hidden = attention_part(q, 5 * k, 5 * v, torch.full((1, 1, 3), MASKED, dtype=torch.float64))
    assert has_visible_keys(seen.lse).all() and not has_visible_keys(hidden.lse).any()
    merged = merge_parts([seen, hidden])
    torch.testing.assert_close(merged.output, seen.output, rtol=0, atol=0)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(merged.output.sum(), (q, k, v)))


def test_rotary_logits_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = double(1, 8), double(1, 8)
    here, there = cell_positions(5, 1, 1, q.device), cell_positions(2, 1, 1, q.device)
    logit = apply_rotary(q, here, 100.0) @ apply_rotary(k, there, 100.0).mT
    shifted = apply_rotary(q, here + 1e6, 100.0) @ apply_rotary(k, there + 1e6, 100.0).mT
    torch.testing.assert_close(logit, shifted, rtol=0, atol=1e-8)
    assert apply_rotary(q, here, None) is q
    assert cell_positions(2, 2, 4, q.device).tolist() == [9.5, 13.5]


def test_pooling_averages_real_tokens_only():
    keys = torch.arange(5.0).reshape(1, 1, 5, 1)
    mask = torch.tensor([[True, False, True, True, True]])
    cells = pool_cells(token_cells(keys, 10 * keys, mask), 2)
    assert cells.keys.flatten().tolist() == [0.0, 2.5, 4.0]
    assert cells.values.flatten().tolist() == [0.0, 25.0, 40.0]
    torch.testing.assert_close(cells.log_mass.exp(), torch.tensor([[1.0, 2.0, 1.0]]))
    # A cell above counts tokens, not cells: (1 · 0 + 2 · 2.5) / 3.
    torch.testing.assert_close(pool_cells(cells, 2).keys.flatten(), torch.tensor([5 / 3, 4.0]))


@pytest.mark.parametrize("masked", [True, False])
def test_pooling_piece_by_piece_changes_nothing(masked, monkeypatch):
    torch.manual_seed(0)
    keys, values, query, maps = double(2, 3, 23, 4), double(2, 3, 23, 5), double(3, 4), double(3, 4, 4)
    mask = (torch.rand(2, 23) < 0.7) if masked else None

    def pool():
        cells = token_cells(keys, values, mask)
        return pool_cells(cells._replace(log_mass=cells.log_mass.double()), 4, pool_query=query, key_map=maps)

    whole = pool()
    monkeypatch.setattr("danon_lightning.attention.pooling.CELLS_AT_ONCE", 10)
    pieces = pool()
    with torch.no_grad():
        written = pool()
    sources = (keys, values, query, maps)
    upstream = [torch.randn_like(x) for x in whole[:2]]
    for one, other, last in zip(whole, pieces, written, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-13)
        torch.testing.assert_close(last, one, rtol=0, atol=1e-13)
    for one, other in zip(*(torch.autograd.grad(x[:2], sources, upstream) for x in (whole, pieces)), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_convolution_is_the_identity_at_first_and_keeps_to_its_side(causal):
    torch.manual_seed(0)
    conv = DepthwiseConv(6, causal=causal).double()
    x = double(2, 9, 6)
    torch.testing.assert_close(conv(x)[0], x, rtol=0, atol=0)
    torch.nn.init.normal_(conv.weight)
    (grad,) = torch.autograd.grad(conv(x)[0][:, 4].sum(), x)
    reached = grad.abs().sum(dim=(0, 2)).nonzero().flatten().tolist()
    assert reached == ([1, 2, 3, 4] if causal else [3, 4, 5])


def test_convolution_streams_exactly():
    torch.manual_seed(0)
    conv = DepthwiseConv(6, causal=True).double()
    torch.nn.init.normal_(conv.weight)
    x, state, outputs = double(2, 9, 6), conv.init_state(2), []
    for chunk in x.split([1, 2, 5, 1], dim=1):
        output, state = conv(chunk, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), conv(x)[0], rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="causal=False"):
        DepthwiseConv(6, causal=False).init_state(2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("queries", [1, 4, 7])
def test_full_attention_equals_its_definition(causal, masked, queries):
    torch.manual_seed(0)
    q, k, v = double(2, 4, queries, 6), double(2, 2, 7, 6), double(2, 2, 7, 6)
    mask = torch.tensor([[False] * 2 + [True] * 5, [False] * 7]) if masked else None
    logits = q @ k.repeat_interleave(2, dim=1).mT / 6**0.5
    visible = torch.ones(2, 1, queries, 7, dtype=torch.bool)
    if causal:
        visible = visible & (torch.arange(7) <= torch.arange(7 - queries, 7)[:, None])
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    weights = torch.softmax(logits.masked_fill(~visible, float("-inf")), dim=-1).nan_to_num(0.0)
    expected = weights @ v.repeat_interleave(2, dim=1)
    output = full_attention(q, k, v, causal=causal, key_padding_mask=mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), (q, k, v)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 0, 6)}, r"q has shape \[2, 4, 0, 6\]"),
        ({"k": torch.zeros(2, 3, 7, 6)}, r"k has shape \[2, 3, 7, 6\], but q has shape .* that divides"),
        ({"k": torch.zeros(2, 2, 7, 5)}, r"k has shape \[2, 2, 7, 5\], but q has shape .* shape \[2, 2, 7, 6\]"),
        ({"k": torch.zeros(2, 2, 3, 6)}, "k must have at least 4 tokens, for causal queries are the last of them"),
        ({"k": torch.zeros(2, 2, 0, 6), "causal": False}, "k must have at least 1 tokens"),
        ({"v": torch.zeros(2, 2, 5, 6)}, r"v has shape \[2, 2, 5, 6\], but .* k \[2, 2, 7, 6\]; v must have shape"),
        ({"v": torch.zeros(2, 2, 7, 6).double()}, "v has dtype torch.float64, but q has dtype torch.float32"),
        ({"k": torch.zeros(2, 2, 7, 6).bfloat16()}, "k has dtype torch.bfloat16, but q has dtype torch.float32"),
        ({"key_padding_mask": torch.ones(1, 7).bool()}, r"mask has shape \[1, 7\], but .* must have shape \[2, 7\]"),
        ({"key_padding_mask": torch.ones(2, 7)}, "key_padding_mask has dtype torch.float32; it must be torch.bool"),
    ],
)
def test_full_attention_names_the_argument(change, message):
    tensors = {"q": torch.zeros(2, 4, 4, 6), "k": torch.zeros(2, 2, 7, 6), "v": torch.zeros(2, 2, 7, 6)}
    with pytest.raises(ValueError, match=message):
        full_attention(**{**tensors, **change})


def test_kept_tensors_receive_zero_gradients():
    x, unused = double(3), double(2)
    kept = keep_in_graph(x, unused)
    torch.testing.assert_close(kept, x)
    grads = torch.autograd.grad(kept.sum(), (x, unused))
    assert grads[0].tolist() == [1.0] * 3 and grads[1].tolist() == [0.0] * 2


def test_map_state_keeps_the_nest():
    state = {"a": [torch.ones(1), 3], "b": (torch.zeros(2), None)}
    mapped = map_state(lambda tensor: tensor + 1, state)
    assert mapped["a"][0].item() == 2 and mapped["a"][1] == 3
    assert isinstance(mapped["b"], tuple) and mapped["b"][0].tolist() == [1, 1] and mapped["b"][1] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 must be an integer"),
        ({"num_layers": 2.0}, "num_layers=2.0 must be an integer"),
        ({"hidden_size": 100, "num_heads": 3}, "hidden_size=100 must be a multiple of num_heads=3; use hidden_size=99"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"hidden_size": 20}, "odd width 5"),
        ({"activation": "tanh"}, "activation='tanh' must be one of 'gelu', 'relu', 'swish'"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps=0.0 must be positive"),
        ({"rope_base": 1.0}, "rope_base=1.0 must be above 1"),
        ({"type_vocab_size": -1}, "type_vocab_size=-1"),
        ({"block_size": 62}, "block_size=62 must be a positive multiple of the pooling factor 4; use block_size=64"),
        ({"compression_factor": 1}, "compression_factor=1"),
        ({"num_levels": "many"}, "num_levels='many'"),
        ({"num_levels": 0}, "num_levels=0"),
        ({"feature_fusion": "sum"}, "feature_fusion='sum' must be one of 'adaptive', 'weighted', 'concat'"),
        ({"compression_alpha": -1.0}, "compression_alpha=-1.0"),
        ({"compression_alpha": "0.5"}, "compression_alpha='0.5' must be a number or None"),
        ({"causal": "no"}, "causal='no' must be True or False"),
        ({"memory_efficient": 1}, "memory_efficient=1 must be True or False"),
        ({"dropout": "0.1"}, "dropout='0.1' must be a number$"),
        ({"stability_factor": True}, "stability_factor=True must be a number$"),
        ({"layer_norm_eps": None}, "layer_norm_eps=None must be a number$"),
        ({"rope_base": "1e4"}, "rope_base='1e4' must be a number or None"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MSRAConfig(**settings)


def test_pooling_factor_follows_from_the_longest_sequence():
    config = MSRAConfig(compression_alpha=0.5, max_sequence_length=2048)
    assert config.pool_factor == 4
    assert dataclasses.replace(config, max_sequence_length=2).pool_factor == 2
    assert dataclasses.replace(config, compression_alpha=9.0).pool_factor == 16
    assert MSRAConfig(max_sequence_length=2048).geometry.num_levels == 3


class ThirdPartyConfig(FullAttentionConfig):
    """A variant that someone else adds."""


class UniformAttention(FullAttention):
    """Forgets the queries."""

    def forward(self, x, q, k, v, **kwargs):
        return super().forward(x, torch.zeros_like(q), k, v, **kwargs)


def test_a_third_party_adds_a_variant(monkeypatch):
    monkeypatch.setattr("danon_lightning.attention.registry._variants", {})
    register_variant("uniform", ThirdPartyConfig, UniformAttention)
    register_variant("uniform", ThirdPartyConfig, UniformAttention)
    assert available_variants() == ("uniform",)
    model = AttentionModel(ThirdPartyConfig(hidden_size=16, num_layers=1))
    assert isinstance(model.layers[0].core, UniformAttention)
    assert model(torch.zeros(1, 3, dtype=torch.int64)).last_hidden_state.shape == (1, 3, 16)
    with pytest.raises(ValueError, match="collides"):
        register_variant("other", ThirdPartyConfig, UniformAttention)
    with pytest.raises(ValueError, match="lower-case"):
        register_variant("My variant", MSRAConfig, UniformAttention)
    with pytest.raises(TypeError, match="AttentionCore"):
        register_variant("linear", MSRAConfig, torch.nn.Linear)
    with pytest.raises(TypeError, match="AttentionConfig"):
        register_variant("linear", dict, UniformAttention)


def test_variants_are_found_by_name_and_by_config():
    assert {"full", "msra"} <= set(available_variants())
    assert get_variant("msra").config_class is MSRAConfig
    assert issubclass(get_variant("full").attention_class, AttentionCore)
    assert variant_of(ThirdPartyConfig()).name == "full"
    with pytest.raises(ValueError, match="'dense' is not an attention variant; use one of .*full.*msra"):
        get_variant("dense")
    with pytest.raises(ValueError, match="AttentionConfig belongs to no attention variant"):
        variant_of(AttentionConfig())


def test_package_depends_on_no_other_part_of_the_project():
    code = (
        "import sys, danon_lightning\n"
        "before = set(sys.modules)\n"
        "import danon_lightning.attention\n"
        "added = {name for name in set(sys.modules) - before if name.startswith('danon_lightning.')}\n"
        "print([name for name in added if not name.startswith('danon_lightning.attention')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_dropout_of_attention_weights_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 2000, 4), torch.randn(1, 1, 6, 4), torch.ones(1, 1, 6, 4)
    part = attention_part(q, k, v, torch.zeros(1, 6), dropout_p=0.5)
    assert part.output.std() > 0.1
    assert part.output.mean().item() == pytest.approx(1.0, abs=0.05)
    torch.testing.assert_close(part.lse, attention_part(q, k, v, torch.zeros(1, 6)).lse)
