"""Chunk by chunk against all at once."""

import io
import sys
from pathlib import Path

import pytest
import torch

from danon_lightning.attention import AttentionModel, detach_state, map_state
from danon_lightning.attention.msra.module import _warn_out_of_reach

sys.path.insert(0, str(Path(__file__).parent))
from variants import ENDLESS, SETTINGS, VARIANTS, make_config, scramble  # noqa: E402

MORE = {
    "full, learned positions": ("full", {"learned_positions": True, "rope_base": None}),
    "msra, weighted": ("msra", {"feature_fusion": "weighted"}),
    "msra, concat": ("msra", {"feature_fusion": "concat"}),
    "msra, 1 level": ("msra", {"num_levels": 1}),
    "msra, 2 levels": ("msra", {"num_levels": 2}),
    "dala, state in threes": ("dala", {"state_update_frequency": 3}),
    "dala, state alone": ("dala", {"use_sparse_attention": False, "use_adaptive_router": False}),
    "ucsa, flat": ("ucsa", {"num_levels": 1, "error_compensation": 0.5, "error_tolerance": 0.3}),
    "infinite, narrow": ("infinite", {"memory_size": 3, "sliding_window": 8}),
}
CASES = {**{variant: (variant, {}) for variant in VARIANTS}, **MORE}
CONFIGS = {
    name: make_config(variant, **{"num_kv_heads": 2, "max_sequence_length": 96, **settings})
    for name, (variant, settings) in CASES.items()
}
pytestmark = pytest.mark.filterwarnings("ignore:num_levels is fixed")


def make_model(config, dtype=torch.float64) -> AttentionModel:
    torch.manual_seed(0)
    return scramble(AttentionModel(config).to(dtype).eval())


def stream(model, ids, chunks, mask=None):
    state, outputs = model.init_state(ids.shape[0]), []
    masks = [None] * len(chunks) if mask is None else mask.split(chunks, dim=1)
    for chunk, chunk_mask in zip(ids.split(chunks, dim=1), masks, strict=True):
        output = model(chunk, chunk_mask, state=state)
        state = output.state
        outputs.append(output.last_hidden_state)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunks", [[1] * 53, [7] * 7 + [4], [53], [2, 30, 1, 20]], ids=["1", "7", "all", "mixed"])
def test_streaming_equals_parallel(name, chunks):
    model, ids = make_model(CONFIGS[name]), torch.randint(0, 11, (2, 53))
    mask = (torch.rand(2, 53) < 0.7).long()
    with torch.no_grad():
        for attention_mask in (None, mask):
            streamed, state = stream(model, ids, chunks, attention_mask)
            parallel = model(ids, attention_mask).last_hidden_state
            torch.testing.assert_close(streamed, parallel, rtol=0, atol=1e-10)
    assert state["position"] == 53


@pytest.mark.parametrize("name", VARIANTS)
def test_streaming_equals_parallel_in_float32(name):
    model, ids = make_model(CONFIGS[name], torch.float32), torch.randint(0, 11, (2, 90))
    with torch.no_grad():
        streamed, _ = stream(model, ids, [13] * 6 + [12])
        torch.testing.assert_close(streamed, model(ids).last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*VARIANTS, "msra, weighted", "dala, state in threes"])
