"""What the settings of DALA do, and what its methods and output fields say."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from danon_lightning.attention.components.importance import ImportanceNetwork
from danon_lightning.attention.components.recurrent import RecurrentState
from danon_lightning.attention.components.router import DynamicRouter
from danon_lightning.attention.core import observing
from danon_lightning.attention.functional import dala_attention, gated_delta_rule_reference

sys.path.insert(0, str(Path(__file__).parent))
from variants import build, make_config, scramble  # noqa: E402

IDS = torch.randint(0, 11, (2, 60), generator=torch.Generator().manual_seed(0))


def hidden(model, ids=IDS):
    return model(ids).last_hidden_state


def first_difference(model, other):
    """Position of the first token whose output differs between two models with the same parameters."""
    other.load_state_dict(model.state_dict(), strict=False)
    differs = (hidden(model) - hidden(other)).abs().amax(dim=(0, 2)) > 1e-9
    return int(differs.nonzero()[0]) if differs.any() else None


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"block_size": 8}, 1),  # the width of the window follows from the block
        ({"memory_size": 3}, 8),  # when the first block has left the window
        ({"use_sparse_attention": False}, 8),
        ({"importance_threshold": 0.5}, 8),
        ({"recency": 1.0}, 12),  # when more than M tokens have left the window
        ({"use_recursive_state": False}, 0),
        ({"state_update_frequency": 4}, 0),
        ({"use_adaptive_router": False}, 0),
        ({"router_temperature": 3.0}, 0),
        ({"rope_base": None}, 1),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_act_where_they_should(settings, first):
    # A router has logits for the routes there are: without it, models with and without a route have the same ones.
    shared = {"num_layers": 1}
    if {"use_sparse_attention", "use_recursive_state"} & set(settings):
        shared["use_adaptive_router"] = False
    model = scramble(build("dala", **shared).double())
    assert first_difference(model, build("dala", **shared, **settings).double()) == first


def test_at_first_the_memory_counts_by_its_logit():
    """Its share of the softmax against that of the window is e^memory_logit times what it would be."""
    torch.manual_seed(0)
    x, (q, k, v) = torch.randn(1, 60, 16).double(), torch.randn(3, 1, 4, 60, 4).double()
    odds = []
    for logit in (-2.0, 0.0):
        core = build("dala", use_recursive_state=False, memory_logit=logit).double().layers[0].core
        share = core.attention_statistics(x, q, k, v)["route/memory"]
        assert torch.count_nonzero(share[..., :8]) == 0 and share[..., 8:].min() > 0
        odds.append(share / (1 - share))
    torch.testing.assert_close(odds[0], odds[1] * math.exp(-2.0))


def test_in_training_the_memory_chooses_with_noise():
    model = scramble(build("dala", num_layers=1, selection_noise=2.0)).train()
    differs = (hidden(model) - hidden(model)).abs().amax(dim=(0, 2)) > 1e-6
    # When more than M tokens have left the window.
    assert not differs[:12].any() and differs[12:].any()
    model.eval()
    torch.testing.assert_close(hidden(model), hidden(model), rtol=0, atol=0)
    quiet = build("dala", num_layers=1, selection_noise=0.0)
    quiet.load_state_dict(model.state_dict())
    torch.testing.assert_close(hidden(quiet.train()), hidden(model), rtol=0, atol=1e-6)


def test_decay_rates_are_spread_over_the_heads():
    for rate in (0.9, 0.99, 0.999):
        recurrent = build("dala", state_decay_rate=rate).layers[0].core.recurrent
        decays = recurrent.decay_offset.sigmoid()
        torch.testing.assert_close(decays[[0, -1]], torch.tensor([rate, max(rate, 0.9975)]))
        assert (decays.diff() > 0).all() == (rate < 0.9975)


def test_recurrent_state_follows_its_definition():
    torch.manual_seed(0)
    module = RecurrentState(6, 4, 3).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    q, k, v = (torch.randn(2, heads, 11, 3, dtype=torch.float64) for heads in (4, 2, 2))
    decay = F.logsigmoid(module.decay(x) + module.decay_offset).transpose(1, 2)
    unit = [F.normalize(F.silu(part), dim=-1) for part in (q, k)]
    read, _ = gated_delta_rule_reference(*unit, v, decay, module.rate(x).sigmoid().transpose(1, 2))
    expected = read / (read.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * module.gain.unsqueeze(1)
    torch.testing.assert_close(module(x, q, k, v)[0], expected, rtol=0, atol=1e-12)


def test_what_is_read_can_be_weighted_and_added_to_something(monkeypatch):
    monkeypatch.setattr("danon_lightning.attention.pieces.TOKENS_AT_ONCE", 8)
    torch.manual_seed(0)
    module = RecurrentState(6, 4, 3).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    q, k, v, onto = (torch.randn(2, heads, 11, 3, dtype=torch.float64) for heads in (4, 2, 2, 4))
    weight = torch.randn(2, 4, 11, dtype=torch.float64)
    leaves = [*module.parameters(), *(tensor.requires_grad_() for tensor in (x, q, k, v, onto, weight))]
    ours = module(x, q, k, v, weight=weight, onto=onto)[0]
    theirs = onto + weight.unsqueeze(-1) * module(x, q, k, v)[0]
    upstream = torch.randn_like(ours)
    grads = [torch.autograd.grad(output, leaves, upstream) for output in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)
    with torch.no_grad():
        state = module.init_state(2, 2, device=x.device, dtype=x.dtype)
        streamed = module(x, q, k, v, weight=weight, onto=onto, state=state)[0]
        torch.testing.assert_close(streamed, theirs, rtol=0, atol=1e-12)
        torch.testing.assert_close(module(x, q, k, v, weight=weight, onto=onto)[0], theirs, rtol=0, atol=1e-12)


def test_a_group_enters_the_state_when_it_is_whole():
    torch.manual_seed(0)
    every, fifth = RecurrentState(6, 2, 3).double(), RecurrentState(6, 2, 3, update_frequency=5).double()
    for module in (every, fifth):
        torch.nn.init.ones_(module.gain)
    x = torch.randn(1, 23, 6, dtype=torch.float64)
    q, k, v = torch.randn(3, 1, 2, 23, 3, dtype=torch.float64).unbind(0)
    late, _ = fifth(x, q, k, v)
    for position in range(23):
        # The query reads what the state had taken in with the last whole group.
        entered = (position + 1) // 5 * 5
        if entered == 0:
            assert torch.count_nonzero(late[:, :, position]) == 0
            continue
        query = q[:, :, [position] * entered]
        expected = every(x[:, :entered], query, k[:, :, :entered], v[:, :, :entered])[0][:, :, -1]
        torch.testing.assert_close(late[:, :, position], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 0, 6)}, r"x has shape \[2, 0, 6\]; it must be \[batch, tokens, 6\], none of them zero"),
        ({"x": torch.zeros(2, 5, 7)}, r"x has shape \[2, 5, 7\]; it must be \[batch, tokens, 6\]"),
        ({"q": torch.zeros(2, 4, 4, 3)}, r"q has shape \[2, 4, 4, 3\], but x has shape \[2, 5, 6\] .* \[2, 4, 5, 3\]"),
        ({"k": torch.zeros(2, 3, 5, 3)}, r"k has shape \[2, 3, 5, 3\], but q has shape \[2, 4, 5, 3\]"),
        ({"v": torch.zeros(2, 2, 4, 3)}, r"v has shape \[2, 2, 4, 3\], but x has shape .* \[2, 2, 5, 3\]"),
        ({"weight": torch.zeros(2, 5)}, r"weight has shape \[2, 5\], but x has shape .* \[2, 4, 5\]"),
        ({"gates": [torch.zeros(2, 5, 1)] * 2}, r"gates\[0\] has shape \[2, 5, 1\], but x has shape .* \[2, 5, 4\]"),
        ({"key_padding_mask": torch.ones(1, 5).bool()}, r"mask has shape \[1, 5\], but x has shape .* \[2, 5\]"),
        ({"key_padding_mask": torch.ones(2, 5)}, "key_padding_mask has dtype torch.float32"),
        ({"state": {}}, r"state holds tensors .*'rates': None.* start from init_state\(2, 2, …\)"),
        ({"state": (3, 4, 1)}, r"'matrix': \(3, 4, 3, 3\).*, but 2 sequences, 2 key heads .* \(2, 4, 3, 3\)"),
        ({"state": (2, 4, 9)}, r"'rates': \(2, 4, 5\).* update_frequency=1 need .* \(2, 4, 0\)"),
    ],
)
def test_recurrent_states_name_what_does_not_fit(change, message):
    arguments = {name: torch.zeros(2, heads, 5, 3) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    arguments |= {"x": torch.zeros(2, 5, 6)} | change
    if isinstance(change.get("state"), tuple):
        batch, heads, frequency = change["state"]
        other = RecurrentState(6, heads, 3, update_frequency=frequency)
        q, k = torch.zeros(batch, heads, 5, 3), torch.zeros(batch, 2, 5, 3)
        state = other.init_state(batch, 2, device=q.device, dtype=q.dtype)
        arguments["state"] = other(torch.zeros(batch, 5, 6), q, k, k, state=state)[1]
    with pytest.raises(ValueError, match=message):
        RecurrentState(6, 4, 3)(**arguments)


def test_router_and_importance_name_what_does_not_fit():
    router, predictions, targets = DynamicRouter(6, 3), torch.zeros(2, 2, 3, 5, 6), torch.zeros(2, 5, 6)
    with pytest.raises(ValueError, match=r"x has shape \[2, 5, 7\]; it must be \[batch, tokens, 6\]"):
        router(torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match=r"x has shape \[2, 5, 7\]; it must be \[..., 6\]"):
        ImportanceNetwork(6)(torch.zeros(2, 5, 7))
    for more, mask in ((torch.zeros(2, 4, 3, 5, 6), None), (predictions, torch.ones(1, 5))):
        name = "predictions" if mask is None else "mask"
        with pytest.raises(
            ValueError, match=rf"{name} has shape .*, but targets has shape \[2, 5, 6\] and there are 2 "
        ):
            router.reinforce(more, targets, mask)
    with pytest.raises(ValueError, match=r"targets has shape \[5, 6\]; it must be \[batch, tokens, width\]"):
        router.reinforce(predictions, targets[0])


def test_the_softmax_wants_one_dtype():
    q, k = torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 9, 4).bfloat16()
    settings = {"block_size": 4, "memory_size": 2, "distance_decay": torch.zeros(2), "window_width": 9.0}
    with pytest.raises(ValueError, match="k has dtype torch.bfloat16, but q has dtype torch.float32"):
        dala_attention(q, k, q, log_importance=torch.zeros(1, 9), **settings)


def test_outputs():
    model = scramble(build("dala").double())
    output = model(IDS)
    assert [tuple(x.shape) for x in output.router_logits] == [(2, 2, 4, 60)] * 2
    assert [tuple(x.shape) for x in output.importance_scores] == [(2, 60)] * 2
    core, x = model.layers[0].core, model.layers[0].attention_norm(model.token_embedding(IDS))
    torch.testing.assert_close(output.importance_scores[0], core.importance(x).exp())
    expected = core.router(x)
    plain = core.router.projection(x).unflatten(-1, (2, 4)).permute(0, 2, 3, 1)
    torch.testing.assert_close(expected - plain, torch.tensor([-4.0, 0.0]).double()[:, None, None].expand_as(plain))
    torch.testing.assert_close(output.router_logits[0], expected)
    torch.testing.assert_close(model.get_importance_scores(IDS), torch.stack(output.importance_scores))
    mask = torch.ones_like(IDS)
    mask[:, 50:] = 0
    assert torch.count_nonzero(model.get_importance_scores(IDS, mask)[:, :, 50:]) == 0
    without = build("dala", use_adaptive_router=False)(IDS)
    assert without.router_logits is None and without.importance_scores is not None
    assert model(IDS, output_details=()).importance_scores is None
    with pytest.raises(ValueError, match="output_details: attentions is not among router_logits"):
        model(IDS, output_details=("attentions",))
    chunk = model(IDS[:, :7], state=model.init_state(2))
    torch.testing.assert_close(chunk.importance_scores[1], output.importance_scores[1][:, :7])


def test_measuring_is_done_in_evaluation_mode_and_leaves_no_trace():
    model = scramble(build("dala", dropout=0.3, attention_dropout=0.3, calibration_factor=1.0))
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (model.get_importance_scores(IDS) for _ in range(2))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    added = model.update_router(IDS, IDS)
    assert torch.equal(first, second) and modes == [module.training for module in model.modules()]
    model.load_state_dict(before)
    assert torch.equal(first, model.eval().get_importance_scores(IDS))
    assert torch.equal(added, model.update_router(IDS, IDS))


def test_more_important_tokens_are_remembered():
    model = scramble(build("dala", num_layers=1, memory_size=1).double())
    scores = model.get_importance_scores(IDS)[0]
    with torch.no_grad():
        state = model(IDS, state=model.init_state(2)).state["layers"][0]["core"]["softmax"]
    positions = torch.arange(60, dtype=torch.float64)
    # The next token begins a block, in whose window only the last one is.
    best = (scores.log() + 1e-3 * positions)[:, :56].amax(dim=1)
    torch.testing.assert_close(state["memory_scores"].squeeze(1), best)


def test_update_router_moves_heads_towards_the_route_that_agrees():
    model = scramble(build("dala", num_layers=1).double())
    core, labels = model.layers[0].core, IDS.roll(-1, dims=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    added = model.update_router(IDS, labels)
    assert added.shape == (1, 2, 4) and added.abs().max() <= 1
    torch.testing.assert_close(core.router.bias, added[0] + torch.tensor([-4.0, 0.0]).double()[:, None])
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    ignored = labels.clone()
    ignored[:, 5:] = -100
    other = scramble(build("dala", num_layers=1).double())
    fewer = other.update_router(IDS, ignored)
    assert not torch.allclose(fewer, added)
    # What does not count changes nothing.
    third = scramble(build("dala", num_layers=1).double())
    mask = torch.ones_like(IDS)
    mask[:, 5:] = 0
    torch.testing.assert_close(third.update_router(IDS, labels, mask), fewer)
    torch.testing.assert_close(third.layers[0].core.router.bias, other.layers[0].core.router.bias)


def test_agreement_is_the_mean_cosine():
    router, targets = DynamicRouter(6, 3, 2, temperature=2.0).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    predictions = targets[:, None, None].repeat(1, 2, 3, 1, 1) * 7
    predictions[:, 1, :2] *= -1
    predictions[:, 0, 0, 3] = 0
    mask = torch.ones(2, 5)
    mask[:, 4] = 0
    expected = torch.tensor([[0.75, 1, 1], [-1, -1, 1]], dtype=torch.float64)
    torch.testing.assert_close(router.reinforce(predictions, targets, mask), expected)
    router.reinforce(predictions, targets, mask)
    logits = router(torch.randn(2, 4, 6, dtype=torch.float64))
    torch.testing.assert_close(logits, (2 * expected / 2)[None, :, :, None].expand(2, 2, 3, 4))


def test_routes_add_up_to_the_output():
    model = scramble(build("dala", num_layers=1).double())
    alone = build("dala", num_layers=1, use_sparse_attention=False, use_recursive_state=False).double()
    alone.load_state_dict(model.state_dict(), strict=False)
    block = model.layers[0]
    x = torch.randn(2, 60, 16, dtype=torch.float64)
    with observing([block.core], ["route_outputs"]) as observed:
        whole, _ = block._attend(x, None, None)
    routes = observed[0]["route_outputs"]
    assert routes.shape == (2, 2, 4, 60, 4)
    window, _ = alone.layers[0]._attend(x, None, None)
    # Before anything has left the window, the memory contributes nothing; the state always does.
    assert torch.count_nonzero(routes[:, 0, :, :8].abs() > 1e-12) == 0
    assert (routes[:, 0, :, 8:].abs().amax(dim=-1) > 1e-12).all()
    early = (window.unflatten(-1, (4, 4)).transpose(1, 2) + routes[:, 1])[:, :, :8]
    torch.testing.assert_close(whole.unflatten(-1, (4, 4)).transpose(1, 2)[:, :, :8], early, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size=0 must be an integer of at least 1"),
        ({"memory_size": -1}, "memory_size=-1 must be an integer of at least 1"),
        ({"importance_threshold": 1.5}, "importance_threshold=1.5 must lie between 0 and 1"),
        ({"recency": -1.0}, "recency=-1.0 must not be negative"),
        ({"selection_noise": -1.0}, "selection_noise=-1.0 must not be negative"),
        ({"state_decay_rate": 1.0}, "state_decay_rate=1.0 must lie between 0 and 1"),
        ({"router_temperature": 0.0}, "router_temperature=0.0 must be positive"),
        ({"memory_logit": math.inf}, "memory_logit=inf must be finite"),
        ({"causal": False}, "causal=False is not possible with dala"),
        ({"state_update_frequency": 5}, "state_update_frequency=5 exceeds block_size=4"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        make_config("dala", **settings)


def test_a_router_starts_with_a_number_for_each_route():
    router = DynamicRouter(6, 3, start=(-1.0, 0.5))
    assert router(torch.randn(1, 2, 6)).movedim(1, -1).unique(dim=1).tolist() == [[[[-1.0, 0.5]] * 2]]
    with pytest.raises(ValueError, match=r"start=\(1.0,\) must have a number for each of num_routes=2 routes"):
        DynamicRouter(6, 3, start=(1.0,))


def test_update_router_checks_its_arguments():
    with pytest.raises(ValueError, match=r"labels has shape \[2, 5\], but input_ids has shape \[2, 60\]"):
        build("dala").update_router(IDS, IDS[:, :5])
    with pytest.raises(ValueError, match="labels has dtype torch.float32; it must be boolean or integer"):
        build("dala").update_router(IDS, IDS.float())
    with pytest.raises(ValueError, match="labels holds 11, but vocab_size=11; it must lie between 0 and 10"):
        build("dala").update_router(IDS, IDS.clamp(min=11))
    with pytest.raises(ValueError, match="use_adaptive_router=True"):
        build("dala", use_adaptive_router=False).update_router(IDS, IDS)
