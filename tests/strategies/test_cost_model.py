"""The cost model's numbers: closed forms, limits, fits and orders. What ranks count and measure is tested beside it."""

import dataclasses
import itertools
import json
import math
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danon_lightning.strategies import Int8Compressor, TopKCompressor, available_compressors
from danon_lightning.strategies.communication.compressors import get_compressor
from danon_lightning.strategies.communication.cost_model import (
    ALL_REDUCE,
    CodingCosts,
    Levels,
    Link,
    LinkEstimator,
    Links,
    best_all_reduce,
    coding,
    coding_costs,
    ddp_buckets,
    forget_costs,
    predict_exchange,
    ring_order,
    slowest_link,
)
from danon_lightning.strategies.communication.cost_model.textbook import SAFE_ALGORITHM
from danon_lightning.strategies.communication.cost_model.traffic import exchange_traffic

ALPHA, BETA, BYTES = 1e-4, 1e8, 4e6
FREE = Link(0.0, 1e30)


def flat(ranks, link=None):
    """One rank a node: all alike."""
    return Links(ranks, 1, inter=link or Link(ALPHA, BETA))


def two_levels(nodes, local, intra=None, inter=None, **others):
    return Links(nodes, local, intra or Link(1e-6, 1e10), inter or Link(ALPHA, BETA), **others)


def matrices(count=4, side=1024):
    return [[(f"m{i}", torch.empty(side, side, device="meta"))] for i in range(count)]


# --- links


@pytest.mark.parametrize(
    ("latency", "rate"), [(-1e-9, 1), (math.inf, 1), (math.nan, 1), (0, 0), (0, -1), (0, math.inf)]
)
def test_impossible_links_are_refused(latency, rate):
    with pytest.raises(ValueError, match="must be a finite"):
        Link(latency, rate)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"nodes": 0, "ranks_per_node": 1}, "nodes=0"),
        ({"nodes": 2, "ranks_per_node": 1}, "inter=None"),
        ({"nodes": 1, "ranks_per_node": 2}, "intra=None"),
        ({"nodes": 2, "ranks_per_node": 1, "inter": FREE, "pairwise": ((0.0,),)}, "1 rows"),
        ({"nodes": 2, "ranks_per_node": 1, "inter": FREE, "pairwise": ((0.0, 1.0), (0.0, 0.0))}, "node 1 to node 0"),
        ({"nodes": 2, "ranks_per_node": 1, "inter": FREE, "pairwise": ((0.0, 1.0), (0.0,))}, "row 1"),
    ],
)
def test_incomplete_links_are_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        Links(**arguments)


def test_links_survive_a_file(tmp_path):
    links = two_levels(2, 3, shared_memory=True, pairwise=((0.0, 2e8), (1e8, 0.0)))
    file = tmp_path / "links.json"
    file.write_text(json.dumps({**links.to_json(), "environment": {"of": "the command that measured"}}))
    assert Links.read(file) == links
    assert Links.from_json(flat(2).to_json()) == flat(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "else"}, "schema='else'"),
        ({"version": 2}, "version=2"),
        ({"nodes": None}, "damaged"),
        ({"inter": {"latency_seconds": 1}}, "damaged: KeyError 'bytes_per_second'"),
        ({"inter": {"latency_seconds": 0, "bytes_per_second": -1}}, "bytes_per_second=-1"),
    ],
)
def test_other_files_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Links.from_json({**flat(2).to_json(), **change})
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="not an object"):
        Links.read(tmp_path / "list.json")


def test_exchanges_at_the_same_time_share_the_links():
    shared = two_levels(2, 2).shared_by(4)
    assert shared.inter == Link(ALPHA, BETA / 4) and shared.intra == Link(1e-6, 1e10 / 4)
    with pytest.raises(ValueError, match="exchanges=0"):
        shared.shared_by(0)


# --- textbook


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8, 64])
def test_closed_forms_with_all_ranks_alike(ranks):
    """As the papers have them, also among the ranks of one node, of which each has its share of the bandwidth."""
    for links in (flat(ranks), Links(1, ranks, intra=Link(ALPHA, BETA * ranks))):
        times = {name: algorithm(BYTES, links).seconds for name, algorithm in ALL_REDUCE.items()}
        bandwidth_term = 2 * BYTES * (ranks - 1) / ranks / BETA
        assert times["ring"] == pytest.approx(2 * (ranks - 1) * ALPHA + bandwidth_term)
        assert times["pipelined_tree"] == pytest.approx(2 * math.ceil(math.log2(ranks)) * ALPHA + 2 * BYTES / BETA)
        powers = 2 ** int(math.log2(ranks))
        halving = 2 * math.log2(powers) * ALPHA + 2 * BYTES * (powers - 1) / powers / BETA
        rest = 2 * (ALPHA + BYTES / BETA) if powers < ranks else 0.0
        assert times["halving_doubling"] == pytest.approx(halving + rest)


