"""What cores tell of what they attend to, against the attention itself."""

import pytest
import torch
from variants import SETTINGS, SIZES, make_config

from danon_lightning.attention import get_variant
from danon_lightning.attention.statistics import LONGEST_MAP

LENGTH = 48
HEADS, WIDTH = 4, 4


def make_core(variant, **settings):
    """Wild but for what acts on values, in float64."""
    torch.manual_seed(0)
    core = get_variant(variant).attention_class(make_config(variant, **settings).for_layer(0)).double().eval()
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if not name.endswith(("value_maps", "pool_query")):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return core


def make_inputs(groups=2, length=LENGTH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, length, SIZES["hidden_size"], generator=generator, dtype=torch.float64)
    q, k, v = (
        torch.randn(2, heads, length, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, groups, groups)
    )
    return x, q, k, v


# The second sequence begins with padding, of whole blocks wherever these begin.
def padding(start, stop):
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, start:stop] = False
    return mask


PARTS = {
    "full": {},
    "msra": SETTINGS["msra"],
    "dala": SETTINGS["dala"] | {"use_recursive_state": False},
    "ucsa": SETTINGS["ucsa"],
    "infinite": SETTINGS["infinite"] | {"memory_size": 6},
}
HYBRID = {"components": "msra+dala+ucsa+full", "settings": {name: PARTS[name] for name in ("msra", "dala", "ucsa")}}


@pytest.mark.parametrize("mask", [None, padding(2, 6)], ids=["whole", "padded"])
@pytest.mark.parametrize("variant", [*PARTS, "super_hybrid"])
def test_weights_are_those_of_the_forward_pass(variant, mask):
    core = make_core(variant, **(HYBRID if variant == "super_hybrid" else PARTS[variant]), num_kv_heads=2)
    x, q, k, v = make_inputs()
    found = core.attention_statistics(x, q, k, v, key_padding_mask=mask)
    output, _ = core(x, q, k, v, key_padding_mask=mask)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask
    error = found["weights"] @ v.repeat_interleave(2, dim=1) - output
    assert error.movedim(1, -1)[real].abs().max() < 1e-10
    sums = found["weights"].sum(dim=-1).movedim(1, -1)
    torch.testing.assert_close(sums[real], torch.ones_like(sums[real]))
    past = torch.ones(LENGTH, LENGTH).tril() * real[:, None]
    assert torch.equal(found["visible_keys"].squeeze(1), (past.sum(dim=-1) * real).long())


def count_keys(weights):
    """Tokens of a summary have the same weight, all others differ: how many are alone, and how many there are."""
    tokens, keys = (torch.zeros(weights.shape[:-1]) for _ in range(2))
    for index in torch.cartesian_prod(*(torch.arange(size) for size in weights.shape[:-1])):
        row = weights[tuple(index)]
        row = row[row > 0].sort().values
        same = torch.isclose(row[1:], row[:-1], rtol=1e-9, atol=0.0)
        groups = torch.cat([torch.tensor([0]), (~same).long().cumsum(0)]).bincount() if len(row) else torch.tensor([])
        tokens[tuple(index)], keys[tuple(index)] = (groups == 1).sum(), len(groups)
    return tokens, keys


