"""Which rank has which stage, and what is refused."""

import inspect

import pytest
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.pipelining.stage import _PipelineStageBase

from danon_lightning.strategies.pipeline.schedules import resolve_schedule
from danon_lightning.strategies.pipeline.torch_pipelining import ScheduledStage


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "zbv"])
def test_stages_are_dealt_out_as_in_torch(name, ranks):
    schedule = resolve_schedule(name, ranks)
    expected = generate_stage_to_rank_mapping(ranks, schedule.stages, schedule.style)
    assert {stage: schedule.rank_of(stage) for stage in range(schedule.stages)} == expected
    dealt = [schedule.stages_of(rank) for rank in range(ranks)]
    assert sorted(sum(dealt, ())) == list(range(schedule.stages))
    assert all(len(stages) == schedule.stages_per_rank for stages in dealt)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble"])
def test_torch_has_them_all(name):
    for micro_batches in range(1, 10):
        get_schedule_class(resolve_schedule(name, 3).order(micro_batches))


@pytest.mark.parametrize(
    ("name", "stages", "message"),
    [
        ("fifo", None, r"schedule='fifo' must be one of gpipe, 1f1b, "),
        ("1f1b", 2, "schedule='1f1b' has one stage a rank, but stages_per_rank=2: 'interleaved_1f1b' takes several"),
        ("looped_bfs", 1, "schedule='looped_bfs' is for several stages a rank, but stages_per_rank=1"),
        ("zbv", 3, "schedule='zbv' has two stages a rank, but stages_per_rank=3"),
    ],
)
def test_what_cannot_be_is_refused(name, stages, message):
    with pytest.raises(ValueError, match=message):
        resolve_schedule(name, 2, stages)


def test_torch_still_has_the_methods_that_a_stage_overrides():
    own_names = ("__init__", "expect", "_turn_to", "_allocate", "_measuring", "_named")
    for name, own in vars(ScheduledStage).items():
        if inspect.isfunction(own) and name not in own_names:
            assert inspect.isfunction(getattr(_PipelineStageBase, name)), name