@pytest.mark.parametrize(("nodes", "local"), [(2, 2), (4, 8), (3, 2), (2, 3), (5, 1), (1, 4)])
def test_bytes_that_leave_a_node(nodes, local):
    links, ranks = two_levels(nodes, local), nodes * local
    leaving = {name: algorithm(BYTES, links).inter_node_bytes for name, algorithm in ALL_REDUCE.items()}
    if nodes == 1:
        assert set(leaving.values()) == {0.0}
        return
    assert leaving["ring"] == pytest.approx(2 * BYTES * (ranks - 1) / ranks)
    assert leaving["hierarchical"] == pytest.approx(2 * BYTES * (nodes - 1) / nodes)
    assert min(leaving.values()) == pytest.approx(leaving["hierarchical"])


@settings(max_examples=60, deadline=None)
@given(
    size=st.floats(1, 1e10), nodes=st.integers(1, 9), local=st.integers(1, 9),
    latency=st.floats(0, 1e-2), rate=st.floats(1e5, 1e11),
)  # fmt: skip
def test_worse_links_and_more_bytes_never_take_less_time(size, nodes, local, latency, rate):
    links = two_levels(nodes, local, inter=Link(latency, rate))
    worse = two_levels(nodes, local, inter=Link(latency * 1.5, rate / 1.5))
    for algorithm in ALL_REDUCE.values():
        cost = algorithm(size, links)
        assert 0 <= cost.seconds <= algorithm(size, worse).seconds
        assert cost.seconds <= algorithm(size * 1.5, links).seconds
        assert (cost.seconds > 0) == (links.world_size > 1)


@pytest.mark.parametrize("name", ALL_REDUCE)
def test_limits(name):
    algorithm = ALL_REDUCE[name]
    no_latency = algorithm(BYTES, two_levels(4, 2, intra=FREE, inter=Link(0.0, BETA)))
    assert no_latency.seconds == pytest.approx(no_latency.inter_node_bytes / BETA)
    endless = algorithm(BYTES, two_levels(4, 2, intra=FREE, inter=Link(ALPHA, 1e30)))
    assert endless.seconds == pytest.approx(algorithm(0, two_levels(4, 2, intra=FREE)).seconds)


def test_the_best_algorithm_depends_on_size_and_place():
    # Few bytes: few steps. Many: few bytes. Several ranks on slow nodes: sums of nodes.
    assert best_all_reduce(100, flat(64)) in ("halving_doubling", "hierarchical")
    assert best_all_reduce(100, flat(63)) == "pipelined_tree"
    assert best_all_reduce(1e9, flat(63)) == "ring"
    assert best_all_reduce(1e9, two_levels(3, 4)) == "hierarchical"
    for size in (0, 100, 1e6, 1e9):
        links = two_levels(6, 4)
        assert ALL_REDUCE[best_all_reduce(size, links)](size, links).seconds == min(
            algorithm(size, links).seconds for algorithm in ALL_REDUCE.values()
        )
    with pytest.raises(ValueError, match="num_bytes=-1"):
        best_all_reduce(-1, flat(2))


def test_without_measurements_the_choice_is_safe_and_said():
    with pytest.warns(UserWarning, match="nothing is known about the links: all-reduce by ring"):
        assert best_all_reduce(1e6, None) == SAFE_ALGORITHM == "ring"


# --- prediction