@pytest.mark.parametrize(
    ("variant", "settings", "mask"),
    [
        ("full", {}, padding(0, 8)),
        ("msra", {}, None),
        ("msra", {}, padding(0, 8)),
        ("msra", {"num_levels": 2}, None),
        ("msra", {"causal": False}, None),
        ("dala", PARTS["dala"], padding(0, 5)),
        ("dala", {"use_sparse_attention": False}, None),
        ("ucsa", {"num_levels": 1}, None),
        ("ucsa", {"num_levels": 1}, padding(2, 10)),
        ("ucsa", {"num_levels": 1, "global_tokens": 0, "causal": False}, None),
        ("ucsa", {"num_levels": 1, "error_compensation": 0.5}, None),
        ("ucsa", {"num_levels": 2}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:num_levels is fixed")
def test_what_is_read_is_counted(variant, settings, mask):
    core = make_core(variant, **settings)
    x, q, k, v = make_inputs(groups=HEADS)
    found = core.attention_statistics(x, q, k, v, key_padding_mask=mask)
    tokens, keys = count_keys(found["weights"])
    asking = torch.ones(2, 1, LENGTH) if mask is None else mask.unsqueeze(1)
    assert torch.equal(found["tokens_read"].float().expand(2, HEADS, -1), tokens * asking)
    if settings.get("num_levels") == 2 and variant == "ucsa":
        assert "keys_read" not in found  # how many cells of a tree are left as they are is not counted
    else:
        assert torch.equal(found["keys_read"].float().expand(2, HEADS, -1), keys * asking)
    if variant != "full":
        assert found["tokens_read"].sum() < 0.8 * found["visible_keys"].expand(2, HEADS, -1).sum()


@pytest.mark.parametrize("variant", ["msra", "dala", "ucsa", "infinite", "super_hybrid"])
def test_routes_share_what_is_read(variant):
    core = make_core(variant, **({} if variant != "super_hybrid" else HYBRID))
    x, q, k, v = make_inputs(groups=HEADS)
    found = core.attention_statistics(x, q, k, v)
    shares = torch.stack([share for name, share in found.items() if name.startswith("route/")])
    assert len(shares) > 1
    torch.testing.assert_close(shares.sum(dim=0), torch.ones(2, HEADS, LENGTH, dtype=torch.float64))
    if variant == "super_hybrid":
        alone = core.components["dala"].attention_statistics(x, q, k, v)
        torch.testing.assert_close(found["dala"], alone)


def test_the_share_of_the_state_is_that_of_its_norm():
    core = make_core("dala")
    x, q, k, v = make_inputs(groups=HEADS)
    share = core.attention_statistics(x, q, k, v)["route/state"]
    whole, _ = core(x, q, k, v)
    core.recurrent, recurrent = None, core.recurrent
    softmax, _ = core(x, q, k, v)
    expected = (whole - softmax).norm(dim=-1) / ((whole - softmax).norm(dim=-1) + softmax.norm(dim=-1))
    torch.testing.assert_close(share, expected)
    assert recurrent is not None


def test_there_are_no_weights_where_no_softmax_is_shared():
    x, q, k, v = make_inputs(groups=HEADS)
    for variant, settings in (("msra", {"feature_fusion": "concat"}), ("ucsa", {"error_tolerance": 0.1})):
        found = make_core(variant, **settings).attention_statistics(x, q, k, v)
        assert "weights" not in found and "tokens_read" in found


def test_long_sequences_tell_the_weights_of_their_first_tokens():
    core = make_core("dala", block_size=64, num_heads=1)
    generator = torch.Generator().manual_seed(0)
    x, q, k, v = (torch.randn(1, LONGEST_MAP + 64, 16, generator=generator, dtype=torch.float64) for _ in range(4))
    found = core.attention_statistics(x, q[:, None], k[:, None], v[:, None])
    assert found["tokens_read"].shape[-1] == LONGEST_MAP + 64
    assert found["weights"].shape[-2:] == (LONGEST_MAP, LONGEST_MAP)


def stream_hits(**settings):
    """The hit rate of the second half of a sequence."""
    core = make_core("ucsa", **settings)
    inputs = make_inputs(groups=HEADS)
    first, second = ([part[..., here, :] for part in inputs] for here in (slice(24), slice(24, None)))
    state = core.init_state(2, device=torch.device("cpu"), dtype=torch.float64)
    assert "tokens_read" in core.attention_statistics(*first, state=state)  # nothing seen: a whole sequence
    _, state = core(*first, state=state)
    return core.attention_statistics(*second, state=state)


def test_a_cache_is_hit_as_far_as_it_holds_what_is_wanted():
    assert stream_hits(max_cache_size=None) == {}
    assert stream_hits(enable_cache=False)["cache_hit_rate"] == 0
    assert stream_hits(max_cache_size=LENGTH)["cache_hit_rate"] == 1
    small, larger = (stream_hits(max_cache_size=size)["cache_hit_rate"] for size in (8, 16))
    assert 0 < small < larger < 1
