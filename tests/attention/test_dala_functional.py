"""The fast form of DALA's softmax against its definition."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from danon_lightning.attention.dala.memory import gumbel_noise, memory_scores, select_memory
from danon_lightning.attention.dala.work import SoftmaxWork
from danon_lightning.attention.functional import dala_attention, dala_attention_reference, full_attention
from danon_lightning.attention.merging import MASKED
from danon_lightning.attention.recompute import PieceWork
from danon_lightning.attention.rotary import apply_rotary, cell_positions

sys.path.insert(0, str(Path(__file__).parent))
from agreement import assert_same, make_mask  # noqa: E402

BATCH, HEADS, GROUPS, WIDTH = 2, 4, 2, 4
SIZES = {"block_size": 4, "memory_size": 5}


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def make_tensors(length, block_size=4, groups=GROUPS):
    blocks = -(-length // block_size)
    return {
        "q": double(BATCH, HEADS, length, WIDTH),
        "k": double(BATCH, groups, length, WIDTH),
        "v": double(BATCH, groups, length, WIDTH),
        "log_importance": F.logsigmoid(double(BATCH, length)).detach().requires_grad_(),
        "distance_decay": torch.rand(HEADS, dtype=torch.float64, requires_grad=True),
        "window_width": (1 + 5 * torch.rand(HEADS, blocks, dtype=torch.float64)).requires_grad_(),
        "memory_bias": double(BATCH, HEADS, length),
    }


@pytest.fixture(params=[1024, 8], ids=["one piece", "many pieces"])
def tokens_at_once(request, monkeypatch):
    monkeypatch.setattr("danon_lightning.attention.pieces.TOKENS_AT_ONCE", request.param)


@pytest.mark.parametrize("padding", ["none", "left", "right", "ragged", "whole row"])
@pytest.mark.parametrize("length", [1, 3, 4, 8, 9, 16, 21, 50])
def test_blocked_form_equals_the_definition(length, padding, tokens_at_once):
    torch.manual_seed(length)
    tensors = make_tensors(length)
    settings = {**SIZES, "key_padding_mask": make_mask(padding, length)}
    ours, theirs = (f(**tensors, **settings) for f in (dala_attention, dala_attention_reference))
    assert_same(tensors, ours, theirs)


def test_without_gradients_the_values_are_the_same(tokens_at_once):
    torch.manual_seed(0)
    tensors, settings = make_tensors(50), {**SIZES, "key_padding_mask": make_mask("ragged", 50)}
    expected = dala_attention(**tensors, **settings)
    with torch.no_grad():
        torch.testing.assert_close(dala_attention(**tensors, **settings), expected, rtol=0, atol=1e-13)
    for name in "kv":
        frozen = {**tensors, name: tensors[name].detach()}
        assert_same(frozen, dala_attention(**frozen, **settings), dala_attention_reference(**frozen, **settings))


def gradients(output, tensors, upstream):
    sources = [x for x in tensors.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    return torch.autograd.grad(output, sources, upstream, retain_graph=True, materialize_grads=True)


VARIED = [{}, {"memory_bias": None}, {"memory_size": 0}, {"importance_threshold": 0.9}]


@pytest.mark.parametrize("padding", ["none", "ragged", "whole row"])
@pytest.mark.parametrize("settings", VARIED, ids=str)
def test_head_by_head_gives_what_all_heads_at_once_give(settings, padding, tokens_at_once, monkeypatch):
    torch.manual_seed(0)
    tensors = {**make_tensors(43), **SIZES, **settings, "key_padding_mask": make_mask(padding, 43)}
    for scale in (1.0, 100.0):  # the second one lets most weights underflow
        scaled = {**tensors, "q": tensors["q"] * scale}
        ours, found = dala_attention(**scaled, return_stats=True)
        torch.testing.assert_close(ours, dala_attention_reference(**scaled), rtol=0, atol=1e-10)
        with monkeypatch.context() as patch:
            patch.setattr(SoftmaxWork, "run_without_graph", PieceWork.run_without_graph)
            patch.setattr(SoftmaxWork, "backward", PieceWork.backward)
            theirs, stats = dala_attention(**scaled, return_stats=True)
            upstream = torch.randn_like(ours)
            expected = gradients(theirs, tensors, upstream)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        for mine, other in zip(gradients(ours, tensors, upstream), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found.memory_weight, stats.memory_weight, rtol=0, atol=1e-12)
        seen = stats.lse > MASKED / 2
        assert torch.equal(seen, found.lse > MASKED / 2)
        torch.testing.assert_close(found.lse[seen], stats.lse[seen], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 3, 7, 16, 100])
@pytest.mark.parametrize("memory_size", [0, 1, 6, 1000])
def test_blocked_form_at_other_sizes(block_size, memory_size, tokens_at_once):
    torch.manual_seed(0)
    for length, groups in ((1, 1), (37, HEADS)):
        tensors = make_tensors(length, block_size, groups)
        settings = {"block_size": block_size, "memory_size": memory_size, "rope_base": 100.0}
        ours, theirs = (f(**tensors, **settings) for f in (dala_attention, dala_attention_reference))
        assert_same(tensors, ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"importance_threshold": 0.5},
        {"importance_threshold": 1.0},
        {"recency": 0.0},
        {"recency": 0.2},
        {"recency": -0.2},
        {"rope_base": None},
        {"memory_bias": None},
        {"selection_bias": torch.linspace(2, -2, 43).sin().expand(BATCH, -1)},
        {"window_width": 3.0},
        {"window_width": torch.tensor(3.0, requires_grad=True)},
        {"window_width": torch.tensor([1.0, 2.0, 3.0, 400.0], dtype=torch.float64, requires_grad=True)},
    ],
    ids=str,
)
def test_settings_mean_what_the_definition_says(settings, tokens_at_once):
    torch.manual_seed(0)
    arguments = {**make_tensors(43), **SIZES, **settings, "key_padding_mask": make_mask("ragged", 43)}
    ours, theirs = (f(**arguments) for f in (dala_attention, dala_attention_reference))
    assert_same(arguments, ours, theirs)


def test_noise_draws_tokens_in_proportion():
    torch.manual_seed(0)
    scores = torch.tensor([0.0, 0.3 * math.log(3.0), 0.0, -9.0]).expand(100_000, -1)
    noise = gumbel_noise(scores, 0.3)
    best = (scores + noise).topk(2).indices
    shares = (best[:, :1] == torch.arange(4)).float().mean(dim=0)
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.6, 0.2, 0.0]), rtol=0, atol=0.01)
    # The second is drawn of what is left.
    after = (best[best[:, 0] == 0, 1:] == torch.arange(4)).float().mean(dim=0)
    torch.testing.assert_close(after, torch.tensor([0.0, 0.75, 0.25, 0.0]), rtol=0, atol=0.01)
    assert gumbel_noise(scores, 0.0) is None and noise.isfinite().all()


def test_of_equally_important_tokens_the_latest_are_remembered():
    torch.manual_seed(0)
    tensors = make_tensors(60) | {"log_importance": torch.full((BATCH, 60), -0.7, dtype=torch.float64)}
    for recency in (0.0, 1e-3):
        ours, stats = dala_attention(**tensors, **SIZES, recency=recency, return_stats=True)
        assert_same(tensors, ours, dala_attention_reference(**tensors, **SIZES, recency=recency))
        assert sorted(stats.memory_tokens[0, -1].tolist()) == [47, 48, 49, 50, 51]


@pytest.mark.parametrize("block_size", [1, 3, 8])
@pytest.mark.parametrize("length", [2, 50, 203])
def test_the_best_tokens_are_selected_for_each_block(length, block_size):
    torch.manual_seed(0)
    importance = F.logsigmoid(torch.randn(BATCH, length)).masked_fill(torch.rand(BATCH, length) < 0.2, MASKED)
    scores = memory_scores(importance, 0, importance_threshold=0.2, recency=1e-2)
    for memory_size in (1, 7, 300):
        selected = select_memory(scores, block_size, memory_size)
        for row, block in [(row, block) for row in range(BATCH) for block in range(selected.shape[1])]:
            old = [j for j in range(max(0, (block - 1) * block_size)) if scores[row, j] > float("-inf")]
            best = sorted(old, key=lambda j: scores[row, j].item())[-memory_size:]
            found = [j for j in selected[row, block].tolist() if j >= 0]
            assert sorted(found) == sorted(best)


def test_a_window_without_falling_off_and_a_memory_of_everything_are_full_attention():
    torch.manual_seed(0)
    tensors = make_tensors(50) | {"distance_decay": torch.zeros(HEADS), "memory_bias": None, "window_width": 1e9}
    tensors["log_importance"] = torch.full((BATCH, 50), -0.7)
    output = dala_attention(**tensors, block_size=4, memory_size=50, rope_base=None)
    expected = full_attention(tensors["q"], tensors["k"], tensors["v"])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    # And a window of the whole sequence is full attention with rotation.
    output = dala_attention(**tensors, block_size=50, memory_size=50)
    positions = cell_positions(0, 50, 1, torch.device("cpu"))
    expected = full_attention(*(apply_rotary(tensors[x], positions, 10000.0) for x in "qk"), tensors["v"])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_the_future_does_not_leak(tokens_at_once):
    torch.manual_seed(0)
    tensors = make_tensors(50)
    inputs = [tensors[name] for name in ("k", "v", "log_importance")]
    output = dala_attention(**tensors, **SIZES)
    for position in (1, 7, 8, 31, 49):
        grads = torch.autograd.grad(output[:, :, :position].sum(), inputs, retain_graph=True)
        assert all(torch.count_nonzero(grad[:, :, position:]) == 0 for grad in grads[:2])
        assert torch.count_nonzero(grads[2][:, position:]) == 0
        # The selection must not look ahead either, and it has no gradient to tell.
        changed = {name: x.detach().clone() for name, x in tensors.items()}
        changed["log_importance"][:, position:] = -1e-3
        before = dala_attention(**changed, **SIZES)[:, :, :position]
        torch.testing.assert_close(before, output[:, :, :position], rtol=0, atol=1e-13)


def test_padding_has_no_influence():
    torch.manual_seed(0)
    tensors, mask = make_tensors(50), make_mask("ragged", 50)
    output = dala_attention(**tensors, **SIZES, key_padding_mask=mask)
    for name in "kv":
        tensors[name] = torch.where(mask[:, None, :, None], tensors[name], 7.0)
    tensors["log_importance"] = torch.where(mask, tensors["log_importance"], 0.0)
    ours = dala_attention(**tensors, **SIZES, key_padding_mask=mask)
    torch.testing.assert_close(ours, output, rtol=0, atol=1e-13)


def test_rows_without_real_tokens_are_zero(tokens_at_once):
    torch.manual_seed(0)
    tensors = make_tensors(30)
    mask = torch.ones(BATCH, 30, dtype=torch.bool)
    mask[0, :12], mask[1] = False, False
    output = dala_attention(**tensors, **SIZES, key_padding_mask=mask)
    assert torch.count_nonzero(output[0, :, :12]) == 0 and torch.count_nonzero(output[1]) == 0
    assert torch.count_nonzero(output[0, :, 12:]) == output[0, :, 12:].numel()
    grads = torch.autograd.grad(output.square().sum(), list(tensors.values()))
    assert all(grad.isfinite().all() for grad in grads)
    assert all(torch.count_nonzero(grad[1]) == 0 for grad in grads[:4])


def test_stats_tell_what_was_attended_to(tokens_at_once):
    torch.manual_seed(0)
    tensors = make_tensors(30)
    output, stats = dala_attention(**tensors, **SIZES, return_stats=True)
    torch.testing.assert_close(output, dala_attention(**tensors, **SIZES))
    assert stats.memory_weight.shape == stats.lse.shape == (BATCH, HEADS, 30)
    assert stats.memory_tokens.shape == (BATCH, 8, 5)
    assert not stats.memory_weight.requires_grad and not stats.lse.requires_grad
    assert (stats.memory_weight[:, :, :8] == 0).all() and (stats.memory_tokens[:, :2] == -1).all()
    assert (stats.memory_weight[:, :, 8:] > 0).all() and (stats.memory_weight < 1).all()
    # All of the mass on the memory: the window is out.
    tensors["memory_bias"] = torch.full((BATCH, HEADS, 30), 100.0)
    _, stats = dala_attention(**tensors, **SIZES, return_stats=True)
    torch.testing.assert_close(stats.memory_weight[:, :, 8:], torch.ones_like(stats.lse[:, :, 8:]))
    _, stats = dala_attention(**tensors, block_size=4, memory_size=0, return_stats=True)
    assert (stats.memory_weight == 0).all() and stats.memory_tokens.shape == (BATCH, 8, 0)


def test_dropout_changes_single_weights_and_keeps_the_mean():
    torch.manual_seed(0)
    q = torch.randn(64, HEADS, 40, WIDTH)
    ones, importance = torch.ones_like(q), torch.full((64, 40), -0.7)
    settings = {**SIZES, "distance_decay": torch.zeros(HEADS), "window_width": 10.0, "log_importance": importance}
    output = dala_attention(q, torch.randn_like(q), ones, **settings, dropout_p=0.2)
    assert output[:, :, 1:].std() > 0.05
    assert output.mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_and_finite(dtype):
    torch.manual_seed(0)
    exact = {name: tensor.detach() for name, tensor in make_tensors(50).items()}
    rough = {name: tensor.to(dtype) if name in "qkv" else tensor for name, tensor in exact.items()}
    mask = make_mask("left", 50)
    output = dala_attention(**rough, **SIZES, key_padding_mask=mask)
    assert output.dtype == dtype
    expected = dala_attention(**exact, **SIZES, key_padding_mask=mask)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=0.05)


def test_autocast_keeps_the_biases_in_float32():
    torch.manual_seed(0)
    tensors = {name: tensor.detach().float() for name, tensor in make_tensors(50).items()}
    tensors["q"] = torch.zeros_like(tensors["q"])
    expected, stats = dala_attention(**tensors, **SIZES, return_stats=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, rough = dala_attention(**tensors, **SIZES, return_stats=True)
    torch.testing.assert_close(rough.lse, stats.lse, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 30)}, "q has shape"),
        ({"q": torch.zeros(2, 4, 30, 3)}, "q has shape .2, 4, 30, 3., of odd width 3"),
        ({"k": torch.zeros(2, 3, 30, 4)}, "k has shape .2, 3, 30, 4., but q has shape"),
        ({"v": torch.zeros(2, 2, 29, 4)}, "v has shape .2, 2, 29, 4."),
        ({"log_importance": torch.zeros(2, 4, 30)}, "log_importance has shape .* must have shape .2, 30."),
        ({"distance_decay": torch.zeros(2)}, "distance_decay has shape .2.* must have shape .4."),
        ({"window_width": torch.ones(4, 7)}, r"window_width has shape .4, 7.* \[4\] or \[4, 8\]"),
        ({"window_width": 0.0}, "window_width=0.0 must be positive"),
        ({"memory_bias": torch.zeros(2, 4, 30, 1)}, "memory_bias has shape"),
        ({"selection_bias": torch.zeros(2, 4, 30)}, "selection_bias has shape .2, 4, 30.* must have shape .2, 30."),
        ({"key_padding_mask": torch.ones(2, 29, dtype=torch.bool)}, "key_padding_mask has shape"),
        ({"key_padding_mask": torch.ones(2, 30)}, "key_padding_mask has dtype"),
        ({"block_size": 0}, "block_size=0 must be an integer of at least 1"),
        ({"memory_size": -1}, "memory_size=-1 must be an integer of at least 0"),
        ({"importance_threshold": -1.0}, "importance_threshold=-1.0 must be between 0 and 1"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        dala_attention(**{**make_tensors(30), **SIZES, **change})


def test_memory_grows_with_the_length_and_not_its_square():
    length = 1024
    q = torch.randn(1, 1, length, 8, requires_grad=True)
    sizes = []

    def record(tensor):
        sizes.append(tensor.numel())
        return tensor

    importance, decay = torch.randn(1, length).sigmoid().log().requires_grad_(), torch.zeros(1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        dala_attention(
            q, q, q, log_importance=importance, block_size=16, memory_size=16, distance_decay=decay, window_width=9.0
        )
    assert max(sizes) <= length * 2 * 16


def test_shapes_can_be_found_on_the_meta_device():
    tensors = {name: tensor.detach().to("meta") for name, tensor in make_tensors(50).items()}
    assert dala_attention(**tensors, **SIZES).shape == (BATCH, HEADS, 50, WIDTH)


@pytest.mark.cuda
def test_cuda_equals_cpu():
    torch.manual_seed(0)
    tensors, mask = {name: tensor.detach() for name, tensor in make_tensors(50).items()}, make_mask("ragged", 50)
    expected = dala_attention(**tensors, **SIZES, key_padding_mask=mask)
    there = {name: tensor.cuda() for name, tensor in tensors.items()}
    ours = dala_attention(**there, **SIZES, key_padding_mask=mask.cuda())
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-10)
