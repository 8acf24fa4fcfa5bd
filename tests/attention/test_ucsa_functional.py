"""The fast form of UCSA against its definition."""

import functools
import random
import sys
from pathlib import Path

import pytest
import torch

from danon_lightning.attention.functional import (
    block_errors,
    compensate_errors,
    full_attention,
    ucsa_attention,
    ucsa_attention_reference,
)
from danon_lightning.attention.merging import MASKED
from danon_lightning.attention.rotary import apply_rotary, cell_positions
from danon_lightning.attention.ucsa.selection import best_cells

sys.path.insert(0, str(Path(__file__).parent))
from agreement import assert_same, make_mask  # noqa: E402

BATCH, HEADS, GROUPS, WIDTH = 2, 4, 2, 4
SIZES = {"block_size": 4, "num_selected": 2, "window_blocks": 1, "num_sinks": 3, "tree_factor": 2}


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def make_qkv(length, groups=GROUPS, heads=HEADS):
    return {
        name: double(BATCH, count, length, WIDTH) for name, count in zip("qkv", (heads, groups, groups), strict=True)
    }


def sparse(*args, **kwargs):
    """The sparse form also where full attention would do."""
    return ucsa_attention(*args, **kwargs, return_stats=True)[0]


@pytest.fixture(params=[8192, 16], ids=["one piece", "many pieces"])
def queries_at_once(request, monkeypatch):
    monkeypatch.setattr("danon_lightning.attention.ucsa.sparse.QUERIES_AT_ONCE", request.param)
    monkeypatch.setattr("danon_lightning.attention.ucsa.tiles.LOGITS_AT_ONCE", 40 * request.param)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", ["none", "left", "right", "ragged", "whole row"])
@pytest.mark.parametrize("length", [1, 3, 7, 12, 37])
def test_sparse_form_equals_the_definition(length, padding, causal, monkeypatch):
    torch.manual_seed(length)
    mask = make_mask(padding, length)
    for levels in (1, 2, 3) if length > 12 else (2,):
        tensors = make_qkv(length)
        settings = {**SIZES, "tree_levels": levels, "causal": causal, "key_padding_mask": mask}
        expected = ucsa_attention_reference(**tensors, **settings)
        for count in (8192, 16):  # one piece, and many
            monkeypatch.setattr("danon_lightning.attention.ucsa.sparse.QUERIES_AT_ONCE", count)
            monkeypatch.setattr("danon_lightning.attention.ucsa.tiles.LOGITS_AT_ONCE", 40 * count)
            assert_same(tensors, sparse(**tensors, **settings), expected)


@pytest.mark.parametrize("share", [0.0, 2.0], ids=["apart", "like all others"])
@pytest.mark.parametrize("tolerance", [0.0, 0.9])
@pytest.mark.parametrize("padding", ["none", "left", "ragged"])
def test_first_queries_read_everything(padding, tolerance, share, monkeypatch):
    torch.manual_seed(0)
    tensors, mask = make_qkv(61), make_mask(padding, 61)
    settings = {**SIZES, "tree_levels": 2, "key_padding_mask": mask, "error_tolerance": tolerance}
    monkeypatch.setattr("danon_lightning.attention.ucsa.functional.LEAST_DENSE_SHARE", share)
    assert_same(tensors, ucsa_attention(**tensors, **settings), ucsa_attention_reference(**tensors, **settings))


