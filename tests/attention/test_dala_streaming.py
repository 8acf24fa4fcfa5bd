"""DALA's softmax chunk by chunk against all at once."""

import io

import pytest
import torch
import torch.nn.functional as F

from danon_lightning.attention import detach_state, map_state
from danon_lightning.attention.dala.streaming import empty_state, stream_chunk
from danon_lightning.attention.functional import dala_attention

BATCH, HEADS, GROUPS, WIDTH, LENGTH, BLOCK = 2, 4, 2, 4, 53, 4
SIZES = {"block_size": BLOCK, "memory_size": 6}


def make_tensors(dtype=torch.float64, length=LENGTH, block_size=BLOCK):
    torch.manual_seed(0)
    tensors = {
        "q": torch.randn(BATCH, HEADS, length, WIDTH),
        "k": torch.randn(BATCH, GROUPS, length, WIDTH),
        "v": torch.randn(BATCH, GROUPS, length, WIDTH),
        "log_importance": F.logsigmoid(torch.randn(BATCH, length)),
        "distance_decay": torch.rand(HEADS),
        "window_width": 1 + 5 * torch.rand(HEADS, -(-length // block_size)),
        "memory_bias": torch.randn(BATCH, HEADS, length),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}


def stream(tensors, chunks, mask=None, between=lambda state: state, noise=None, **settings):
    settings = {**SIZES, **settings}
    k = tensors["k"]
    state, outputs, start = empty_state(BATCH, GROUPS, WIDTH, device=k.device, dtype=k.dtype), [], 0
    for chunk in chunks:
        here = slice(start, start + chunk)
        blocks = slice(start // settings["block_size"], -(-here.stop // settings["block_size"]))
        output, state = stream_chunk(
            *(tensors[name][:, :, here] for name in "qkv"),
            between(state),
            log_importance=tensors["log_importance"][:, here],
            distance_decay=tensors["distance_decay"],
            window_width=tensors["window_width"][:, blocks],
            memory_bias=tensors["memory_bias"][:, :, here],
            selection_bias=None if noise is None else noise[:, here],
            key_padding_mask=None if mask is None else mask[:, here],
            **settings,
        )
        outputs.append(output)
        start += chunk
    return torch.cat(outputs, dim=2), state


CHUNKS = {"1": [1] * 53, "4": [4] * 13 + [1], "7": [7] * 7 + [4], "all": [53], "mixed": [2, 30, 1, 20]}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"importance_threshold": 0.5},
        {"memory_size": 0},
        {"memory_size": 1000},
        {"block_size": 1},
        {"block_size": 7, "recency": 0.0, "rope_base": None},
        {"block_size": 100},
    ],
    ids=str,
)
def test_streaming_equals_parallel(settings, chunks):
    tensors = make_tensors(block_size=settings.get("block_size", BLOCK))
    for mask in (None, torch.rand(BATCH, LENGTH) < 0.6):
        streamed, state = stream(tensors, chunks, mask, **settings)
        parallel = dala_attention(**tensors, **{**SIZES, **settings}, key_padding_mask=mask)
        torch.testing.assert_close(streamed, parallel, rtol=0, atol=1e-10)
        upstream = torch.randn_like(streamed)
        grads = [
            torch.autograd.grad(x, list(tensors.values()), upstream, allow_unused=True, materialize_grads=True)
            for x in (streamed, parallel)
        ]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        assert state["position"] == LENGTH


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_noise_in_the_selection_is_that_of_the_token(chunks):
    tensors, noise = make_tensors(), torch.randn(BATCH, LENGTH)
    streamed, _ = stream(tensors, chunks, noise=noise)
    parallel = dala_attention(**tensors, **SIZES, selection_bias=noise)
    torch.testing.assert_close(streamed, parallel, rtol=0, atol=1e-10)
    assert (streamed - stream(tensors, chunks)[0]).abs().max() > 1e-3


def test_of_equally_important_tokens_the_same_are_remembered():
    tensors = make_tensors() | {"log_importance": torch.full((BATCH, LENGTH), -0.7, dtype=torch.float64)}
    tensors["log_importance"][:, 10:20] = -0.3
    streamed, _ = stream(tensors, CHUNKS["7"], recency=0.0)
    parallel = dala_attention(**tensors, **SIZES, recency=0.0)
    torch.testing.assert_close(streamed, parallel, rtol=0, atol=1e-10)


def test_streaming_equals_parallel_in_float32():
    tensors = make_tensors(torch.float32, length=300)
    streamed, _ = stream(tensors, [13] * 23 + [1])
    torch.testing.assert_close(streamed, dala_attention(**tensors, **SIZES), rtol=0, atol=1e-5)


def test_the_state_stays_bounded():
    tensors = make_tensors(length=300)
    sizes = []

    def record(state):
        sizes.append((state["keys"].shape[2], state["memory_keys"].shape[2]))
        # A view would keep the whole chunk in memory.
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in state.values() if isinstance(x, torch.Tensor))
        return state

    with torch.no_grad():
        _, state = stream(tensors, [1] * 40 + [50, 3, 200, 7], between=record)
        record(state)
    assert max(sizes) <= (2 * BLOCK, 6) and max(memory for _, memory in sizes) == 6


def test_states_are_values_that_survive_a_file():
    tensors = make_tensors()

    def through_a_file(state):
        copy = map_state(torch.clone, state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert all(torch.equal(copy[name], x) for name, x in loaded.items() if isinstance(x, torch.Tensor))
        return loaded

    with torch.no_grad():
        expected, _ = stream(tensors, CHUNKS["7"])
        torch.testing.assert_close(stream(tensors, CHUNKS["7"], between=through_a_file)[0], expected, rtol=0, atol=0)


def test_a_detached_state_cuts_the_graph():
    tensors = make_tensors()
    output, _ = stream(tensors, [30, 23], between=detach_state)
    grads = torch.autograd.grad(output[:, :, 30:].sum(), [tensors["k"], tensors["v"]])
    assert all(torch.count_nonzero(grad[:, :, :30]) == 0 for grad in grads)


def test_errors_name_the_argument():
    tensors = make_tensors()
    tensors["window_width"] = torch.ones(HEADS, 99)
    with pytest.raises(ValueError, match="window_width has shape .4, 14.*, which is 2 blocks"):
        state = empty_state(BATCH, GROUPS, WIDTH, device=torch.device("cpu"), dtype=torch.float64)
        stream_chunk(
            *(tensors[name][:, :, :5] for name in "qkv"),
            state,
            log_importance=tensors["log_importance"][:, :5],
            distance_decay=tensors["distance_decay"],
            window_width=tensors["window_width"][:, :14],
            **SIZES,
        )
