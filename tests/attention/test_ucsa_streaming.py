"""UCSA chunk by chunk against all at once."""

import functools
import io

import pytest
import torch

from danon_lightning.attention import detach_state, map_state
from danon_lightning.attention.functional import compensate_errors, ucsa_attention, ucsa_attention_reference
from danon_lightning.attention.ucsa.cache import add_block, empty_cache, record_selection
from danon_lightning.attention.ucsa.streaming import empty_state, stream_chunk

BATCH, HEADS, GROUPS, WIDTH, LENGTH = 2, 4, 2, 4, 53
SIZES = {"block_size": 4, "num_selected": 2, "window_blocks": 1, "num_sinks": 3, "tree_factor": 2}
CHUNKS = {"1": [1] * 53, "7": [7] * 7 + [4], "all": [53], "mixed": [2, 30, 1, 20]}


def make_qkv(dtype=torch.float64, length=LENGTH):
    torch.manual_seed(0)
    heads = {"q": HEADS, "k": GROUPS, "v": GROUPS}
    return {name: torch.randn(BATCH, count, length, WIDTH).to(dtype).requires_grad_() for name, count in heads.items()}


def start_state(k, settings):
    levels = {name: settings[name] for name in ("block_size", "tree_levels") if name in settings}
    return empty_state(BATCH, GROUPS, WIDTH, **levels, device=k.device, dtype=k.dtype)


def stream(tensors, chunks, mask=None, between=lambda state: state, **settings):
    settings = {**SIZES, **settings}
    state, outputs, start = start_state(tensors["k"], settings), [], 0
    for chunk in chunks:
        here = slice(start, start + chunk)
        output, state = stream_chunk(
            *(tensors[name][:, :, here] for name in "qkv"),
            between(state),
            key_padding_mask=None if mask is None else mask[:, here],
            **settings,
        )
        outputs.append(output)
        start += chunk
    return torch.cat(outputs, dim=2), state


def assert_same(tensors, ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    upstream = torch.randn_like(ours)
    grads = [torch.autograd.grad(x, list(tensors.values()), upstream) for x in (ours, theirs)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tree_levels": 2},
        {"tree_levels": 3, "num_selected": 1},
        {"tree_levels": 2, "tree_factor": 3, "num_sinks": 0, "window_blocks": 0},
        {"num_sinks": 100},
        {"num_sinks": 8, "block_size": 1, "num_selected": 9, "window_blocks": 5},
        {"block_size": 100, "rope_base": None},
        {"num_selected": 0, "tree_levels": 2},
        {
            "tree_levels": 2,
            "error_tolerance": 0.7,
            "selection_bias": functools.partial(compensate_errors, mean=0.7, spread=0.1, threshold=0.5),
        },
        {"max_cache_size": 1000, "tree_levels": 2},
    ],
    ids=str,
)
def test_streaming_equals_parallel(settings, chunks):
    tensors = make_qkv()
    parallel_settings = {name: x for name, x in settings.items() if name != "max_cache_size"}
    for mask in (None, torch.rand(BATCH, LENGTH) < 0.6):
        streamed, state = stream(tensors, chunks, mask, **settings)
        parallel = ucsa_attention(**tensors, **{**SIZES, **parallel_settings}, key_padding_mask=mask)
        assert_same(tensors, streamed, parallel)
        assert state["position"] == LENGTH