@pytest.mark.parametrize("seed", range(24))
def test_sparse_form_at_any_settings(seed, monkeypatch):
    monkeypatch.setattr("danon_lightning.attention.ucsa.sparse.QUERIES_AT_ONCE", 50)
    torch.manual_seed(seed)
    draw = random.Random(seed)
    groups = draw.choice([1, 2, 4])
    length, size, sinks = draw.randint(1, 45), draw.choice([1, 2, 3, 5]), draw.choice([0, 1, 4])
    blocks = -(-max(0, length - sinks) // size)
    settings = {
        "block_size": size,
        "num_selected": draw.choice([0, 1, 2, 5]),
        "window_blocks": draw.choice([0, 1, 3]),
        "num_sinks": sinks,
        "tree_levels": draw.choice([1, 2, 3]),
        "tree_factor": draw.choice([2, 3, 4]),
        "rope_base": draw.choice([None, 100.0, 10000.0]),
        "causal": draw.random() < 0.6,
        "key_padding_mask": make_mask(draw.choice(["none", "ragged", "left"]), length),
        "error_tolerance": draw.choice([0.0, 0.8]),
        "selection_bias": draw.choice(
            [
                None,
                torch.randn(BATCH, groups, blocks, dtype=torch.float64),
                3 * torch.randn(BATCH, HEADS, blocks, dtype=torch.float64),
                torch.exp,
            ]
        ),
    }
    tensors = make_qkv(length, groups)
    assert_same(tensors, sparse(**tensors, **settings), ucsa_attention_reference(**tensors, **settings))
    # Where it may, the public form takes a shorter way.
    with torch.no_grad():
        ours, theirs = (f(**tensors, **settings) for f in (ucsa_attention, sparse))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_gradients_of_some_inputs_only(wanted):
    torch.manual_seed(0)
    tensors = {name: x if name == wanted else x.detach() for name, x in make_qkv(37).items()}
    ours, theirs = sparse(**tensors, **SIZES), ucsa_attention_reference(**tensors, **SIZES)
    assert_same({wanted: tensors[wanted]}, ours, theirs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_every_token_is_covered_exactly_once(levels, causal):
    torch.manual_seed(0)
    for factor, length in ((2, 45), (3, 40)):
        settings = {**SIZES, "tree_levels": levels, "tree_factor": factor, "causal": causal}
        _, coverage = ucsa_attention_reference(**make_qkv(length), **settings, return_coverage=True)
        expected = torch.ones(length, length, dtype=coverage.dtype)
        assert torch.equal(coverage, (expected.tril() if causal else expected).expand_as(coverage))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_equal_keys_average_all_values(levels, causal):
    torch.manual_seed(0)
    tensors, mask = make_qkv(61), make_mask("ragged", 61)
    mask[:, 0] = True
    key = double(BATCH, GROUPS, 1, WIDTH).expand(-1, -1, 61, -1)
    settings = {**SIZES, "tree_levels": levels, "rope_base": None, "causal": causal, "key_padding_mask": mask}
    # Summaries of equal keys lose nothing: full attention.
    output = ucsa_attention(tensors["q"], key, tensors["v"], **settings)
    expected = full_attention(tensors["q"], key, tensors["v"], causal=causal, key_padding_mask=mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("levels", [1, 3])
def test_selecting_every_block_is_full_attention(levels, causal):
    torch.manual_seed(0)
    tensors, mask = make_qkv(41), make_mask("right", 41)
    positions = cell_positions(0, 41, 1, torch.device("cpu"))
    q, k = (apply_rotary(tensors[name], positions, 10000.0) for name in "qk")
    expected = full_attention(q, k, tensors["v"], causal=causal, key_padding_mask=mask)
    settings = {**SIZES, "num_selected": 8, "tree_levels": levels, "causal": causal, "key_padding_mask": mask}
    for form in (ucsa_attention, sparse):
        torch.testing.assert_close(form(**tensors, **settings), expected, rtol=0, atol=1e-12)
    fewer = ucsa_attention(**tensors, **{**settings, "num_selected": 7})
    assert not torch.allclose(fewer, expected, rtol=0, atol=1e-6)


def test_of_equally_promising_blocks_later_ones_are_selected(queries_at_once):
    torch.manual_seed(0)
    tensors = make_qkv(43) | {"q": torch.zeros(BATCH, HEADS, 43, WIDTH, dtype=torch.float64, requires_grad=True)}
    for levels in (1, 2):
        settings = {**SIZES, "tree_levels": levels}
        output, stats = ucsa_attention(**tensors, **settings, return_stats=True)
        assert stats.selected_blocks[:, :, 42].sort().values.flatten(0, 1).tolist() == [[6, 7]] * BATCH * HEADS
        assert_same(tensors, output, ucsa_attention_reference(**tensors, **settings))


def test_blocks_with_the_largest_possible_logit_are_selected():
    torch.manual_seed(0)
    tensors = make_qkv(43, groups=HEADS)
    _, stats = ucsa_attention(**tensors, **SIZES, rope_base=None, return_stats=True)
    blocks = tensors["k"][:, :, 3:].unflatten(2, (-1, 4))
    q = tensors["q"].unsqueeze(3)
    bounds = torch.maximum(q * blocks.amax(3).unsqueeze(2), q * blocks.amin(3).unsqueeze(2)).sum(-1)
    for i in (15, 30, 42):
        best = bounds[:, :, i, : (i - 3) // 4 - 1].topk(2).indices
        assert torch.equal(stats.selected_blocks[:, :, i].long().sort().values, best.sort().values)


def test_the_future_does_not_leak(queries_at_once):
    torch.manual_seed(0)
    tensors = make_qkv(50)
    for levels in (1, 2):
        output = sparse(**tensors, **SIZES, tree_levels=levels)
        for position in (1, 3, 8, 31, 49):
            inputs = [tensors[name] for name in "kv"]
            grads = torch.autograd.grad(output[:, :, :position].sum(), inputs, retain_graph=True)
            assert all(torch.count_nonzero(grad[:, :, position:]) == 0 for grad in grads)
            # The selection must not look ahead either, and it has no gradient to tell.
            changed = {name: x.detach().clone() for name, x in tensors.items()}
            for x in changed.values():
                x[:, :, position:] = 9.0
            before = sparse(**changed, **SIZES, tree_levels=levels)[:, :, :position]
            torch.testing.assert_close(before, output[:, :, :position], rtol=0, atol=1e-13)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_has_no_influence(causal):
    torch.manual_seed(0)
    tensors, mask = make_qkv(50), make_mask("ragged", 50)
    settings = {**SIZES, "tree_levels": 2, "causal": causal, "key_padding_mask": mask, "error_tolerance": 0.5}
    output = ucsa_attention(**tensors, **settings)
    for name in "kv":
        tensors[name] = torch.where(mask[:, None, :, None], tensors[name], 70.0)
    torch.testing.assert_close(ucsa_attention(**tensors, **settings), output, rtol=0, atol=1e-13)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_without_real_tokens_are_zero(causal, queries_at_once):
    torch.manual_seed(0)
    tensors = make_qkv(40)
    mask = torch.ones(BATCH, 40, dtype=torch.bool)
    mask[0, :12], mask[1] = False, False
    output = sparse(**tensors, **SIZES, tree_levels=2, causal=causal, key_padding_mask=mask)
    assert torch.count_nonzero(output[1]) == 0
    first = 12 if causal else 0
    assert torch.count_nonzero(output[0, :, :first]) == 0
    assert torch.count_nonzero(output[0, :, first:]) == output[0, :, first:].numel()
    grads = torch.autograd.grad(output.square().sum(), list(tensors.values()))
    assert all(grad.isfinite().all() and torch.count_nonzero(grad[1]) == 0 for grad in grads)


def test_stats_tell_what_was_attended_to(queries_at_once):
    torch.manual_seed(0)
    tensors = make_qkv(43)
    output, stats = ucsa_attention(**tensors, **SIZES, return_stats=True)
    torch.testing.assert_close(output, ucsa_attention(**tensors, **SIZES), rtol=0, atol=1e-13)
    assert not any(x.requires_grad for x in stats)
    assert stats.selected_blocks.shape == (BATCH, HEADS, 43, 2) and stats.block_errors.shape == (BATCH, GROUPS, 10)
    total = stats.selected_weight + stats.near_weight + stats.cell_weight
    torch.testing.assert_close(total, torch.ones_like(total))
    # Three sinks and the blocks 0 and 1 are near; up to two more are selected.
    assert (stats.selected_blocks[:, :, :11] == -1).all() and (stats.near_weight[:, :, :11] == 1).all()
    assert (stats.selected_blocks[:, :, 11:15].amax(-1) == 0).all() and (stats.cell_weight[:, :, :19] == 0).all()
    assert (stats.selected_weight[:, :, 11:] > 0).all() and (stats.cell_weight[:, :, 19:] > 0).all()
    # Without a selection everything but the window is read as summaries.
    _, stats = ucsa_attention(**tensors, **{**SIZES, "num_selected": 0}, return_stats=True)
    assert stats.selected_blocks.shape[-1] == 0 and (stats.selected_weight == 0).all()


def test_well_summarised_blocks_are_never_expanded_and_poor_ones_preferred():
    torch.manual_seed(0)
    tensors = make_qkv(43)
    tensors["v"] = tensors["v"].detach()
    tensors["v"][:, :, 7:11] = 1.0  # Block 1 loses nothing in its summary.
    errors = block_errors(tensors["v"], block_size=4, num_sinks=3)
    assert (errors[:, :, 1] < 1e-12).all() and (errors[:, :, 2:] > 0.1).all()
    settings = {**SIZES, "num_selected": 9, "return_stats": True}
    _, stats = ucsa_attention(**tensors, **settings)
    assert (stats.selected_blocks == 1).any()
    _, stats = ucsa_attention(**tensors, **settings, error_tolerance=0.1)
    assert not (stats.selected_blocks == 1).any() and (stats.selected_blocks == 2).any()
    # An overwhelming bonus for the block with the largest error.
    bonus = compensate_errors(errors, mean=1e-9, spread=0.0, threshold=0.0)
    torch.testing.assert_close(bonus[:, :, 2:], torch.log1p(errors[:, :, 2:] / 1e-9))
    assert (compensate_errors(errors, mean=0.5, spread=9.0, threshold=1.0) == 0).all()
    bias = functools.partial(compensate_errors, mean=1e-30, spread=0.0, threshold=0.0)
    _, stats = ucsa_attention(**tensors, **{**SIZES, "num_selected": 7}, selection_bias=bias, return_stats=True)
    assert not (stats.selected_blocks[:, :, 42] == 1).any()


def test_dropout_changes_single_weights_and_keeps_the_mean():
    torch.manual_seed(0)
    q = torch.randn(32, HEADS, 60, WIDTH)
    ones = torch.ones_like(q, requires_grad=True)
    output = ucsa_attention(q, torch.randn_like(q), ones, **SIZES, tree_levels=2, dropout_p=0.2)
    assert output[:, :, 1:].std() > 0.05
    assert output.mean().item() == pytest.approx(1.0, abs=0.02)
    # The backward pass drops the same: the output is linear in the values.
    (grad,) = torch.autograd.grad(output.sum(), ones)
    assert grad.sum().item() == pytest.approx(output.sum().item(), rel=1e-4)


def test_gradients_with_dropout_are_those_of_the_weights_that_were_kept():
    torch.manual_seed(0)
    tensors = make_qkv(37)

    def attend(q, k, v):
        torch.manual_seed(1)
        return ucsa_attention(q, k, v, **SIZES, dropout_p=0.3)

    torch.autograd.gradcheck(attend, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_and_finite(dtype):
    torch.manual_seed(0)
    # All blocks are selected, as rounding may turn the order of two.
    exact, mask = make_qkv(50), make_mask("left", 50)
    rough = {name: x.detach().to(dtype).requires_grad_() for name, x in exact.items()}
    settings = {**SIZES, "num_selected": 20, "tree_levels": 2, "key_padding_mask": mask}
    ours, theirs = sparse(**rough, **settings), sparse(**exact, **settings)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=0.05)
    grads = [torch.autograd.grad(x.square().sum(), list(y.values())) for x, y in ((ours, rough), (theirs, exact))]
    for mine, other in zip(*grads, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), other, rtol=0.05, atol=0.15)


def test_autocast_changes_nothing_beyond_the_dtype_of_inputs():
    torch.manual_seed(0)
    tensors = {name: x.detach().float().requires_grad_() for name, x in make_qkv(50).items()}
    expected = ucsa_attention(**tensors, **SIZES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ucsa_attention(**tensors, **SIZES)
    assert_same(tensors, output, expected, tolerance=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 30)}, "q has shape"),
        ({name: torch.zeros(2, 2, 30, 3) for name in "qkv"}, "q has shape .2, 2, 30, 3., of odd width 3"),
        ({"k": torch.zeros(2, 3, 30, 4)}, "k has shape .2, 3, 30, 4., but q has shape .2, 4, 30, 4."),
        ({"v": torch.zeros(2, 2, 29, 4)}, "v has shape .2, 2, 29, 4., but q has shape .2, 4, 30, 4."),
        ({"selection_bias": torch.zeros(2, 3, 7)}, r"selection_bias has shape .2, 3, 7.*7 blocks.*\[2, 2, 7\] or"),
        ({"key_padding_mask": torch.ones(2, 29, dtype=torch.bool)}, "key_padding_mask has shape .2, 29., but q has"),
        ({"key_padding_mask": torch.ones(2, 30)}, "key_padding_mask has dtype"),
        ({"block_size": 0}, "block_size=0 must be an integer of at least 1"),
        ({"num_selected": -1}, "num_selected=-1 must be an integer of at least 0"),
        ({"window_blocks": 0.5}, "window_blocks=0.5 must be an integer of at least 0"),
        ({"num_sinks": -1}, "num_sinks=-1 must be"),
        ({"tree_levels": 0}, "tree_levels=0 must be"),
        ({"tree_factor": 1}, "tree_factor=1 must be an integer of at least 2"),
        ({"error_tolerance": -0.1}, "error_tolerance=-0.1 must be at least 0"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        ucsa_attention(**{**make_qkv(30), **SIZES, **change})


def test_what_is_kept_for_the_backward_pass_grows_with_the_length():
    length = 1024
    q = torch.randn(1, 1, length, 8, requires_grad=True)
    sizes = []

    def record(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        ucsa_attention(q, q, q, block_size=16, num_selected=4, window_blocks=1, num_sinks=4, tree_levels=2)
    assert max(sizes) <= length * 8


def test_runs_can_be_deterministic():
    torch.manual_seed(0)
    tensors = make_qkv(50)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            output = sparse(**tensors, **SIZES, tree_levels=2)
            results.append([output, *torch.autograd.grad(output.square().sum(), list(tensors.values()))])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_shapes_can_be_found_on_the_meta_device():
    tensors = {name: tensor.detach().to("meta") for name, tensor in make_qkv(50).items()}
    assert ucsa_attention(**tensors, **SIZES).shape == (BATCH, HEADS, 50, WIDTH)
    _, stats = ucsa_attention(**tensors, **SIZES, return_stats=True)
    _, expected = ucsa_attention(**make_qkv(50), **SIZES, return_stats=True)
    assert [x.shape for x in stats] == [x.shape for x in expected]
    assert [x.dtype for x in stats] == [torch.int32, *[torch.float64] * 5]


@pytest.mark.cuda
def test_cuda_equals_cpu():
    torch.manual_seed(0)
    tensors, mask = {name: tensor.detach() for name, tensor in make_qkv(50).items()}, make_mask("ragged", 50)
    expected = ucsa_attention(**tensors, **SIZES, tree_levels=2, key_padding_mask=mask)
    there = {name: tensor.cuda() for name, tensor in tensors.items()}
    ours = ucsa_attention(**there, **SIZES, tree_levels=2, key_padding_mask=mask.cuda())
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("candidates", [216, 220, 333])
def test_of_many_candidates_the_best_are_found_by_groups(candidates):
    torch.manual_seed(0)
    scores = torch.randn(2, 50, candidates)
    scores[:, :7] = scores[:, :7].round(decimals=1)  # Ties, at the border too.
    scores[:, 7:9, 5:] = MASKED
    chosen = best_cells(scores, lambda: torch.arange(candidates), 8)
    # Of equal ones the later.
    order = scores.flip(-1).sort(dim=-1, descending=True, stable=True)
    expected = (candidates - 1 - order.indices[..., :8]).masked_fill(order.values[..., :8] < MASKED / 2, -1)
    assert torch.equal(chosen.sort(dim=-1).values, expected.sort(dim=-1).values)


@pytest.mark.parametrize("readers", [8, 40])
def test_blocks_are_read_for_any_number_of_queries_at_once(readers, monkeypatch):
    torch.manual_seed(0)
    tensors, mask = make_qkv(61), make_mask("ragged", 61)
    settings = {**SIZES, "tree_levels": 2, "key_padding_mask": mask}
    expected = ucsa_attention_reference(**tensors, **settings)
    monkeypatch.setattr("danon_lightning.attention.ucsa.sparse.READERS_AT_ONCE", readers)
    monkeypatch.setattr("danon_lightning.attention.ucsa.sparse.QUERIES_AT_ONCE", 16)
    monkeypatch.setattr("danon_lightning.attention.ucsa.expanded.MERGED_AT_ONCE", 24)
    monkeypatch.setattr("danon_lightning.attention.ucsa.rotation.ROTATED_AT_ONCE", 13)
    assert_same(tensors, sparse(**tensors, **settings), expected)


def test_groups_of_the_selection_change_nothing(monkeypatch):
    torch.manual_seed(0)
    tensors = make_qkv(121)
    settings = {**SIZES, "num_sinks": 0}
    monkeypatch.setattr("danon_lightning.attention.ucsa.selection.GROUP_SIZE", 3)
    assert_same(tensors, sparse(**tensors, **settings), ucsa_attention_reference(**tensors, **settings))