@pytest.mark.parametrize(
    ("name", "bytes_an_element"),
    [
        (None, 8 / 2), ("fp16", 4 / 2), ("int8", 2 * (1 + 4 / 256) / 2), ("int4", (1 + 8 / 64) / 2),
        ("sign", (1 + 32 / 2048) / 4 / 2), ("topk", 8 * 0.01), ("randomk", 8 * 0.01 / 2),
        ("powersgd", 8 * 4 * 2048 / 1024**2 / 2),
    ],
)  # fmt: skip
def test_an_exchange_sends_what_its_formula_says_and_takes_as_long(name, bytes_an_element):
    """Without latency and coding time, and inside nodes for nothing: the wire alone."""
    buckets, elements = matrices(), 4 * 1024**2
    links = two_levels(2, 2, intra=FREE, inter=Link(0.0, BETA), shared_memory=True)
    cost = predict_exchange(buckets, links, compression=name)
    assert cost.inter_node_bytes == pytest.approx(bytes_an_element * elements, rel=2e-3)
    assert cost.seconds == pytest.approx(cost.inter_node_bytes / BETA, rel=0.01)
    assert cost.coding_seconds == pytest.approx(0, abs=1e-9) and cost.exposed_seconds == cost.seconds


@pytest.mark.parametrize("name", [None, *available_compressors()])
def test_longer_coding_slower_links_and_more_steps_never_take_less_time(name):
    buckets = matrices()
    base = predict_exchange(buckets, two_levels(3, 2), compression=name)
    costs = CodingCosts(1e-9, 1e-9, 4e-9, 1e-9, 1e-9)
    with_costs = predict_exchange(buckets, two_levels(3, 2), compression=name, costs=costs)
    assert with_costs.seconds >= base.seconds and with_costs.coding_seconds > base.coding_seconds
    assert with_costs.seconds >= with_costs.coding_seconds
    for inter in (Link(10 * ALPHA, BETA), Link(ALPHA, BETA / 10)):
        slower = predict_exchange(buckets, two_levels(3, 2, inter=inter), compression=name)
        assert slower.seconds > base.seconds
        assert slower.inter_node_bytes == base.inter_node_bytes and slower.steps == base.steps


def test_coding_hides_behind_a_slow_link_and_the_other_way_round():
    buckets, costs = matrices(8), CodingCosts(1e-9, 1e-9, 4e-9, 1e-9, 1e-9)
    slow, fast = (two_levels(2, 2, inter=Link(ALPHA, rate), shared_memory=True) for rate in (1e7, 1e11))
    wire = predict_exchange(buckets, slow, compression="int8")
    both = predict_exchange(buckets, slow, compression="int8", costs=costs)
    assert both.seconds < wire.seconds + both.coding_seconds / 3
    coding = predict_exchange(buckets, fast, compression="int8", costs=costs)
    assert coding.coding_seconds <= coding.seconds < 1.1 * coding.coding_seconds


@pytest.mark.parametrize("name", ["int8", "topk", "powersgd"])
def test_many_small_tensors_cost_more_than_one_of_the_same_size(name):
    """Each region has its price, however small."""
    small = [[(f"m{i}", torch.empty(64, 64, device="meta")) for i in range(256)]]
    costs = CodingCosts(1e-9, 1e-9, 4e-9, 1e-9, 1e-9)
    by_region = dataclasses.replace(costs, encode_region=2e-5, decode_region=1e-5, decode_add_region=1e-5)
    links = two_levels(2, 2, shared_memory=True)
    more = {
        len(bucket): predict_exchange([bucket], links, compression=name, costs=by_region).coding_seconds
        - predict_exchange([bucket], links, compression=name, costs=costs).coding_seconds
        for bucket in (small[0], matrices(1)[0])
    }
    assert more[256] > 256 * 2e-5 / 2  # of what each of two ranks codes
    assert more[256] > 20 * more[1] > 0


def test_what_a_message_moves_may_be_known_already():
    buckets, links = matrices(), two_levels(2, 2)
    traffic = exchange_traffic(buckets, Levels.of(2, 2, compressed=True), get_compressor("int8"))
    assert predict_exchange(buckets, links, compression="int8", traffic=traffic) == predict_exchange(
        buckets, links, compression="int8"
    )


def test_what_is_ready_early_is_hidden():
    buckets, links = matrices(12), two_levels(2, 2)
    at_once = predict_exchange(buckets, links)
    late = predict_exchange(buckets, links, ready=[10.0 * i for i in range(12)])
    assert late.seconds == pytest.approx(110 + late.exposed_seconds)
    assert late.exposed_seconds < at_once.seconds / 2
    with pytest.raises(ValueError, match="ready has 1 times, but there are 12 buckets"):
        predict_exchange(buckets, links, ready=[0.0])


def test_flat_exchanges_send_for_every_rank_of_a_node():
    two, one = (predict_exchange(matrices(), two_levels(2, 2), hierarchical=kind) for kind in (True, False))
    assert one.inter_node_bytes == 2 * two.inter_node_bytes
    with pytest.raises(ValueError, match="hierarchical=True"):
        predict_exchange(matrices(), flat(2), hierarchical=True)