@pytest.mark.parametrize("eviction", ["lru", "fifo", "lfu"])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_bounded_cache_equals_a_softmax_without_the_blocks_that_are_gone(levels, eviction):
    tensors = make_qkv()
    blocks = -(-(LENGTH - SIZES["num_sinks"]) // SIZES["block_size"])
    caches: list[dict[str, torch.Tensor]] = []
    for size in (0, 8, 13):
        settings = {"tree_levels": levels, "max_cache_size": size, "eviction": eviction}
        caches.clear()
        streamed, state = stream(tensors, [1] * LENGTH, None, lambda x: caches.append(x["cache"]) or x, **settings)
        gone = torch.ones(BATCH, LENGTH, blocks, dtype=torch.bool)
        for i, cache in enumerate([*caches[1:], state["cache"]]):
            gone[:, i] = gone[:, i].scatter(1, cache["blocks"], False)
        assert (~gone).sum(dim=-1).max() == size // 4 and (~gone).sum(dim=-1).min() == 0
        expected = ucsa_attention_reference(**tensors, **SIZES, tree_levels=levels, unavailable=gone)
        assert_same(tensors, streamed, expected)
        # How the sequence is cut does not matter.
        for chunks in ([7] * 7 + [4], [53]):
            torch.testing.assert_close(stream(tensors, chunks, None, **settings)[0], streamed, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("levels", "factor", "reach", "eviction"),
    [(1, 2, 1, "lru"), (1, 3, 4, "fifo"), (2, 2, 3, "lfu"), (2, 2, 2, "lru"), (3, 2, 1, "lru"), (2, 3, 2, "lru")],
)
def test_beyond_its_reach_a_stream_equals_a_softmax_with_merged_cells(levels, factor, reach, eviction):
    length, tree = 95, {"tree_levels": levels, "tree_factor": factor, "reach": reach}
    tensors, caches = make_qkv(length=length), []
    settings = {"max_cache_size": 24, "eviction": eviction, **tree}
    for mask in (None, torch.rand(BATCH, length) < 0.5):
        caches.clear()
        streamed, state = stream(tensors, [1] * length, mask, lambda x: caches.append(x["cache"]) or x, **settings)
        gone = torch.ones(BATCH, length, 23, dtype=torch.bool)
        for i, cache in enumerate([*caches[1:], state["cache"]]):
            gone[:, i] = gone[:, i].scatter(1, cache["blocks"], False)
        expected, coverage = ucsa_attention_reference(
            **tensors, **{**SIZES, **tree}, key_padding_mask=mask, unavailable=gone, return_coverage=True
        )
        assert_same(tensors, streamed, expected)
        assert len(state["merged"]) == (2 if (levels, factor) == (1, 2) else 1)
        if mask is None:
            # Whatever has been merged: every token that a query may see, once.
            assert torch.equal(coverage, torch.ones_like(coverage).tril())
        # How the sequence is cut does not matter.
        for chunks in ([7] * 13 + [4], [length]):
            torch.testing.assert_close(stream(tensors, chunks, mask, **settings)[0], streamed, rtol=0, atol=1e-10)


def test_with_all_blocks_kept_too_cells_are_merged():
    tensors = make_qkv(length=131)
    tree = {"tree_levels": 2, "reach": 4}
    streamed, state = stream(tensors, [40, 91], **tree)
    assert_same(tensors, streamed, ucsa_attention_reference(**tensors, **{**SIZES, **tree}))
    assert state["cache"]["blocks"].shape[1] == 30


def test_beyond_its_reach_a_state_grows_with_the_logarithm_of_the_length():
    settings = {"max_cache_size": 24, "tree_levels": 2, "reach": 4}
    tensors, sizes = make_qkv(torch.float32, length=2000), []
    state = start_state(tensors["k"], {**SIZES, **settings})
    with torch.no_grad():
        for start in range(0, 2000, 125):
            chunk = [tensors[name][:, :, start : start + 125] for name in "qkv"]
            _, state = stream_chunk(*chunk, state, **{**SIZES, **settings})
            sizes.append([])
            map_state(lambda x, here=sizes[-1]: here.append(x.untyped_storage().nbytes()), state)
    assert all(x["log_mass"].shape[1] <= most for x, most in zip(state["cells"], (12, 6), strict=True))
    assert all(x["log_mass"].shape[1] <= 4 for x in state["merged"]) and 5 <= len(state["merged"]) <= 8
    # Of twice the length, one level more: four cells of a key, a value and a mass each.
    early, late = (max(map(sum, part)) for part in (sizes[4:8], sizes[8:]))
    assert late - early <= 4 * 4 * BATCH * (2 * GROUPS * WIDTH + 1) + 2000


def test_blocks_beyond_the_reach_leave_the_cache_first():
    tokens, real = torch.zeros(1, 1, 1, 2, 4), torch.ones(1, 1, 2, dtype=torch.bool)
    for eviction in ("lru", "fifo", "lfu"):
        cache = empty_cache(1, 1, 2, 4, device=tokens.device, dtype=tokens.dtype)
        for block, first in zip(range(5), (0, 0, 0, 1, 2), strict=True):
            places = {"own_block": block + 2, "first_block": first}
            cache = add_block(cache, tokens, tokens, real, block, **places, capacity=3, eviction=eviction)
            cache = record_selection(cache, torch.tensor([[0, 0, 1]]), block + 2, eviction)
        assert sorted(cache["blocks"][0].tolist()) == [2, 3, 4]


def test_which_block_goes():
    tokens = torch.zeros(1, 1, 1, 2, 4)
    real = torch.ones(1, 1, 2, dtype=torch.bool)
    left = {}
    for eviction in ("lru", "fifo", "lfu"):
        cache = empty_cache(1, 1, 2, 4, device=tokens.device, dtype=tokens.dtype)
        for block in range(5):
            own = block + 2
            places = {"own_block": own, "first_block": 0}
            cache = add_block(cache, tokens + block, tokens, real, block, **places, capacity=3, eviction=eviction)
            if block == 2:
                # Block 0 is selected often but early, block 1 seldom but last.
                cache = record_selection(cache, torch.tensor([[0, 0, 2, 2, 0, -1]]), own, eviction)
                cache = record_selection(cache, torch.tensor([[1]]), own + 1, eviction)
        assert torch.equal(cache["keys"][0, 0, :, 0, 0].long(), cache["blocks"][0])
        left[eviction] = sorted(cache["blocks"][0].tolist())
    # Block 3 came after the selection; then 4 replaces what is oldest, least recent or, like 3, never selected.
    assert left == {"lru": [1, 3, 4], "fifo": [2, 3, 4], "lfu": [0, 2, 4]}


def test_streaming_equals_parallel_in_float32():
    tensors = make_qkv(torch.float32, length=300)
    settings = {"tree_levels": 2, "tree_factor": 4}
    streamed, _ = stream(tensors, [13] * 23 + [1], **settings)
    torch.testing.assert_close(streamed, ucsa_attention(**tensors, **{**SIZES, **settings}), rtol=0, atol=1e-5)


def test_the_state_stays_bounded():
    tensors = make_qkv(length=300)
    sizes = []

    def record(state):
        sizes.append((state["window"]["keys"].shape[2], state["cache"]["keys"].shape[2]))
        for part in (state["sinks"], state["window"], state["cache"], *state["cells"]):
            # A view would keep the whole chunk in memory.
            assert all(x.untyped_storage().nbytes() == x.nbytes for x in part.values() if isinstance(x, torch.Tensor))
        return state

    with torch.no_grad():
        _, state = stream(tensors, [1] * 40 + [50, 3, 200, 7], between=record, max_cache_size=20, tree_levels=2)
        record(state)
    assert max(window for window, _ in sizes) <= 8 and max(blocks for _, blocks in sizes) == 5
    assert [x["log_mass"].shape[1] for x in state["cells"]] == [74, 37] and state["cells"][0]["means"].shape[2] == 0


@pytest.mark.parametrize("max_cache_size", [None, 12])
def test_states_are_values_that_survive_a_file(max_cache_size):
    tensors, settings = make_qkv(), {"max_cache_size": max_cache_size, "tree_levels": 2}

    def leaves(state):
        found = []
        map_state(lambda x: found.append(x) or x, state)
        return found

    def through_a_file(state):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    with torch.no_grad():
        expected, _ = stream(tensors, CHUNKS["7"], **settings)
        ours, _ = stream(tensors, CHUNKS["7"], between=through_a_file, **settings)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
        # No call changed a state that it was given.
        kept = []
        stream(tensors, CHUNKS["7"], between=lambda x: kept.append((x, map_state(torch.clone, x))) or x, **settings)
        for state, copy in kept:
            assert all(torch.equal(x, y) for x, y in zip(leaves(state), leaves(copy), strict=True))
            assert state["position"] == copy["position"]


def test_a_detached_state_cuts_the_graph():
    tensors = make_qkv()
    output, _ = stream(tensors, [30, 23], between=detach_state, tree_levels=2)
    grads = torch.autograd.grad(output[:, :, 30:].sum(), [tensors["k"], tensors["v"]])
    assert all(torch.count_nonzero(grad[:, :, :30]) == 0 for grad in grads)
    assert all(torch.count_nonzero(grad[:, :, 30:]) > 0 for grad in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_cache_size": -1}, "max_cache_size=-1 must be at least 0"),
        ({"eviction": "random"}, "eviction='random' must be one of lru, fifo, lfu"),
        ({"selection_bias": torch.zeros(2, 2, 7)}, "selection_bias is a tensor"),
        ({"block_size": 0}, "block_size=0 must be"),
        ({"reach": 1, "tree_factor": 4}, "reach=1 must be at least tree_factor - 1, 3"),
    ],
)
def test_errors_name_the_argument(change, message):
    tensors = make_qkv(length=5)
    settings = {**SIZES, **change}
    state = start_state(tensors["k"], SIZES)
    with pytest.raises(ValueError, match=message):
        stream_chunk(*tensors.values(), state, **settings)
    with pytest.raises(ValueError, match="k has shape .2, 2, 4, 4., but q has shape .2, 4, 5, 4."):
        stream_chunk(tensors["q"], tensors["k"][:, :, :4], tensors["v"], state, **SIZES)
