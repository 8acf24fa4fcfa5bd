"""The chunked forms of the gated recurrences against the recurrences themselves."""

import pytest
import torch
import torch.nn.functional as F

from danon_lightning.attention.functional import (
    gated_delta_rule,
    gated_delta_rule_reference,
    gated_linear_attention,
    gated_linear_attention_reference,
)
from danon_lightning.attention.linear.functional import resumed_delta_rule

BATCH, HEADS, GROUPS, WIDTH, VALUE_WIDTH = 2, 4, 2, 4, 3
RULES = {
    "linear": (gated_linear_attention, gated_linear_attention_reference),
    "delta": (gated_delta_rule, gated_delta_rule_reference),
}


def make_tensors(rule, length, *, strength=0.3, groups=GROUPS, state=True, dtype=torch.float64):
    keys = torch.randn(BATCH, groups, length, WIDTH, dtype=dtype)
    tensors = {
        "q": torch.randn(BATCH, HEADS, length, WIDTH, dtype=dtype),
        "k": F.normalize(keys, dim=-1),
        "v": torch.randn(BATCH, groups, length, VALUE_WIDTH, dtype=dtype),
        "log_decay": -strength * torch.rand(BATCH, HEADS, length, dtype=dtype),
    }
    if rule == "delta":
        tensors["beta"] = torch.rand(BATCH, HEADS, length, dtype=dtype)
    if state:
        tensors["initial_state"] = torch.randn(BATCH, HEADS, WIDTH, VALUE_WIDTH, dtype=dtype)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def assert_same(tensors, ours, theirs, tolerance=1e-10):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance)
    upstream = [torch.randn_like(x) for x in ours]
    grads = [torch.autograd.grad(outputs, list(tensors.values()), upstream) for outputs in (ours, theirs)]
    for name, mine, other in zip(tensors, *grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state", [True, False], ids=["given state", "zero state"])
@pytest.mark.parametrize("chunk_size", [1, 5, 8, 64])
@pytest.mark.parametrize("length", [1, 5, 8, 23])
def test_chunked_form_equals_the_recurrence(rule, length, chunk_size, state):
    torch.manual_seed(length)
    tensors = make_tensors(rule, length, state=state)
    ours, theirs = RULES[rule]
    assert_same(tensors, ours(**tensors, chunk_size=chunk_size), theirs(**tensors))


def test_the_delta_rule_resumes_from_what_it_has_returned():
    torch.manual_seed(0)
    tensors = make_tensors("delta", 203)
    with torch.no_grad():
        *first, known = resumed_delta_rule(**tensors, chunk_size=5, known=())
    assert len(known) > 2  # of several pieces
    *again, kept = resumed_delta_rule(**tensors, chunk_size=5, known=known)
    for mine, other in zip(first, again, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    assert all(torch.equal(mine, other) for mine, other in zip(kept, known, strict=True))
    assert_same(tensors, again, gated_delta_rule_reference(**tensors))


@pytest.mark.parametrize("rule", RULES)
def test_many_chunks_equal_the_recurrence(rule):
    torch.manual_seed(0)
    tensors = make_tensors(rule, 203, groups=HEADS)
    ours, theirs = RULES[rule]
    assert_same(tensors, ours(**tensors, chunk_size=3), theirs(**tensors))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("strength", [0.0, 5.0, 100.0, 1e5])
def test_no_decay_is_too_strong_or_too_weak(rule, strength):
    torch.manual_seed(0)
    tensors = make_tensors(rule, 40, strength=strength)
    ours, theirs = RULES[rule]
    assert_same(tensors, ours(**tensors, chunk_size=16), theirs(**tensors))


@pytest.mark.parametrize("rule", RULES)
def test_the_past_can_be_forgotten_at_once(rule):
    torch.manual_seed(0)
    tensors = make_tensors(rule, 20)
    ours, theirs = RULES[rule]
    with torch.no_grad():
        tensors["log_decay"][:, :, [0, 7, 8, 12]] = float("-inf")
    output, state = ours(**tensors, chunk_size=8)
    torch.testing.assert_close(output, theirs(**tensors)[0], rtol=0, atol=1e-12)
    grads = torch.autograd.grad((output[:, :, 12:].sum(), state.sum()), list(tensors.values()))
    assert all(grad.isfinite().all() for grad in grads)
    assert torch.count_nonzero(grads[2][:, :, :12]) == 0


@pytest.mark.parametrize("rule", RULES)
def test_strong_decay_is_accurate_in_float32(rule):
    torch.manual_seed(0)
    tensors = make_tensors(rule, 200, dtype=torch.float32)
    with torch.no_grad():
        tensors["log_decay"][:, :, ::5] = -300.0
    exact = {name: tensor.detach().double() for name, tensor in tensors.items()}
    ours, theirs = RULES[rule]
    for mine, other in zip(ours(**tensors), theirs(**exact), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cut", [1, 8, 13, 36])
def test_two_parts_with_the_state_equal_the_whole(rule, cut):
    torch.manual_seed(0)
    tensors = make_tensors(rule, 37)
    ours, _ = RULES[rule]

    def part(here, state):
        pieces = {name: x[:, :, here] for name, x in tensors.items() if name != "initial_state"}
        return ours(**pieces, initial_state=state, chunk_size=8)

    first, state = part(slice(cut), tensors["initial_state"])
    second, state = part(slice(cut, None), state)
    assert_same(tensors, (torch.cat([first, second], dim=2), state), ours(**tensors, chunk_size=8))


@pytest.mark.parametrize("rule", RULES)
def test_tokens_that_do_nothing_leave_the_state_as_it_is(rule):
    torch.manual_seed(0)
    tensors = {name: tensor.detach() for name, tensor in make_tensors(rule, 30).items()}
    real = torch.rand(30) < 0.5
    tensors["log_decay"][:, :, ~real] = 0.0
    if rule == "delta":
        tensors["beta"][:, :, ~real] = 0.0
    else:
        tensors["k"][:, :, ~real] = 0.0
    ours, _ = RULES[rule]
    output, state = ours(**tensors, chunk_size=8)
    short = {name: x if name == "initial_state" else x[:, :, real] for name, x in tensors.items()}
    expected, expected_state = ours(**short, chunk_size=8)
    torch.testing.assert_close(output[:, :, real], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-12)


def test_the_delta_rule_replaces_what_a_key_held():
    key, values = torch.zeros(1, 1, 2, 4), torch.randn(1, 1, 2, 3)
    key[..., 1] = 1.0
    gates = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    replaced, _ = gated_delta_rule(key, key, values, *gates)
    summed, _ = gated_linear_attention(key, key, values, gates[0])
    torch.testing.assert_close(replaced, values)
    torch.testing.assert_close(summed, values.cumsum(dim=2))


@pytest.mark.parametrize("rule", RULES)
def test_the_future_does_not_leak(rule):
    torch.manual_seed(0)
    tensors = make_tensors(rule, 30)
    inputs = [tensor for name, tensor in tensors.items() if name != "initial_state"]
    for position in (1, 7, 8, 29):
        output, _ = RULES[rule][0](**tensors, chunk_size=8)
        grads = torch.autograd.grad(output[:, :, :position].sum(), inputs)
        assert all(torch.count_nonzero(grad[:, :, position:]) == 0 for grad in grads)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_inputs_and_output_only(rule, dtype):
    torch.manual_seed(0)
    rough = {name: tensor.detach().to(dtype) for name, tensor in make_tensors(rule, 100, state=False).items()}
    output, state = RULES[rule][0](**rough)
    assert output.dtype == dtype and state.dtype == torch.float32
    expected, expected_state = RULES[rule][1](**{name: tensor.double() for name, tensor in rough.items()})
    torch.testing.assert_close(output.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(state.double(), expected_state, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_autocast_leaves_the_recurrence_in_float32(rule):
    torch.manual_seed(0)
    tensors = make_tensors(rule, 50, dtype=torch.float32)
    expected = RULES[rule][0](**tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = RULES[rule][0](**tensors)
    assert_same(tensors, ours, expected, tolerance=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 30)}, "q has shape"),
        ({"k": torch.zeros(2, 3, 30, 4)}, "k has shape .2, 3, 30, 4., but q has shape"),
        ({"k": torch.zeros(2, 2, 30, 5)}, "k has shape .* must have shape .2, 2, 30, 4."),
        ({"v": torch.zeros(2, 2, 30)}, "v has shape .2, 2, 30."),
        ({"v": torch.zeros(2, 2, 29, 3)}, "v has shape .2, 2, 29, 3."),
        ({"log_decay": torch.zeros(2, 2, 30)}, "log_decay has shape .2, 2, 30.* must have shape .2, 4, 30."),
        ({"beta": torch.zeros(2, 4, 30, 1)}, "beta has shape"),
        ({"initial_state": torch.zeros(2, 4, 3, 4)}, "initial_state has shape .* must have shape .2, 4, 4, 3."),
        ({"chunk_size": 0}, "chunk_size=0 must be an integer of at least 1"),
        ({"chunk_size": 1.5}, "chunk_size=1.5 must be"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**{**make_tensors("delta", 30), **change})
    if "beta" not in change:
        with pytest.raises(ValueError, match=message):
            gated_linear_attention(**{**make_tensors("linear", 30), **change})


@pytest.mark.parametrize("rule", RULES)
def test_no_matrix_of_all_pairs_is_formed(rule):
    length = 1024
    tensors = make_tensors(rule, length)
    sizes = []

    def record(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        RULES[rule][0](**tensors, chunk_size=16)
    assert max(sizes) <= BATCH * HEADS * length * 16


@pytest.mark.parametrize("rule", RULES)
def test_shapes_can_be_found_on_the_meta_device(rule):
    tensors = {name: tensor.detach().to("meta") for name, tensor in make_tensors(rule, 50).items()}
    output, state = RULES[rule][0](**tensors)
    assert output.shape == (BATCH, HEADS, 50, VALUE_WIDTH) and state.shape == (BATCH, HEADS, WIDTH, VALUE_WIDTH)


@pytest.mark.cuda
@pytest.mark.parametrize("rule", RULES)
def test_cuda_equals_cpu(rule):
    torch.manual_seed(0)
    tensors = make_tensors(rule, 50)
    ours = RULES[rule][0](**{name: tensor.detach().cuda() for name, tensor in tensors.items()})
    for mine, other in zip(ours, RULES[rule][0](**tensors), strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=0, atol=1e-10)


def test_a_token_that_repeats_leaves_the_delta_rule_accurate_in_float32():
    torch.manual_seed(0)
    key = F.normalize(torch.randn(1, 2, 1, 16), dim=-1).expand(-1, -1, 150, -1)
    tensors = key, key, torch.randn(1, 2, 150, 16), torch.zeros(1, 2, 150), torch.ones(1, 2, 150)
    ours, exact = gated_delta_rule(*tensors), gated_delta_rule_reference(*(x.double() for x in tensors))
    for mine, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=1e-5)


def test_the_delta_rule_has_no_second_derivative_and_says_so():
    tensors = [torch.randn(1, 1, 20, 4, requires_grad=True) for _ in range(3)]
    output, _ = gated_delta_rule(*tensors, torch.zeros(1, 1, 20), torch.ones(1, 1, 20))
    [grad] = torch.autograd.grad(output.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
