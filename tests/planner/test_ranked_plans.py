"""Layouts, predictions on given profiles, and how a plan is trained with."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

sys.path.insert(0, str(Path(__file__).parent))
from planned_models import LAYERS, Single, Stack, batch

from danon_lightning.planner import Cluster, Layout, measure, nearest_feasible, plan, plan_profile
from danon_lightning.planner.cluster import read_bytes, read_rate
from danon_lightning.planner.layouts import enumerate_layouts
from danon_lightning.planner.memory import communication_bytes, shard_numel
from danon_lightning.planner.prediction import Predictor, format_bytes, group_links
from danon_lightning.planner.profile import Affine, Part
from danon_lightning.planner.report import plans_json
from danon_lightning.strategies import DanonHybridStrategy, PipelinedStrategy
from danon_lightning.strategies.communication.cost_model import CodingCosts, Levels, Link, Links

FREE = Links(2, 2, Link(0.0, 1e15), Link(0.0, 1e15))
PART = Part(Affine(0, 1.0), Affine(0, 2.0), Affine(0, 100.0), Affine(0, 100.0), Affine(0, 150.0), Affine(0, 40.0),
            Affine(0, 40.0), is_block=True)  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    return measure(Stack(), batch(), (4, 16), runs=1)


@pytest.fixture
def profile(measured):
    """Known costs: each block takes a second a sample forward and two backward, and keeps 100 bytes."""
    nothing = Part(*[Affine()] * 5)
    optimizer = replace(measured.optimizer, seconds_per_element=0.0, temporary_bytes_per_element=0.0)
    parts = (nothing, *[PART] * LAYERS, nothing)
    return replace(measured, parts=parts, optimizer=optimizer, stage_seconds=0.0, count_seconds=0.0)


def predicted(profile, layout, links=FREE, batch_size=16, memory=None, speed=1.0):
    return Predictor(profile, Cluster(links, memory, speed), batch_size, costs=CodingCosts()).predict(layout)


# ---- layouts


def test_numbers_divide():
    layouts = list(enumerate_layouts(2, 2, 16, LAYERS))
    assert layouts and len(set(layouts)) == len(layouts)
    for layout in layouts:
        assert layout.data * layout.pipeline == 4
        assert 16 % (layout.data * layout.micro_batches) == 0
        assert layout.resolved().stages <= LAYERS
        layout.mesh(2, 2)
    assert {layout.pipeline for layout in layouts} == {1, 2, 4}
    assert {layout.across_nodes for layout in layouts if layout.pipeline == 2} == {False, True}
    assert not any(layout.across_nodes for layout in layouts if layout.pipeline == 4)


def test_what_does_not_divide_is_left_out():
    assert {layout.data for layout in enumerate_layouts(1, 4, 6, LAYERS)} == {1, 2}
    assert {layout.pipeline for layout in enumerate_layouts(1, 4, 8, 0)} == {1}
    assert {layout.pipeline for layout in enumerate_layouts(1, 8, 8, LAYERS)} == {1, 2, 4}
    # Three ranks to a node: pipelines of two would lie across some nodes and not others.
    assert {layout.pipeline for layout in enumerate_layouts(2, 3, 6, 8)} <= {1, 2, 3, 6}
    assert not list(enumerate_layouts(1, 4, 3, 0))


def test_zero_bubble_schedules_go_without_checkpointing():
    layouts = list(enumerate_layouts(1, 2, 8, LAYERS, schedules=["zbv", "interleaved_zero_bubble"]))
    assert {layout.schedule for layout in layouts} == {None, "zbv", "interleaved_zero_bubble"}
    assert not any(layout.checkpointing for layout in layouts)


# ---- time


def test_replicas_share_the_work(profile):
    assert predicted(profile, Layout(4)).step_seconds == pytest.approx(LAYERS * 3 * 4, rel=1e-6)
    assert predicted(profile, Layout(4), speed=2).step_seconds == pytest.approx(LAYERS * 3 * 2, rel=1e-6)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_pipeline_has_its_bubble(profile, schedule):
    plan = predicted(profile, Layout(1, 4, 8, schedule))
    assert plan.bubble == pytest.approx(3 / 11)
    assert plan.step_seconds == pytest.approx((8 + 3) * 3 * 2, rel=1e-6)
    assert plan.stage_cut == (1, 2, 3)


def test_checkpointing_runs_blocks_twice_and_keeps_what_enters(profile):
    plain, twice = (predicted(profile, Layout(1, 4, 8, "1f1b", checkpointing=on)) for on in (False, True))
    assert twice.step_seconds == pytest.approx(plain.step_seconds * 4 / 3, rel=1e-6)
    # Micro-batches of two samples; the first stage has four of them under way.
    assert plain.memory.activations == 3 * 200 + 300
    assert twice.memory.activations == 3 * 80 + 300


def test_exchange_is_hidden_behind_backward_without_stages_only(profile):
    slow = Links(2, 2, Link(0.0, 1e12), Link(0.0, 1000.0))
    ddp, staged = predicted(profile, Layout(4), slow), predicted(profile, Layout(2, 2, 4, "1f1b"), slow)
    total = sum(parameter.nbytes for _, parameter in profile.parameters())
    # Two nodes: everything once out of each, in two halves. All in one bucket, ready at the end.
    assert ddp.exchange_seconds == pytest.approx(total / 1000, rel=0.05)
    assert ddp.leaving_bytes == pytest.approx(total, rel=0.05)
    # Each stage half of it, while the other one does the same.
    assert staged.leaving_bytes == pytest.approx(total, rel=0.05)
    assert staged.exchange_seconds == pytest.approx(total / 1000, rel=0.3)
    across = predicted(profile, Layout(2, 2, 4, "1f1b", across_nodes=True), slow)
    assert across.leaving_bytes == 2 * 8 * 40 < staged.leaving_bytes


def test_replicas_of_several_stages_share_the_link():
    links = Links(2, 2, Link(0.0, 8.0), Link(1.0, 4.0))
    inside, across = (Layout(2, 2, 4, "1f1b", across_nodes=on).mesh(2, 2) for on in (False, True))
    assert group_links(inside, links) == Links(2, 1, None, Link(1.0, 2.0))
    assert group_links(across, links) == Links(1, 2, Link(0.0, 8.0), None)
    assert group_links(Layout(4).mesh(2, 2), links) == links


# ---- memory


def test_memory_is_that_of_counted_tensors(measured):
    plan = predicted(measured, Layout(4))
    module = Stack()
    total = sum(parameter.nbytes for parameter in module.parameters())
    assert plan.memory.parameters == plan.memory.gradients == total
    assert plan.memory.optimizer == pytest.approx(2 * total, rel=0.02)
    shared = predicted(measured, Layout(4, sharding=True))
    assert total / 2 <= shared.memory.optimizer < 0.9 * total
    # What one pass of the whole module keeps, and a little more.
    kept = sum(part.kept(4) for part in measured.parts)
    assert kept <= plan.memory.activations < kept + total
    assert plan.memory.communication == 0


def test_memory_of_what_compression_remembers(measured):
    parameters = [("weight", torch.empty(1000, 1000, device="meta"))]
    levels = Levels(inner=2, outer=2, nodes=2)
    assert communication_bytes(parameters, Layout(4), levels) == 0
    residuals = communication_bytes(parameters, Layout(4, compression="topk"), levels)
    assert residuals == 2 * 4e6 / 2


def test_shards_are_those_of_the_optimizer():
    parameters = [(str(size), torch.empty(size)) for size in (5, 3, 2, 2)]
    assert shard_numel(parameters, 2) == 7 and shard_numel(parameters, 1) == 12


# ---- plans


def test_infeasible_plans_have_a_reason_and_a_neighbour(profile):
    everything = plan_profile(profile, Cluster(FREE), 16, compressions=[None])
    limit = sorted(one.memory.total for one in everything)[len(everything) // 2]
    plans = plan_profile(profile, Cluster(FREE, limit), 16, compressions=[None])
    refused = [one for one in plans if not one.is_feasible]
    assert refused and plans[0].is_feasible and plans == sorted(plans, key=lambda one: not one.is_feasible)
    for one in refused:
        assert f"{format_bytes(limit)} are there" in one.reason
        nearest = nearest_feasible(one, plans)
        assert nearest.is_feasible and 1 <= nearest.layout.distance(one.layout) <= 5
        with pytest.raises(ValueError, match="cannot be had"):
            one.strategy()
    times = [one.step_seconds for one in plans if one.is_feasible]
    assert times == sorted(times)


def test_compression_that_the_optimizer_does_not_bear_is_refused(profile):
    plans = plan_profile(profile, Cluster(FREE), 16, compressions=["sign"], sharding=[False])
    refused = [one for one in plans if one.layout.compression == "sign"]
    assert refused and all("cannot be used with Adam" in one.reason for one in refused)


def test_a_step_that_cannot_be_cut_has_its_obstacle_for_a_reason(profile):
    parts = list(profile.parts)
    parts[3] = replace(parts[3], obstacle="a long skip")
    one = predicted(replace(profile, parts=tuple(parts)), Layout(2, 2, 4, "1f1b"))
    assert one.stage_cut == (2,) and one.reason == "the step cannot be cut before block 2: a long skip"


def test_plans_become_strategies_and_configs(profile):
    plans = plan_profile(profile, Cluster(FREE), 16)
    chosen = {(one.layout.pipeline > 1, one.layout.compression, one.layout.sharding): one for one in plans}
    assert len(chosen) == 12
    for one in chosen.values():
        strategy = one.strategy()
        assert isinstance(strategy, DanonHybridStrategy)
        assert isinstance(strategy, PipelinedStrategy) == (one.layout.pipeline > 1)
    with initialize_config_module("danon_lightning.configs", version_base="1.3"):
        for one in chosen.values():
            config = compose("train", one.overrides())
            assert config.trainer.devices == config.trainer.num_nodes == 2
            composed = instantiate(config.strategy)
            assert type(composed) is type(one.strategy())
            assert composed._num_microbatches == one.strategy()._num_microbatches
            assert list(composed._stage_cut) == list(one.strategy()._stage_cut)
            assert config.strategy.compression == one.layout.compression


def test_json_holds_everything(profile):
    cluster = Cluster.of(2, 2, inter="1gbit", memory="10KiB", speed=2)
    plans = plan_profile(profile, cluster, 16)
    content = json.loads(json.dumps(plans_json(plans, profile, cluster, 16)))
    assert content["schema"] == "danon-plan" and len(content["plans"]) == len(plans)
    assert content["plans"][0]["strategy"]["_target_"].endswith("DanonHybridStrategy")
    assert Links.from_json(content["cluster"]["links"]) == cluster.links
    assert any("not measured" in line for line in content["assumptions"])


def test_the_whole_way_for_a_module_without_layers():
    plans = plan(Single(), batch(8), Cluster.of(1, 2), compressions=[None])
    assert [one.layout.pipeline for one in plans] == [1, 1]
    with pytest.raises(ValueError, match="cannot be shared out among 3 ranks"):
        plan(Single(), batch(8), Cluster.of(1, 3))


def test_the_example_of_the_docs_runs():
    page = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()
    names = {"module": Stack(), "batch": batch(64), "Trainer": dict}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["plans"][0].is_feasible and isinstance(names["trainer"]["strategy"], DanonHybridStrategy)


# ---- clusters


def test_rates_and_sizes():
    assert read_rate("1gbit") == read_rate("1 Gbit/s") == read_rate("1000mbit") == read_rate(1e9) == 1e9
    assert read_bytes("16GiB") == 16 * 2**30 and read_bytes("1.5 MB") == 1.5e6
    for wrong in ("fast", "-1gbit", "0gbit", "1gib"):
        with pytest.raises(ValueError, match="is not a rate"):
            read_rate(wrong)
    with pytest.raises(ValueError, match="an amount of memory"):
        read_bytes("1gbit")


def test_bad_clusters_are_refused():
    with pytest.raises(ValueError, match="inter=None"):
        Cluster.of(2, 2)
    with pytest.raises(ValueError, match="speed=0"):
        Cluster.of(1, 2, speed=0)
    with pytest.raises(ValueError, match="memory_bytes=-1"):
        Cluster(FREE, -1)
    with pytest.raises(ValueError, match="batch_size=0"):
        plan_profile(None, Cluster(FREE), 0)