def test_sparse_codes_go_dense_among_many_and_warm_up_sends_more():
    dense = predict_exchange(matrices(), flat(26))
    assert predict_exchange(matrices(), flat(26), compression=TopKCompressor(0.01)).inter_node_bytes == pytest.approx(
        dense.inter_node_bytes
    )
    warm = TopKCompressor(0.01, warmup_steps=10, warmup_density=0.1)
    early, late = (predict_exchange(matrices(), flat(2), compression=warm, step=step) for step in (0, 10))
    assert early.inter_node_bytes == pytest.approx(10 * late.inter_node_bytes, rel=0.01)


def test_small_tensors_and_empty_models():
    small = [[("bias", torch.empty(100, device="meta")), ("norm", torch.empty(33, device="meta"))]]
    dense, coded = (predict_exchange(small, two_levels(2, 2), compression=name) for name in (None, "int8"))
    assert coded.inter_node_bytes == dense.inter_node_bytes > 0
    nothing = predict_exchange([], two_levels(2, 2))
    assert (nothing.seconds, nothing.inter_node_bytes, nothing.steps) == (0, 0, 0)


def test_buckets_are_filled_from_the_end():
    parameters = [(str(i), torch.empty(1 << 18, device="meta")) for i in range(8)]  # 1 MB each
    names = [[name for name, _ in bucket] for bucket in ddp_buckets(parameters, 3 << 20)]
    assert names == [["7"], ["6", "5", "4"], ["3", "2", "1"], ["0"]]
    mixed = [("a", torch.empty(8)), ("b", torch.empty(8, dtype=torch.float16)), ("c", torch.empty(8))]
    assert [[name for name, _ in bucket] for bucket in ddp_buckets(mixed)] == [["c", "a"], ["b"]]


# --- coding


def test_costs_are_measured_once_for_equal_compressors():
    forget_costs()
    first = coding_costs(Int8Compressor(128))
    assert coding_costs(Int8Compressor(128)) is first
    assert coding_costs(Int8Compressor(256)) is not first
    assert all(0 < value < 1e-6 for value in (first.copy, first.add, first.encode, first.decode, first.decode_add))
    assert all(0 <= value < 1e-2 for value in (first.encode_region, first.decode_region, first.decode_add_region))


def test_costs_of_a_region_and_of_its_elements_lie_on_a_line():
    assert coding._line([(100, 3.0), (1100, 13.0)]) == pytest.approx((2.0, 0.01))
    assert coding._line([(100, 3.0), (1100, 2.0)]) == (3.0, 0.0)
    assert coding._line([(100, 0.5), (1100, 10.5)]) == pytest.approx((0.0, 0.01))
    assert coding._line([(1000, 5.0)]) == pytest.approx((0.0, 0.005))


@pytest.mark.parametrize("name", [None, *available_compressors()])
def test_every_compressor_has_costs(name):
    threads = torch.get_num_threads()
    costs = coding_costs(name)
    assert costs.copy > 0 and costs.add > 0 and torch.get_num_threads() == threads
    assert (costs.encode > 0) == (costs.decode > 0) == (name is not None)


# --- running measurements


