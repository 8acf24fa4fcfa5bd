"""Where a pipeline is cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from staged_models import GPT, VOCABULARY, WIDTH

from danon_lightning.strategies.pipeline.balance import Costs, balanced_cuts, cut_table, parameter_costs, suggested_cuts
from danon_lightning.strategies.pipeline.blocks import find_blocks
from danon_lightning.strategies.pipeline.recording import Cuts
from danon_lightning.strategies.pipeline.schedules import resolve_schedule

COST = st.integers(0, 20)


@given(st.lists(COST, min_size=1, max_size=7), COST, COST, st.integers(1, 7))
def test_no_other_cuts_have_a_cheaper_most_expensive_stage(blocks, head, tail, stages):
    if len(blocks) < stages:
        return
    costs = Costs(head, tuple(blocks), tail)

    def worst(cuts):
        return max(costs.of_stage(cuts, stage) for stage in range(stages))

    every = [
        Cuts.checked((0, *inner, len(blocks)), len(blocks))
        for inner in itertools.combinations(range(1, len(blocks)), stages - 1)
    ]
    assert worst(balanced_cuts(costs, stages)) == min(map(worst, every))


def test_equal_blocks_are_shared_out_evenly():
    assert balanced_cuts(Costs(0, (1.0,) * 8, 0), 4).bounds == (0, 2, 4, 6, 8)
    assert balanced_cuts(Costs(2, (1.0,) * 8, 2), 4).bounds == (0, 1, 4, 7, 8)


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="2 blocks cannot be cut into 3 stages"):
        balanced_cuts(Costs(0, (1, 1), 0), 3)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_where_they_are_used(tied):
    model = GPT(tied=tied)
    blocks = find_blocks(model)
    costs = parameter_costs(model, blocks)
    assert len(costs.blocks) == 4
    assert len(set(costs.blocks)) == 1
    outside = sum(p.numel() for p in model.parameters()) - sum(costs.blocks)
    table = VOCABULARY * WIDTH
    assert costs.head + costs.tail == outside + (table if tied else 0)
    assert costs.head >= table
    assert costs.tail >= table


def test_measured_times_suggest_other_cuts():
    costs, cuts = Costs(0, (1.0,) * 8, 0), Cuts.checked((0, 4, 8), 8)
    assert suggested_cuts(costs, cuts, [1.0, 1.1]) is None
    # The last two blocks of a stage seem to take as long as its first two.
    assert suggested_cuts(costs, cuts, [1.0, 3.0]).bounds == (0, 5, 8)
    assert suggested_cuts(costs, cuts, [3.0, 1.0]).bounds == (0, 3, 8)
    # One block is as much as can be taken away.
    assert suggested_cuts(Costs(0, (1.0, 1.0), 0), Cuts.checked((0, 1, 2), 2), [1.0, 9.0]) is None


def test_the_table_says_what_each_stage_has(capsys):
    model = GPT()
    blocks, schedule = find_blocks(model), resolve_schedule("1f1b", 2)
    numels, cuts = parameter_costs(model, blocks), Cuts.checked((0, 2, 4), 4)
    for costs, words in ((None, "number of parameters"), (Costs(1.0, (1.0, 1.0, 0.5, 0.5), 0.0), "measured time")):
        Console(width=120).print(cut_table(model, blocks, schedule, cuts, costs))
        printed = capsys.readouterr().out
        assert "pipeline stages of transformer.h" in printed
        assert "0–1, what comes before" in printed
        assert "2–3, what comes after" in printed
        assert f"{numels.of_stage(cuts, 0):,.0f}" in printed
        assert f"{numels.of_stage(cuts, 1) * 8 / 2**20:,.1f} MiB" in printed  # float32, with gradients
        assert words in " ".join(printed.split())
        assert ("75%" in printed) == (costs is not None)
