"""What an MSRA model tells about its attention."""

import sys
from pathlib import Path

import pytest
import torch

from danon_lightning.attention.core import observing
from danon_lightning.attention.efficiency import measure_efficiency

sys.path.insert(0, str(Path(__file__).parent))
from variants import VARIANTS, build, scramble  # noqa: E402

IDS = torch.randint(0, 11, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_weights_are_those_of_the_tokens(causal):
    model = scramble(build("msra", causal=causal, num_kv_heads=2).double())
    mask = torch.ones_like(IDS)
    mask[0, :20], mask[1, 50:] = 0, 0
    weights = model.compute_attention_weights(IDS, mask)
    assert list(weights) == ["layer_0", "layer_1"] and weights["layer_0"].shape == (2, 4, 60, 60)
    found = weights["layer_1"]
    rows = found.sum(dim=-1)
    sees = mask.cumsum(dim=1) > 0 if causal else torch.ones_like(mask, dtype=torch.bool)
    torch.testing.assert_close(rows, sees[:, None].double().expand_as(rows))
    assert (found >= 0).all() and torch.count_nonzero(found[0, :, :, :20]) == 0
    assert not causal or torch.count_nonzero(found.triu(1)) == 0
    # With values that the maps leave alone, they give the output of the core.
    core = model.layers[1].core
    torch.nn.init.zeros_(core.value_maps)
    core.value_maps.data += torch.eye(4)
    x, q = torch.randn(2, 60, 16).double(), torch.randn(2, 4, 60, 4).double()
    k, v = torch.randn(2, 2, 2, 60, 4).double().unbind(0)
    with observing([core], ["attentions"]) as observed:
        output, _ = core(x, q, k, v, key_padding_mask=mask.bool())
    expected = observed[0]["attentions"] @ v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_attention_weights_need_one_softmax():
    with pytest.raises(ValueError, match="feature_fusion='concat' has no common weights"):
        build("msra", feature_fusion="concat").compute_attention_weights(IDS)
    assert build("msra", feature_fusion="concat")(IDS, output_details=("attentions",)).attentions is None


def test_level_weights_are_shares():
    shares = build("msra")(IDS, output_details=("level_weights",)).level_weights
    assert shares[1].shape == (2, 4, 60, 4)
    torch.testing.assert_close(shares[1].sum(dim=-1), torch.ones(2, 4, 60))


def test_compression_is_counted():
    model = build("msra", block_size=4, compression_factor=2, max_sequence_length=64)
    stats = model.get_compression_stats(IDS)
    seen = 0
    for i in range(60):
        for level in range(4):
            span = 2**level
            for j in range(-(-60 // span)):
                own = i // (4 * span)
                if level == 0:
                    seen += (own - 1) * 4 <= j <= i
                else:
                    below = i // (2 * span)
                    seen += j * span >= (own - 1) * 4 * span and (j + 1) * span <= (below - 1) * 2 * span
    assert stats["compression_ratio"] == pytest.approx(seen / (60 * 61 / 2))
    assert set(stats) == {"compression_ratio", "information_retention", "computation_savings", "memory_savings"}


@pytest.mark.parametrize("causal", [True, False])
def test_padding_does_not_count_as_compression(causal):
    model, mask = build("msra", causal=causal), torch.zeros_like(IDS)
    mask[:, :20] = 1
    alone = model.get_compression_stats(IDS[:, :20])["compression_ratio"]
    assert model.get_compression_stats(IDS, mask)["compression_ratio"] == pytest.approx(alone)
    with pytest.raises(ValueError, match="attention_mask has no real token"):
        model.get_compression_stats(IDS, 0 * mask)


def test_measuring_is_done_in_evaluation_mode_and_leaves_no_trace():
    model = scramble(build("msra", dropout=0.3, attention_dropout=0.3, calibration_factor=1.0))
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (model.compute_attention_weights(IDS)["layer_1"] for _ in range(2))
    model.get_compression_stats(IDS)
    assert torch.equal(first, second) and modes == [module.training for module in model.modules()]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(first, model.eval().compute_attention_weights(IDS)["layer_1"])


@pytest.mark.parametrize("causal", [True, False])
def test_full_attention_neither_saves_nor_loses(causal):
    model = scramble(build("full", causal=causal, num_kv_heads=2))
    mask = torch.ones_like(IDS)
    mask[0, 40:] = 0
    assert measure_efficiency(model, IDS, mask).information_retention == pytest.approx(1, abs=1e-5)
    assert measure_efficiency(model, IDS).computation_savings == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_efficiency_of_every_variant(variant):
    model = build(variant, hidden_size=32, max_sequence_length=2048)
    few, many = (measure_efficiency(model, torch.randint(0, 11, (1, length))) for length in (128, 1024))
    if variant != "full":
        assert many.computation_savings > few.computation_savings and many.computation_savings > 0.4
        assert many.memory_savings > few.memory_savings and many.information_retention < 0.9999
    assert not model.layers[0].core._forward_pre_hooks and model.training


@pytest.mark.filterwarnings("ignore:num_levels is fixed")
def test_what_a_window_retains_falls_with_its_size():
    wide, narrow = (build("msra", block_size=size, num_levels=1) for size in (16, 4))
    assert measure_efficiency(wide, IDS).information_retention > measure_efficiency(narrow, IDS).information_retention
    with pytest.raises(ValueError, match=r"input_ids has shape \[1, 2049\]; a sample of at most 2048"):
        measure_efficiency(wide, torch.zeros(1, 2049, dtype=torch.int64))