def observed(estimator, link, count, noise=0.05, outliers=0.0, seed=0):
    draw = random.Random(seed)
    for _ in range(count):
        size = 10 ** draw.uniform(3, 7)
        seconds = link.seconds(size) * draw.lognormvariate(0, noise)
        estimator.observe(size, seconds * (draw.choice([5, 20]) if draw.random() < outliers else 1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_the_fit_finds_the_link_whatever_the_first_guess(outliers, seed):
    true, estimator = Link(2e-3, 1e8), LinkEstimator(Link(1e-5, 1e10))
    observed(estimator, true, 64, outliers=outliers, seed=seed)
    assert estimator.link.latency_seconds == pytest.approx(true.latency_seconds, rel=0.06)
    assert estimator.link.bytes_per_second == pytest.approx(true.bytes_per_second, rel=0.06)


def test_the_fit_follows_a_link_that_changes():
    estimator, after = LinkEstimator(Link(1e-3, 1e8), half_life=8), Link(1e-3, 1e7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no contradiction
        observed(estimator, Link(1e-3, 1e8), 40)
        observed(estimator, after, 40, seed=1)
    assert estimator.link.bytes_per_second == pytest.approx(1e7, rel=0.06)


def test_transfers_of_one_size_leave_the_latency_as_guessed():
    estimator = LinkEstimator(Link(1e-4, 1e9))
    for _ in range(20):
        estimator.observe(1e6, 1e-2)
    assert estimator.link.seconds(1e6) == pytest.approx(1e-2, rel=0.01)
    assert estimator.link.latency_seconds == pytest.approx(1e-4, rel=0.2)


def test_contradictions_are_warned_of_and_nothing_is_said_about_the_link():
    estimator, draw = LinkEstimator(Link(1e-4, 1e8)), random.Random(0)
    with pytest.warns(UserWarning, match="contradict one another.*dense, by ring") as caught:
        for _ in range(80):
            estimator.observe(1e6, draw.choice([1e-2, 2e-1]))
    assert len(caught) == 1 and estimator.link is None
    with pytest.warns(UserWarning, match="nothing is known"):
        assert best_all_reduce(1e6, None if estimator.link is None else flat(2, estimator.link)) == "ring"
    observed(estimator, Link(1e-4, 1e8), 64)  # they agree again
    assert estimator.link.bytes_per_second == pytest.approx(1e8, rel=0.06)


@pytest.mark.parametrize("pair", [(0, 1), (-1, 1), (1, 0), (1, -1), (math.nan, 1), (1, math.nan), (1, math.inf)])
def test_impossible_measurements_count_as_contradictions(pair):
    estimator = LinkEstimator(Link(1e-4, 1e8))
    estimator.observe(*pair)
    assert estimator.link == Link(1e-4, 1e8)
    with pytest.warns(UserWarning, match="contradict"):
        for _ in range(20):
            estimator.observe(*pair)
    assert estimator.link is None


def test_an_estimate_survives_a_checkpoint():
    first, second = LinkEstimator(Link(1e-3, 1e8)), LinkEstimator(Link(1.0, 1.0))
    observed(first, Link(2e-3, 5e7), 30)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.link == first.link
    observed(first, Link(2e-3, 5e7), 5, seed=1)
    observed(second, Link(2e-3, 5e7), 5, seed=1)
    assert second.link == first.link
    with pytest.raises(ValueError, match="half_life=0"):
        LinkEstimator(FREE, half_life=0)


# --- the order of a ring


def bandwidths(nodes, seed, symmetric=False):
    draw = random.Random(seed)
    matrix = [
        [draw.choice([1.0, 2.5, 10.0, 25.0, 100.0]) * draw.uniform(0.9, 1) for _ in range(nodes)] for _ in range(nodes)
    ]
    if symmetric:
        matrix = [[matrix[min(i, j)][max(i, j)] for j in range(nodes)] for i in range(nodes)]
    return matrix


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_ring_is_the_best_of_all(nodes, symmetric):
    for seed in range(5):
        matrix = bandwidths(nodes, seed, symmetric)
        order = ring_order(matrix)
        assert sorted(order) == list(range(nodes)) and order[0] == 0
        best = max(slowest_link((0, *rest), matrix) for rest in itertools.permutations(range(1, nodes)))
        assert slowest_link(order, matrix) == best


def test_among_many_nodes_a_planted_ring_is_found():
    nodes = 16
    for seed in range(3):
        planted = random.Random(seed).sample(range(nodes), nodes)
        matrix = [[1.0] * nodes for _ in range(nodes)]
        for a, b in zip(planted, planted[1:] + planted[:1], strict=True):
            matrix[a][b] = 10.0
        assert slowest_link(ring_order(matrix), matrix) == 10.0


def test_beyond_the_exact_search_it_is_hardly_worse_and_never_worse_than_given():
    """Nine nodes: brute force can still tell."""
    found = []
    for seed in range(8):
        matrix = bandwidths(9, seed)
        mine = slowest_link(ring_order(matrix), matrix)
        best = max(slowest_link((0, *rest), matrix) for rest in itertools.permutations(range(1, 9)))
        assert slowest_link(range(9), matrix) <= mine <= best
        found.append(mine == best)
    assert sum(found) >= 6


def test_impossible_bandwidths_are_refused():
    with pytest.raises(ValueError, match="from node 0 to node 1 is 0"):
        ring_order([[0, 0], [1, 0]])
    with pytest.raises(ValueError, match="row 1"):
        ring_order([[0, 1], [1]])