def test_gradients_flow_through_the_state(name):
    model, ids = make_model(CONFIGS[name]), torch.randint(0, 11, (2, 37))
    losses = (stream(model, ids, [5] * 7 + [2])[0], model(ids).last_hidden_state)
    streamed, parallel = (torch.autograd.grad(loss.sin().sum(), list(model.parameters())) for loss in losses)
    for ours, theirs in zip(streamed, parallel, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_gradient_after_a_detached_state(name):
    model, ids = make_model(CONFIGS[name]), torch.randint(0, 11, (2, 21))
    state = detach_state(model(ids, state=model.init_state(2)).state)
    model(ids[:, :1], state=state).last_hidden_state.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_msra_state_stays_bounded():
    model = make_model(CONFIGS["msra, 2 levels"])
    state = model.init_state(1)
    with torch.no_grad():
        for length in [1] * 40 + [50, 3, 200, 17]:
            state = model(torch.randint(0, 11, (1, length)), state=state).state
            for layer in state["layers"]:
                counts = [keys.shape[2] for keys in layer["core"]["keys"]]
                assert all(count < 2 * model.config.block_size for count in counts), counts
                # A view would keep the whole chunk in memory.
                assert all(x.untyped_storage().nbytes() == x.nbytes for x in layer["core"]["keys"])


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_states_stay_bounded(name):
    model, sizes = make_model(CONFIGS[name]), []
    state = model.init_state(1)
    with torch.no_grad():
        for length in [50, 3, 97] + [1] * 8 + [64, 200, 17]:
            state = model(torch.randint(0, 11, (1, length)), state=state).state
            sizes.append([])
            # A view would keep the whole chunk in memory.
            map_state(lambda x, here=sizes[-1]: here.append(x.untyped_storage().nbytes()), state)
    assert max(map(sum, sizes[3:])) <= 1.2 * sum(sizes[2])
    assert state["position"] == 439


@pytest.mark.parametrize("variant", ["ucsa", "super_hybrid"])
def test_with_a_limited_cache_ucsa_streams_without_end(variant):
    cache = {"max_cache_size": 16}
    given = {"components": "dala+ucsa", "settings": {"dala": SETTINGS["dala"], "ucsa": {**SETTINGS["ucsa"], **cache}}}
    model = make_model(make_config(variant, max_sequence_length=96, **(cache if variant == "ucsa" else given)))
    assert model.streams_without_end
    ids, sizes, state = torch.randint(0, 11, (1, 400)), [], model.init_state(1)
    with torch.no_grad():
        expected, _ = stream(model, ids, [400])
        for start in range(0, 400, 25):
            output = model(ids[:, start : start + 25], state=state)
            state = output.state
            torch.testing.assert_close(output.last_hidden_state, expected[:, start : start + 25], rtol=0, atol=1e-10)
            sizes.append([])
            map_state(lambda x, here=sizes[-1]: here.append(x.untyped_storage().nbytes()), state)
    # The longest sequence has four times 25 tokens; 300 more add levels of a few merged cells.
    assert max(map(sum, sizes)) <= 1.3 * sum(sizes[3])
    unlimited = {**SETTINGS["ucsa"], "max_cache_size": None}
    assert not make_model(make_config("ucsa", **unlimited)).streams_without_end


@pytest.mark.parametrize("name", VARIANTS)
def test_states_are_values(name):
    model, ids = make_model(CONFIGS[name]), torch.randint(0, 11, (2, 30))
    with torch.no_grad():
        state = model(ids, state=model.init_state(2)).state
        copy = map_state(torch.clone, state)
        first = model(ids[:, :5], state=state).last_hidden_state
        second = model(ids[:, :5], state=copy).last_hidden_state
        again = model(ids[:, :5], state=state).last_hidden_state
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_states_survive_a_file(name):
    model, ids = make_model(CONFIGS[name]), torch.randint(0, 11, (2, 30))
    with torch.no_grad():
        state = model(ids, state=model.init_state(2)).state
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        expected = model(ids[:, :7], state=state).last_hidden_state
        torch.testing.assert_close(model(ids[:, :7], state=loaded).last_hidden_state, expected, rtol=0, atol=0)


def test_fixed_levels_stream_without_end_and_auto_does_not():
    _warn_out_of_reach.cache_clear()
    endless, ids = make_model(CONFIGS["msra, 2 levels"]), torch.randint(0, 11, (1, 96))
    with torch.no_grad():
        with pytest.warns(UserWarning, match="more than 16 positions back are out of reach") as warned:
            state = endless(ids, state=endless.init_state(1)).state
            state = endless(ids, state=state).state
        assert len(warned) == 1
        assert state["position"] == 192
        for name in ("full", "msra"):
            model = make_model(CONFIGS[name])
            state = model(ids, state=model.init_state(1)).state
            with pytest.raises(ValueError, match="1 tokens after the 96 that .* more than max_sequence_length=96"):
                model(ids[:, :1], state=state)


@pytest.mark.parametrize(
    ("variant", "fits"), [("full", True), ("dala", True), ("infinite", True), ("msra", False), ("ucsa", False)]
)
def test_states_fit_models_for_longer_sequences_where_nothing_in_them_depends_on_it(variant, fits):
    short, long = (make_model(make_config(variant, max_sequence_length=length)) for length in (48, 96))
    ids = torch.randint(0, 11, (1, 30))
    with torch.no_grad():
        state = short(ids[:, :20], state=short.init_state(1)).state
        if fits:
            rest = long(ids[:, 20:], state=state).last_hidden_state
            torch.testing.assert_close(rest, long(ids).last_hidden_state[:, 20:], rtol=0, atol=1e-10)
        else:
            with pytest.raises(ValueError, match="max_sequence_length: 48 there, 96 here"):
                long(ids[:, 20:], state=state)


@pytest.mark.parametrize(("variant", "change"), [("ucsa", "compression_ratio"), ("super_hybrid", "diversity_weight")])
def test_states_fit_models_that_differ_in_what_streams_do_not_use(variant, change):
    model, other = make_model(make_config(variant)), make_model(make_config(variant, **{change: 0.25}))
    assert model(torch.zeros(1, 3, dtype=torch.int64), state=other.init_state(1)).state["position"] == 3


def test_foreign_states_are_refused():
    model, other = make_model(CONFIGS["msra"]), make_model(CONFIGS["msra, weighted"])
    ids = torch.randint(0, 11, (2, 5))
    with pytest.raises(
        ValueError, match="another configuration .feature_fusion: 'weighted' there, 'adaptive' here.; start"
    ):
        model(ids, state=other.init_state(2))
    with pytest.raises(ValueError, match=r"input_ids has shape \[2, 5\], but state was made for batches of 3"):
        model(ids, state=model.init_state(3))
    with pytest.raises(ValueError, match="state lacks batch_size, layers, position, signature"):
        model(ids, state={})
    with pytest.raises(ValueError, match="causal=False has no streaming form"):
        AttentionModel(make_config("msra", causal=False)).init_state(1)
