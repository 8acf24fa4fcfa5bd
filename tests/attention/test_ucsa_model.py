"""What the settings of UCSA do, and what its methods and output fields say."""

import math
import sys
from pathlib import Path

import pytest
import torch

from danon_lightning.attention import UCSAConfig
from danon_lightning.attention.functional import ucsa_attention_reference

sys.path.insert(0, str(Path(__file__).parent))
from variants import build, make_config, scramble  # noqa: E402

IDS = torch.randint(0, 11, (2, 62), generator=torch.Generator().manual_seed(0))


def hidden(model, ids=IDS):
    return model(ids).last_hidden_state


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"block_size": 8}, 10),  # where the window is another one
        ({"local_window_size": 12}, 10),
        ({"global_tokens": 6}, 10),
        ({"sparsity_factor": 0.3}, 14),
        ({"max_selected_blocks": 1}, 14),
        ({"num_levels": 1}, 18),
        ({"error_tolerance": 0.9}, 10),
        ({"error_compensation": 0.0}, 14),
        ({"rope_base": None}, 1),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_act_where_they_should(settings, first):
    model = scramble(build("ucsa", num_layers=1).double())
    other = build("ucsa", num_layers=1, **settings).double()
    other.load_state_dict(model.state_dict())
    differs = (hidden(model) - hidden(other)).abs().amax(dim=(0, 2)) > 1e-9
    assert not differs[:first].any() and differs[first:].any()


def test_the_core_is_the_function_with_these_settings():
    model = scramble(build("ucsa", num_layers=1, num_kv_heads=2, max_flat_blocks=4).double())
    core, config = model.layers[0].core, model.config
    assert (config.window_blocks, config.num_blocks, config.tree_levels, config.num_selected()) == (1, 16, 3, 2)
    x, q = torch.randn(2, 62, 16).double(), torch.randn(2, 4, 62, 4).double()
    k, v = torch.randn(2, 2, 2, 62, 4).double().unbind(0)
    expected = ucsa_attention_reference(
        q, k, v, block_size=4, num_selected=2, window_blocks=1, num_sinks=2, tree_levels=3, tree_factor=2
    )
    torch.testing.assert_close(core(x, q, k, v)[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "levels", "selected"),
    [
        ({}, 1, 6),
        ({"max_sequence_length": 100_000}, 2, 8),
        ({"max_sequence_length": 1_000_000}, 3, 8),
        ({"max_sequence_length": 1_000_000, "tree_factor": 64}, 2, 8),
        ({"max_sequence_length": 1_000_000, "max_flat_blocks": 100_000}, 1, 8),
        ({"num_levels": 3, "max_selected_blocks": 4}, 3, 4),
        ({"sparsity_factor": 0.0}, 1, 1),
        ({"sparsity_factor": 0.0, "min_sparsity": 0.05}, 1, 3),
    ],
)
def test_levels_and_selection_follow_from_the_longest_sequence(settings, levels, selected):
    config = UCSAConfig(**settings)
    assert (config.tree_levels, config.num_selected()) == (levels, selected)


def test_the_share_of_selected_blocks_follows_its_schedule():
    config = UCSAConfig(sparsity_factor=0.5, sparsity_decay=0.1, min_sparsity=0.1, max_selected_blocks=1000)
    blocks = config.num_blocks
    assert [config.num_selected(step) for step in (0, 10, 10_000)] == [
        round(0.6 * blocks),
        round((0.5 / 2.718281828 + 0.1) * blocks),
        round(0.1 * blocks),
    ]
    model = build("ucsa", num_layers=1, sparsity_factor=0.5, sparsity_decay=1.0)
    before = model(IDS, output_details=("sparsity_mask",)).sparsity_mask[0].shape[-1]
    model.finish_step(2)
    after = model(IDS, output_details=("sparsity_mask",)).sparsity_mask[0].shape[-1]
    assert (before, after) == (8, 1)
    # The step is part of the checkpoint.
    other = build("ucsa", num_layers=1, sparsity_factor=0.5, sparsity_decay=1.0)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(hidden(other), hidden(model))


def test_outputs():
    model = scramble(build("ucsa").double())
    plain = model(IDS)
    assert plain.sparsity_mask is plain.compression_info is plain.block_errors is None
    names = ("sparsity_mask", "compression_info", "block_errors")
    output = model(IDS, output_details=names)
    chosen, share, errors = (getattr(output, name)[1] for name in names)
    assert chosen.shape == (2, 4, 62, 2) and share.shape == (2, 4, 62) and errors.shape == (2, 4, 15)
    # Nothing is chosen before there is a block outside of the window, and only blocks before it ever.
    position = torch.arange(62)
    window = (position - 2).clamp(min=0) // 4 - 1
    assert (chosen[:, :, :10] == -1).all() and (chosen < window.clamp(min=0)[:, None]).all()
    assert (chosen[:, :, 14:].amax(dim=-1) >= 0).all()
    assert (share[:, :, :18] == 0).all() and (share[:, :, 30:] > 0).all() and (share < 1).all()
    assert ((errors > 0) & (errors <= 1)).all()


