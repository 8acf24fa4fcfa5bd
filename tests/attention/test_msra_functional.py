"""The fast form of MSRA against its definition."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from danon_lightning.attention.functional import full_attention, msra_attention, msra_attention_reference
from danon_lightning.attention.kept_bytes import KeptBytes
from danon_lightning.attention.merging import attention_part
from danon_lightning.attention.msra.fusion import ConcatFusion, WeightedFusion
from danon_lightning.attention.msra.geometry import Geometry
from danon_lightning.attention.rotary import apply_rotary, cell_positions

sys.path.insert(0, str(Path(__file__).parent))
from agreement import assert_same, make_mask  # noqa: E402

BATCH, HEADS, GROUPS, WIDTH = 2, 4, 2, 4
SIZES = {"block_size": 4, "pool_factor": 2}


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def make_qkv(length: int, groups: int = GROUPS) -> dict[str, torch.Tensor]:
    heads = {"q": HEADS, "k": groups, "v": groups}
    return {name: double(BATCH, count, length, WIDTH) for name, count in heads.items()}


def make_learned(length: int, levels: int, groups: int = GROUPS) -> dict[str, torch.Tensor]:
    return {
        "level_bias": double(BATCH, HEADS, length, levels),
        "pool_query": double(groups, WIDTH),
        "key_maps": double(levels - 1, groups, WIDTH, WIDTH),
        "value_maps": double(levels - 1, groups, WIDTH, WIDTH),
    }


@pytest.fixture(params=[1024, 8], ids=["one piece", "many pieces"])
def tokens_at_once(request, monkeypatch):
    monkeypatch.setattr("danon_lightning.attention.pieces.TOKENS_AT_ONCE", request.param)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", ["none", "left", "right", "ragged", "whole row"])
@pytest.mark.parametrize("length", [1, 3, 8, 9, 16, 21, 50])
def test_blocked_form_equals_the_definition(length, padding, causal, tokens_at_once):
    torch.manual_seed(length)
    mask = make_mask(padding, length)
    for num_levels in ("auto", 1, 2, 3):
        tensors = make_qkv(length)
        levels = Geometry.resolve(**SIZES, num_levels=num_levels, length=length).num_levels
        tensors |= make_learned(length, levels)
        settings = {**SIZES, "num_levels": num_levels, "causal": causal, "key_padding_mask": mask}
        ours = msra_attention(**tensors, **settings)
        assert_same(tensors, ours, msra_attention_reference(**tensors, **settings))


@pytest.mark.parametrize(("block_size", "pool_factor"), [(4, 4), (6, 3), (8, 4), (12, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_blocked_form_at_other_sizes(block_size, pool_factor, causal, tokens_at_once):
    torch.manual_seed(0)
    for length in (block_size, 2 * block_size + 1, 59):
        tensors = make_qkv(length)
        settings = {"block_size": block_size, "pool_factor": pool_factor, "causal": causal, "rope_base": 100.0}
        ours, theirs = (f(**tensors, **settings) for f in (msra_attention, msra_attention_reference))
        assert_same(tensors, ours, theirs)


@pytest.mark.parametrize("given", [c for n in (0, 1) for c in itertools.combinations(range(4), n)], ids=str)
def test_learned_parts_are_optional(given):
    torch.manual_seed(0)
    length, groups = 21, HEADS
    tensors = make_qkv(length, groups)
    levels = Geometry.resolve(**SIZES, num_levels="auto", length=length).num_levels
    learned = list(make_learned(length, levels, groups).items())
    tensors |= dict(learned[index] for index in given)
    settings = {**SIZES, "rope_base": None}
    ours, theirs = (f(**tensors, **settings) for f in (msra_attention, msra_attention_reference))
    assert_same(tensors, ours, theirs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", ["none", "ragged", "whole row"])
@pytest.mark.parametrize("kind", ["weighted", "concat"])
@pytest.mark.parametrize("length", [1, 9, 37])
def test_fusion_of_separate_levels_equals_the_definition(length, kind, padding, causal):
    torch.manual_seed(0)
    levels, hidden = 4, 8
    tensors, x = make_qkv(length), double(BATCH, length, hidden)
    if kind == "weighted":
        weighted = WeightedFusion(hidden, HEADS, WIDTH, std=0.5).double()
        torch.nn.init.normal_(weighted.score)
        module, fusion = weighted, lambda outputs, available: weighted(outputs, available, x)
    else:
        module = ConcatFusion(levels, WIDTH, std=0.5).double()
        # The definition always has all levels, the fast form only those with a visible cell.
        fusion = module
    settings = {**SIZES, "num_levels": levels, "causal": causal, "feature_fusion": fusion}
    settings["key_padding_mask"] = make_mask(padding, length)
    ours, theirs = (f(**tensors, **settings) for f in (msra_attention, msra_attention_reference))
    assert_same(tensors | {"x": x} | dict(module.named_parameters()), ours, theirs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 37, 200])
@pytest.mark.parametrize(("block_size", "pool_factor"), [(4, 2), (4, 4), (9, 3)])
def test_every_token_is_covered_exactly_once(block_size, pool_factor, length, causal):
    geometry = Geometry.resolve(block_size, pool_factor, "auto", length)
    queries = torch.arange(length).unsqueeze(-1)
    covered = torch.zeros(length, length)
    for level in range(geometry.num_levels + 1):  # One level more than needed must add nothing.
        span = geometry.span(level)
        visible = geometry.visible(queries, torch.arange(-(-length // span)), level, causal=causal)
        covered += visible.repeat_interleave(span, dim=1)[:, :length]
    assert torch.equal(covered, torch.ones_like(covered).tril() if causal else torch.ones_like(covered))


@pytest.mark.parametrize("causal", [True, False])
def test_equal_keys_and_values_give_the_value(causal):
    torch.manual_seed(0)
    q = double(BATCH, HEADS, 61, WIDTH)
    key, value = double(BATCH, HEADS, 1, WIDTH), double(BATCH, HEADS, 1, WIDTH)
    mask = make_mask("ragged", 61)
    mask[:, 0] = True
    settings = {**SIZES, "rope_base": None, "causal": causal, "key_padding_mask": mask}
    output = msra_attention(q, key.expand_as(q), value.expand_as(q), **settings)
    torch.testing.assert_close(output, value.expand_as(q), rtol=0, atol=1e-13)
    # Pooling constant keys loses nothing: values are then averaged exactly as full attention does over the batch row.
    values = double(BATCH, HEADS, 61, WIDTH)
    ours = msra_attention(q, key.expand_as(q), values, **settings)
    theirs = full_attention(q, key.expand_as(q), values, causal=causal, key_padding_mask=mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_short_sequences_see_everything_token_by_token():
    torch.manual_seed(0)
    tensors = make_qkv(8)
    positions = cell_positions(0, 8, 1, torch.device("cpu"))
    q, k = (apply_rotary(tensors[name], positions, 10000.0) for name in "qk")
    theirs = full_attention(q, k, tensors["v"])
    torch.testing.assert_close(msra_attention(**tensors, **SIZES), theirs, rtol=0, atol=1e-12)
    blocked, _ = msra_attention(**tensors, **SIZES, return_stats=True)
    torch.testing.assert_close(blocked, theirs, rtol=0, atol=1e-12)


def test_the_future_does_not_leak():
    torch.manual_seed(0)
    tensors = make_qkv(50) | make_learned(50, 4)
    for position in (1, 7, 8, 31, 49):
        output = msra_attention(**tensors, **SIZES)
        grads = torch.autograd.grad(output[:, :, :position].sum(), [tensors["k"], tensors["v"]])
        assert all(torch.count_nonzero(grad[:, :, position:]) == 0 for grad in grads)
        assert torch.count_nonzero(grads[1][:, :, 0]) > 0


@pytest.mark.parametrize("causal", [True, False])
def test_padding_has_no_influence(causal):
    torch.manual_seed(0)
    tensors = make_qkv(50) | make_learned(50, 4)
    mask = make_mask("ragged", 50)
    settings = {**SIZES, "causal": causal, "key_padding_mask": mask}
    output = msra_attention(**tensors, **settings)
    for name in "kv":
        tensors[name] = torch.where(mask[:, None, :, None], tensors[name], 7.0)
    torch.testing.assert_close(msra_attention(**tensors, **settings), output, rtol=0, atol=1e-13)


def test_rows_without_real_tokens_are_zero():
    torch.manual_seed(0)
    tensors = make_qkv(30)
    mask = torch.ones(BATCH, 30, dtype=torch.bool)
    mask[0, :12], mask[1] = False, False
    output = msra_attention(**tensors, **SIZES, key_padding_mask=mask)
    assert torch.count_nonzero(output[0, :, :12]) == 0 and torch.count_nonzero(output[1]) == 0
    assert torch.count_nonzero(output[0, :, 12:]) == output[0, :, 12:].numel()
    grads = torch.autograd.grad(output.square().sum(), list(tensors.values()))
    assert all(grad.isfinite().all() and torch.count_nonzero(grad[1]) == 0 for grad in grads)


def test_stats_tell_the_share_of_each_level():
    torch.manual_seed(0)
    tensors = make_qkv(30)
    output, stats = msra_attention(**tensors, **SIZES, num_levels=6, return_stats=True)
    torch.testing.assert_close(output, msra_attention(**tensors, **SIZES))
    assert stats.level_weights.shape == (BATCH, HEADS, 30, 6)
    assert not stats.level_weights.requires_grad
    torch.testing.assert_close(stats.level_weights.sum(dim=-1), torch.ones_like(stats.lse))
    assert (stats.level_weights[:, :, :8, 0] == 1).all()  # The first two blocks see tokens only.
    assert (stats.level_weights[:, :, :, 3:] == 0).all()  # A sequence of 30 tokens has no use for more levels.
    assert (stats.level_weights[:, :, 12:, 1] > 0).all()


def test_dropout_changes_single_weights_and_keeps_the_mean():
    torch.manual_seed(0)
    q = torch.randn(64, HEADS, 40, WIDTH)
    ones = torch.ones_like(q)
    output = msra_attention(q, torch.randn_like(q), ones, **SIZES, dropout_p=0.2)
    assert output[:, :, 1:].std() > 0.05
    assert output.mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_and_finite(dtype):
    torch.manual_seed(0)
    exact = {name: tensor.detach() for name, tensor in make_qkv(50).items()}
    mask = make_mask("left", 50)
    rough = {name: tensor.to(dtype) for name, tensor in exact.items()}
    output = msra_attention(**rough, **SIZES, key_padding_mask=mask)
    assert output.dtype == dtype
    expected = msra_attention(**exact, **SIZES, key_padding_mask=mask)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 30)}, "q has shape"),
        ({"k": torch.zeros(2, 3, 30, 4)}, "k has shape .2, 3, 30, 4., but q has shape"),
        ({"v": torch.zeros(2, 2, 29, 4)}, "v has shape .2, 2, 29, 4."),
        ({"q": torch.zeros(2, 4, 30, 3)}, "q has shape .2, 4, 30, 3., of odd width 3, .* or rope_base=None"),
        ({"k": torch.zeros(2, 2, 30, 4)}, "k has dtype torch.float32, but q has dtype torch.float64"),
        ({"v": torch.zeros(2, 2, 30, 6)}, "v has dtype torch.float32, but q has dtype torch.float64"),
        ({"level_bias": torch.zeros(2, 4, 30, 2)}, "level_bias has shape .* must have shape .2, 4, 30, 3."),
        ({"pool_query": torch.zeros(4, 4)}, "pool_query has shape"),
        ({"key_maps": torch.zeros(1, 2, 4, 4)}, "key_maps has shape"),
        ({"key_padding_mask": torch.ones(2, 29, dtype=torch.bool)}, "key_padding_mask has shape"),
        ({"key_padding_mask": torch.ones(2, 30)}, "key_padding_mask has dtype"),
        ({"block_size": 5}, "block_size=5 must be a positive multiple of the pooling factor 2"),
        ({"pool_factor": 1}, "pool_factor=1 must be at least 2"),
        ({"num_levels": "all"}, "num_levels='all'"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {**make_qkv(30), **SIZES, **change}
    with pytest.raises(ValueError, match=message):
        msra_attention(**arguments)


def test_no_matrix_of_all_pairs_is_formed():
    length = 1024
    q = torch.randn(1, 1, length, 8, requires_grad=True)
    sizes = []

    def record(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        msra_attention(q, q, q, block_size=16, pool_factor=4)
    assert max(sizes) <= length * 2 * 16


@pytest.mark.cuda
def test_cuda_equals_cpu():
    torch.manual_seed(0)
    tensors = {name: tensor.detach() for name, tensor in (make_qkv(50) | make_learned(50, 4)).items()}
    mask = make_mask("ragged", 50)
    expected = msra_attention(**tensors, **SIZES, key_padding_mask=mask)
    there = {name: tensor.cuda() for name, tensor in tensors.items()}
    ours = msra_attention(**there, **SIZES, key_padding_mask=mask.cuda())
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-10)


def kept_bytes(length, **settings):
    q, k, v = (torch.randn(1, 4, length, 16, requires_grad=True) for _ in range(3))
    counter = KeptBytes((q, k, v))
    with counter:
        msra_attention(q, k, v, block_size=32, pool_factor=4, **settings)
    return counter.count


def test_no_weights_are_kept_for_the_backward_pass():
    # Linear in the length, but for a level more.
    assert kept_bytes(4096) < 4.7 * kept_bytes(1024)
    # Dropped weights are drawn again too.
    assert kept_bytes(1024, dropout_p=0.1) == kept_bytes(1024)
    # The output, its log-sum-exps and the cells above: less than queries and keys once more.
    assert kept_bytes(1024) < 2 * 4 * 1024 * 16 * 4


def test_values_and_gradients_of_a_part_equal_autograd():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 2, n, 5, dtype=torch.float64, requires_grad=True) for n in (6, 4, 4))
    for shape in ((2, 3, 2, 6, 4), (1, 1, 2, 3, 4), (2, 1, 1, 1, 4)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        part = attention_part(query, key, value, bias)
        logits = query @ key.mT + bias.repeat_interleave(6 // shape[-2], dim=-2)
        upstream = torch.randn_like(part.output), torch.randn_like(part.lse)
        expected = torch.softmax(logits, dim=-1) @ value, torch.logsumexp(logits, dim=-1)
        for ours, theirs in zip(
            (*part, *torch.autograd.grad(part, (query, key, value, bias), upstream)),
            (*expected, *torch.autograd.grad(expected, (query, key, value, bias), upstream)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
