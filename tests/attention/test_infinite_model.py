"""What the settings of enhanced infinite attention do."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from danon_lightning.attention import InfiniteAttentionConfig
from danon_lightning.attention.infinite.memory import linear_memory

sys.path.insert(0, str(Path(__file__).parent))
from variants import build, make_config, scramble  # noqa: E402

IDS = torch.randint(0, 11, (2, 60), generator=torch.Generator().manual_seed(0))


def test_linear_memory_equals_its_definition():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 19, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.rand(2, 19) < 0.6
    mask[:, 0] = False
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).repeat_interleave(2, dim=1).mT
    weights = weights * mask[:, None, None, :] * torch.ones(19, 19).tril()
    total = weights.sum(dim=-1, keepdim=True)
    expected = weights @ v.repeat_interleave(2, dim=1) / total.masked_fill(total == 0, 1.0)
    ours, state = linear_memory(q, k, v, key_padding_mask=mask, chunk_size=5)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert state.shape == (2, 4, 3, 4) and torch.count_nonzero(ours[:, :, 0]) == 0
    for mine, other in zip(*(torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_equal_values_come_back_through_both_parts():
    model = scramble(build("infinite", num_layers=1).double())
    core = model.layers[0].core
    for maps in (core.window.value_maps,):
        maps.data.copy_(torch.eye(4))
    x, q, k = torch.randn(2, 60, 16).double(), torch.randn(2, 4, 60, 4).double(), torch.randn(2, 4, 60, 4).double()
    v = torch.ones(2, 4, 60, 4, dtype=torch.float64)
    torch.testing.assert_close(core(x, q, k, v)[0], v, rtol=0, atol=1e-12)


def test_the_memory_reaches_what_the_window_does_not():
    model = scramble(build("infinite", num_layers=1).double())
    changed = IDS.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    ours = model(IDS).last_hidden_state - model(changed).last_hidden_state
    assert (ours[:, 40:].abs().amax(dim=-1) > 1e-9).all()
    with torch.no_grad():
        model.layers[0].core.gate.bias.fill_(-1e9)
    without = model(IDS).last_hidden_state - model(changed).last_hidden_state
    assert torch.count_nonzero(without[:, 40:]) == 0 and torch.count_nonzero(without[:, 3:8])


@pytest.mark.parametrize(
    ("settings", "pool_factor", "levels"),
    [
        ({}, 4, 2),
        ({"sliding_window": 2048}, 4, 3),
        ({"sliding_window": 100}, 4, 1),
        ({"compression_ratio": 0.125}, 8, 2),
        ({"compression_ratio": None}, 4, 2),
        ({"compression_ratio": None, "sliding_window": 1024}, 8, 2),
        ({"compression_ratio": None, "min_compression_ratio": 0.25, "sliding_window": 1024}, 4, 3),
        ({"compression_ratio": None, "max_compression_ratio": 0.125}, 8, 2),
        ({"local_window": 256, "compression_ratio": None}, 2, 2),
        ({"compression_ratio": None, "sliding_window": 640}, 8, 2),  # 5 does not divide a block
        ({"compression_ratio": None, "sliding_window": 100_000}, 16, 4),
    ],
)
def test_windows_and_ratios_decide_about_the_levels(settings, pool_factor, levels):
    config = InfiniteAttentionConfig(**settings)
    assert (config.msra.pool_factor, config.msra.num_levels) == (pool_factor, levels)
    assert config.msra.block_size == config.local_window // 2
    assert config.msra.geometry.reach >= config.sliding_window


def test_memory_and_chunk_size():
    model = build("infinite", memory_size=5)
    assert model.init_state(3)["layers"][0]["core"]["memory"].shape == (3, 4, 5, 5)
    one, other = (scramble(build("infinite", chunk_size=size).double()) for size in (3, 64))
    torch.testing.assert_close(one(IDS).last_hidden_state, other(IDS).last_hidden_state, rtol=0, atol=1e-12)


def test_long_sequences_do_not_warn(recwarn):
    model = build("infinite", max_sequence_length=500)
    model(torch.zeros(1, 400, dtype=torch.int64))
    assert not [warning for warning in recwarn if "out of reach" in str(warning.message)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_window": 7}, "local_window=7 must be even"),
        ({"local_window": 0}, "local_window=0 must be an integer of at least 1"),
        ({"local_window": 10}, "local_window=10 does not fit compression_ratio=0.5: .* use local_window=8"),
        (
            {
                "local_window": 10,
                "compression_ratio": None,
                "max_compression_ratio": 0.25,
                "min_compression_ratio": 0.25,
            },
            "local_window=10 does not fit compression_ratio=None: .* cells of 4 tokens; use local_window=8",
        ),
        ({"memory_size": 0}, "memory_size=0 must be an integer of at least 1"),
        ({"compression_ratio": 0.4}, "compression_ratio=0.4 must be one over an integer"),
        ({"compression_ratio": 0.01}, "compression_ratio=0.01 must lie between"),
        ({"min_compression_ratio": 0.5, "max_compression_ratio": 0.25}, "min_compression_ratio=0.5 exceeds"),
        ({"max_compression_ratio": 1.5}, "max_compression_ratio=1.5 must be above 0"),
        ({"causal": False}, "causal=False is not possible with infinite"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        make_config("infinite", **settings)
