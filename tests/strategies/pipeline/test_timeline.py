"""What ranks do between passes is told apart, on one clock."""

import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from lightning_modules import Tied, loader, make_trainer

from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.strategies.pipeline import clocks
from danon_lightning.strategies.pipeline.timeline import Pass, Stopwatch, gather_passes, tell_apart
from danon_lightning.testing import run_distributed

SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv"]
MICRO_BATCHES = 4


# ---- waits are divided at the moment from which data can travel


@pytest.mark.parametrize(
    ("ready", "expected"),
    [
        (13.0, [("waiting", 1.0, 3.0), ("communication", 3.0, 4.0)]),
        (10.5, [("communication", 1.0, 4.0)]),
        (15.0, [("waiting", 1.0, 4.0)]),
    ],
)
@pytest.mark.parametrize(
    ("waits", "stage", "kind", "other"),
    [
        ("receive activation", 2, "forward", 1),
        ("receive gradient", 2, "backward", 3),
        ("send activation", 2, "want activation", 3),
        ("send gradient", 2, "want gradient", 1),
    ],
)
def test_a_wait_is_waiting_first_and_communication_then(waits, stage, kind, other, ready, expected):
    mine = [Pass(stage, waits, 5, 11.0, 14.0), Pass(stage, "weights", 4, 14.0, 16.0)]
    # Other micro-batches, stages and kinds have nothing to do with it.
    others = [(other, kind, 4), (4 - other, kind, 5), (other, "weights", 5)]
    distraction = [Pass(*which, 12.0, 12.0) for which in others]
    theirs = [Pass(0, "forward", 5, 10.0, 10.0), *distraction, Pass(other, kind, 5, 10.5, ready)]
    found = tell_apart([theirs, mine])[1]
    parts = [Pass(stage, part, 5, start, end) for part, start, end in expected]
    assert found == [*parts, Pass(stage, "weights", 4, 4.0, 6.0)]


def test_moments_are_not_shown_nor_waits_for_a_rank_that_has_measured_nothing():
    communication = Pass(1, "communication", 0, 2.0, 3.0)
    mine = [Pass(1, "want activation", 0, 2.0, 2.0), communication, Pass(1, "receive activation", 0, 3.0, 4.0)]
    assert tell_apart([[], mine]) == [[], [Pass(1, "communication", 0, 0.0, 1.0)]]
    assert tell_apart([[], []]) == [[], []]


# ---- clocks


def compare_clocks():
    """With clocks that are hours apart; most answers are on their way for long at first, which questions are not."""
    rank, answers = dist.get_rank(), 0

    def now():
        nonlocal answers
        answers += 1
        moment = time.perf_counter() + 3600.0 * rank
        if rank and answers % 4 and answers < 16:
            time.sleep(0.1)
        return moment

    clocks.now = now
    group, cpu = dist.new_group(), torch.device("cpu")
    offset = clocks.clock_offset(group, cpu)
    start = time.perf_counter()
    dist.barrier()
    own = [Pass(rank, "forward", 0, start + 3600.0 * rank, start + 3600.0 * rank + 1.0)]
    return offset, gather_passes(own, group, cpu)


@pytest.mark.slow
def test_clocks_of_all_ranks_are_set_by_the_first_one():
    results = run_distributed(compare_clocks, 3, timeout=100)
    for rank, (offset, timeline) in enumerate(results):
        assert offset == pytest.approx(3600.0 * rank, abs=0.03)
        assert timeline == results[0][1]
    passes = [one for (one,) in results[0][1]]
    assert min(p.start for p in passes) == 0 and max(p.start for p in passes) < 60
    assert all(p.end - p.start == pytest.approx(1.0) for p in passes)


@pytest.mark.cuda
def test_moments_on_the_device_are_told_on_the_clock_of_the_host():
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    matrix @ matrix  # slow the first time
    stopwatch = Stopwatch(device)
    before = clocks.now()
    with stopwatch.measuring(0, "forward", 0):
        for _ in range(20):
            matrix = matrix @ matrix
    torch.cuda.synchronize()
    after = clocks.now()
    (one,) = stopwatch.passes()
    assert before - 1e-3 < one.start < one.end < after + 1e-3


# ---- nothing that torch's schedules wait for is missed


def measure_schedules():
    found = {}
    for schedule in SCHEDULES:
        strategy = DanonHybridStrategy(
            pipeline_parallel_size=2, num_microbatches=MICRO_BATCHES, schedule=schedule
        )  # fmt: skip
        strategy.measure_pipeline()
        make_trainer(strategy, 2, max_steps=1, max_epochs=-1).fit(Tied(), loader())
        own = strategy._schedule.stages_of(dist.get_rank())
        found[schedule] = own, strategy._schedule.stages, strategy._measured
    return found


@pytest.mark.slow
def test_every_receive_of_every_schedule_is_measured():
    for rank in run_distributed(measure_schedules, 2, timeout=150):
        for schedule, (own, stages, measured) in rank.items():
            expected = Counter()
            for stage in own:
                for micro_batch in range(MICRO_BATCHES):
                    if stage > 0 and stage - 1 not in own:
                        expected[stage, "activation", micro_batch] += 1
                    if stage < stages - 1 and stage + 1 not in own:
                        expected[stage, "gradient", micro_batch] += 1
            for action in ("want", "receive"):
                found = [p for p in measured if p.kind.startswith(action)]
                assert Counter((p.stage, p.kind.split()[1], p.micro_batch) for p in found) == expected, schedule
            # What is sent is waited for as well: in an exchange, or by itself.
            assert any(p.kind.startswith("send") for p in measured), schedule
            # No pass begins before the rank has what it needs.
            arrived = {(p.stage, p.kind.split()[1], p.micro_batch): p.end for p in measured if "receive" in p.kind}
            for p in measured:
                direction = {"forward": "activation", "backward": "gradient"}.get(p.kind)
                assert arrived.get((p.stage, direction, p.micro_batch), 0) <= p.start
