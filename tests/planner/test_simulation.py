"""Orders of passes against torch's own schedules, and simulated steps against closed forms."""

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from danon_lightning.planner.simulation import Route, in_flight, simulate
from danon_lightning.strategies.pipeline.orders import Begin, Compute, Finish, Transfer, _pretended, passes, rank_orders
from danon_lightning.strategies.pipeline.schedules import resolve_schedule

SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv"]


def equal(_):
    return 1.0


def simulated(name, ranks, micro_batches, route=None, seconds=equal, stages_per_rank=None):
    orders = rank_orders(resolve_schedule(name, ranks, stages_per_rank), micro_batches)
    return simulate(orders, seconds) if route is None else simulate(orders, seconds, route)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("ranks, micro_batches", [(2, 2), (2, 8), (4, 4), (4, 16), (8, 9)])
def test_idle_share_of_equal_passes(name, ranks, micro_batches):
    found = simulated(name, ranks, micro_batches)
    assert found.bubble == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))
    assert found.seconds == 2 * (micro_batches + ranks - 1)
    assert found.busy == (2 * micro_batches,) * ranks


@pytest.mark.parametrize("ranks, stages_per_rank, micro_batches", [(2, 2, 4), (4, 2, 8), (4, 3, 12)])
def test_interleaving_divides_the_idle_time(ranks, stages_per_rank, micro_batches):
    """Narayanan et al. 2021: (P − 1) / V of the passes of a whole rank, which are V of these."""
    found = simulated("interleaved_1f1b", ranks, micro_batches, stages_per_rank=stages_per_rank)
    idle = 2 * (ranks - 1)
    assert found.seconds == 2 * stages_per_rank * micro_batches + idle
    assert found.bubble == pytest.approx(idle / (2 * stages_per_rank * micro_batches + idle))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks, micro_batches", [(2, 1), (2, 3), (2, 8), (4, 8)])
def test_every_pass_happens_once(name, ranks, micro_batches):
    schedule = resolve_schedule(name, ranks)
    done = [one for order in rank_orders(schedule, micro_batches) for one in passes(order)]
    assert len(done) == len(set(done))
    for kind in ("forward", "backward"):
        expected = {(stage, index) for stage in range(schedule.stages) for index in range(micro_batches)}
        assert {(one.stage, one.micro_batch) for one in done if one.kind == kind} == expected


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_the_order_is_that_of_torch(name):
    schedule = resolve_schedule(name, 4)
    cls = torch_schedules.get_schedule_class(schedule.order(8))
    planned = cls(_pretended(0, schedule), 8, loss_fn=None)._get_pipeline_order()
    kinds = {"F": "forward", "B": "backward"}
    for rank, order in enumerate(rank_orders(schedule, 8)[:3]):  # that of the last one leaves a micro-batch out
        theirs = [
            Compute(kinds[one.computation_type.value], one.stage_index, one.microbatch_index)
            for one in planned[rank]
            if one is not None and one.computation_type.value in kinds
        ]
        assert passes(order) == theirs


def test_transfers_cost_latency_and_take_turns_on_a_wire():
    """One way of a pipeline of two, no backward passes: three micro-batches that take longer to send than to make."""
    transfers = [Transfer("activation", 0, index) for index in range(3)]
    sender = [action for index, one in enumerate(transfers) for action in (Compute("forward", 0, index), Begin(one))]
    receiver = [Begin(one) for one in transfers]
    receiver += [a for index, one in enumerate(transfers) for a in (Finish(one), Compute("forward", 1, index))]
    found = simulate([sender, receiver], equal, lambda _: Route("wire", 0.5, 4.0))
    assert found.ends == (3.0, 1 + 3 * 4 + 0.5 + 1)


def test_a_receiver_that_is_busy_holds_the_sender_up():
    """1f1b waits for what it sends, and what it receives is asked for late: nothing hides behind passes."""
    free, slow = simulated("1f1b", 2, 4), simulated("1f1b", 2, 4, lambda one: Route(one.kind, 0.0, 1.0))
    # Once in the beginning, once in the end, and for each micro-batch but one in between, both ways at once.
    assert slow.seconds == free.seconds + 2 + 3
    hidden = simulated("interleaved_1f1b", 2, 4, lambda one: Route((one.kind, one.source), 0.0, 0.1))
    assert hidden.seconds - simulated("interleaved_1f1b", 2, 4).seconds < 1.0


def test_an_impossible_order_is_refused():
    transfer = Transfer("activation", 0, 0)
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([[Begin(transfer), Finish(transfer)], []], equal)


def test_micro_batches_in_flight():
    def most(name, rank, micro_batches=8, ranks=4):
        schedule = resolve_schedule(name, ranks)
        order = rank_orders(schedule, micro_batches)[rank]
        return in_flight(order, lambda _: 1.0, splits_backward=schedule.splits_backward)

    assert [most("1f1b", rank) for rank in range(4)] == [4, 3, 2, 1]
    assert [most("gpipe", rank) for rank in range(4)] == [8] * 4
    assert most("looped_bfs", 0) == 16
    assert 4 < most("interleaved_1f1b", 0) < 16
    assert most("zbv", 0) <= 8