def test_streams_without_a_cache_read_the_past_as_summaries():
    model = scramble(build("ucsa", num_layers=1, enable_cache=False).double())
    unlimited = build("ucsa", num_layers=1, max_cache_size=None).double()
    unlimited.load_state_dict(model.state_dict())
    q, k, v = torch.randn(3, 2, 4, 62, 4).double().unbind(0)
    x = torch.randn(2, 62, 16).double()

    def streamed(model):
        core = model.layers[0].core
        state = core.init_state(2, device=x.device, dtype=x.dtype)
        output, state = core(x, q, k, v, state=state)
        return output, state

    output, state = streamed(model)
    assert state["cache"]["keys"].shape[2] == 0
    assert model.config.tree_levels == 2
    unavailable = torch.ones(2, 62, 15, dtype=torch.bool)
    expected = ucsa_attention_reference(
        q,
        k,
        v,
        block_size=4,
        num_selected=2,
        window_blocks=1,
        num_sinks=2,
        tree_levels=2,
        tree_factor=2,
        unavailable=unavailable,
    )
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    whole, _ = streamed(unlimited)
    torch.testing.assert_close(whole, unlimited.layers[0].core(x, q, k, v)[0], rtol=0, atol=1e-10)
    assert not torch.allclose(whole, output)


@pytest.mark.parametrize("strategy", ["lru", "fifo", "lfu"])
def test_a_full_cache_drops_blocks_by_its_strategy(strategy):
    model = scramble(build("ucsa", num_layers=1, max_cache_size=12, cache_strategy=strategy).double())
    with torch.no_grad():
        state = model(IDS, state=model.init_state(2)).state
    kept = state["layers"][0]["core"]["cache"]["blocks"]
    assert kept.shape[1] <= 3
    if strategy == "fifo":
        assert kept.sort().values.tolist() == [[10, 11, 12]] * 2


def test_error_statistics_follow_the_blocks():
    model = scramble(build("ucsa", num_layers=1, error_compensation=1.0))
    core = model.layers[0].core
    model.eval()
    hidden(model)
    model.finish_step(1)
    assert core.error_mean == 0.5 and core.error_variance == 0
    model.train()
    errors = model(IDS, output_details=("block_errors",)).block_errors[0]
    model.finish_step(2)
    torch.testing.assert_close(core.error_mean, 0.5 + 0.01 * (errors.mean() - 0.5), rtol=1e-3, atol=1e-3)
    expected = 0.01 * (errors - core.error_mean).square().mean()
    torch.testing.assert_close(core.error_variance, expected, rtol=1e-3, atol=1e-6)


def test_sequences_are_compressed_and_expanded():
    model = build("ucsa", compression_ratio=0.25)
    states = torch.linspace(0, 1, 40).view(1, 40, 1).expand(2, 40, 16)
    compressed = model.compress_sequence(states)
    assert compressed.shape[1] == 10
    assert [model.compress_sequence(states).shape[1] for _ in range(3)] == [compressed.shape[1]] * 3
    expanded = model.decompress_sequence(compressed, original_length=40)
    assert expanded.shape == states.shape and (expanded - states).abs().max() < 0.1
    assert not any("compression" in name for name, _ in model.named_parameters())
    assert not any("compression" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="does not fit cells"):
        model.decompress_sequence(compressed, original_length=39)
    for ratio in (0.05, 0.25, 0.9, 1.0):
        for length in (20, 2000):
            shorter = build("ucsa", compression_ratio=ratio).compress_sequence(torch.randn(1, length, 16))
            assert shorter.shape[1] == math.ceil(ratio * length)


def test_the_cache_counts():
    model = build("ucsa", cache_strategy="fifo")
    assert model.cache.policy == "fifo"
    model.update_cache(("a", 1), torch.zeros(10))
    assert model.cache.get("b") is None and model.cache.get(("a", 1)) is not None
    stats = model.get_cache_stats()
    assert (stats.hit_rate, stats.eviction_count, stats.memory_usage) == (0.5, 0, 40)
    assert stats.average_access_time > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size=0 must be an integer of at least 1"),
        ({"local_window_size": -1}, "local_window_size=-1 must be an integer of at least 0"),
        ({"tree_factor": 1}, "tree_factor=1 must be an integer of at least 2"),
        ({"num_levels": 0}, "num_levels=0 must be an integer of at least 1"),
        ({"sparsity_factor": 1.5}, "sparsity_factor=1.5 must lie between 0 and 1"),
        ({"sparsity_decay": -1.0}, "sparsity_decay=-1.0 must not be negative"),
        ({"error_compensation": -1.0}, "error_compensation=-1.0 must not be negative"),
        ({"cache_strategy": "random"}, "cache_strategy='random' must be one of 'lru', 'fifo', 'lfu'"),
        ({"max_cache_size": -1}, "max_cache_size=-1 must be an integer of at least 0"),
        ({"compression_ratio": 0.0}, "compression_ratio=0.0 must lie above 0"),
        ({"chunk_size": 0}, "chunk_size=0 must be an integer of at least 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        make_config("ucsa", **settings)
