"""What each rank of a pipeline does in a step, in which order: as torch's schedules run it.

Like ``torch_pipelining``, this relies on names that torch does not document; tests hold it to torch's own schedules.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from torch.distributed.pipelining import schedules

from danon_lightning.strategies.pipeline.schedules import Schedule

_COMPUTED = {"F": "forward", "B": "backward", "I": "backward", "W": "weights"}


@dataclass(frozen=True)
class Transfer:
    """What goes from a stage to a neighbouring one.

    Attributes:
        kind: Activations go to the next stage, their gradients back.
        source: The stage that sends.
        micro_batch: Which one.
    """

    kind: Literal["activation", "gradient"]
    source: int
    micro_batch: int

    @property
    def target(self) -> int:
        """The stage that receives."""
        return self.source + (1 if self.kind == "activation" else -1)


@dataclass(frozen=True)
class Compute:
    """A pass of a micro-batch through a stage: ``"forward"``, ``"backward"`` or ``"weights"``."""

    kind: str
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Begin:
    """A rank is ready to send or to receive, and goes on."""

    transfer: Transfer


@dataclass(frozen=True)
class Finish:
    """A rank waits for the end of a transfer that it has begun."""

    transfer: Transfer


Action = Compute | Begin | Finish


def rank_orders(schedule: Schedule, micro_batches: int) -> list[list[Action]]:
    """What each rank does, from the first pass to the last.

    Args:
        schedule: The schedule. With too few micro-batches for it, that of :meth:`Schedule.order`, as in training.
        micro_batches: Those of a step, at least 1.
    """
    order = schedule.order(micro_batches)
    if order == "GPipe":
        return [list(_gpipe(rank, schedule.ranks, micro_batches)) for rank in range(schedule.ranks)]
    if order == "1F1B":
        return [list(_one_forward_one_backward(rank, schedule.ranks, micro_batches)) for rank in range(schedule.ranks)]
    return _several_stages(order, schedule, micro_batches)


def passes(order: list[Action]) -> list[Compute]:
    """The passes of a rank alone."""
    return [action for action in order if isinstance(action, Compute)]


def _gpipe(stage: int, stages: int, micro_batches: int) -> Iterator[Action]:
    """As torch's ``ScheduleGPipe`` does it: what is received is waited for at once, what is sent at the end."""
    for kind, came, goes in (("forward", "activation", "activation"), ("backward", "gradient", "gradient")):
        sent = []
        for index in range(micro_batches):
            for transfer in _received(came, stage, stages, index):
                yield from (Begin(transfer), Finish(transfer))
            yield Compute(kind, stage, index)
            for transfer in _sent(goes, stage, stages, index):
                yield Begin(transfer)
                sent.append(transfer)
        yield from map(Finish, sent)


def _one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> Iterator[Action]:
    """As torch's ``Schedule1F1B`` does it: sending one way and receiving the other are waited for together."""
    warm_up = min(micro_batches, stages - stage)
    pending: list[Transfer] = []

    def together(*transfers: list[Transfer]) -> Iterator[Action]:
        every = [one for some in transfers for one in some]
        yield from map(Begin, every)
        yield from map(Finish, every)

    leaving: list[Transfer] = []
    for index in range(warm_up):
        yield from together(_received("activation", stage, stages, index))
        yield Compute("forward", stage, index)
        yield from map(Finish, pending)
        pending = []
        leaving = _sent("activation", stage, stages, index)
        if index != warm_up - 1:
            yield from map(Begin, leaving)
            pending = leaving
    forward, backward = warm_up, 0
    while True:
        yield from together(leaving, _received("gradient", stage, stages, backward))
        yield Compute("backward", stage, backward)
        returned = _sent("gradient", stage, stages, backward)
        backward += 1
        if forward == micro_batches:
            break
        yield from together(returned, _received("activation", stage, stages, forward))
        yield Compute("forward", stage, forward)
        leaving = _sent("activation", stage, stages, forward)
        forward += 1
    yield from map(Begin, returned)
    pending = returned
    while backward < micro_batches:
        yield from together(_received("gradient", stage, stages, backward))
        yield Compute("backward", stage, backward)
        yield from map(Finish, pending)
        pending = _sent("gradient", stage, stages, backward)
        yield from map(Begin, pending)
        backward += 1
    yield from map(Finish, pending)


def _several_stages(order: str, schedule: Schedule, micro_batches: int) -> list[list[Action]]:
    """Of torch's schedules for several stages a rank, which say themselves what is sent when."""
    of_first = [_pretended(stage, schedule) for stage in schedule.stages_of(0)]
    planned: Any = schedules.get_schedule_class(order)(of_first, micro_batches)
    found = []
    for rank in range(schedule.ranks):
        actions: list[Action] = []
        own, sent = set(schedule.stages_of(rank)), []
        for one in planned.pipeline_order_with_comms[rank]:
            kind, stage, index = one.computation_type.value, one.stage_index, one.microbatch_index
            if kind in ("SEND_F", "SEND_B"):
                transfer = Transfer("activation" if kind == "SEND_F" else "gradient", stage, index)
                actions.append(Begin(transfer))
                sent.append(transfer)
            elif kind == "RECV_F":
                actions.append(Begin(Transfer("activation", stage - 1, index)))
            elif kind == "RECV_B":
                actions.append(Begin(Transfer("gradient", stage + 1, index)))
            elif kind in _COMPUTED:
                if kind != "W":
                    needed = _received("activation" if kind == "F" else "gradient", stage, schedule.stages, index)
                    actions += [Finish(transfer) for transfer in needed if transfer.source not in own]
                actions.append(Compute(_COMPUTED[kind], stage, index))
        found.append([*actions, *map(Finish, sent)])
    return found


def _pretended(stage: int, schedule: Schedule) -> Any:
    """Of a stage, what schedules look at before they run."""
    return SimpleNamespace(
        stage_index=stage,
        num_stages=schedule.stages,
        group_size=schedule.ranks,
        group_rank=0,
        is_first=stage == 0,
        is_last=stage == schedule.stages - 1,
        submod=None,
        has_backward=True,
    )


def _received(kind: Any, stage: int, stages: int, index: int) -> list[Transfer]:
    source = stage - 1 if kind == "activation" else stage + 1
    return [Transfer(kind, source, index)] if 0 <= source < stages else []


def _sent(kind: Any, stage: int, stages: int, index: int) -> list[Transfer]:
    transfer = Transfer(kind, stage, index)
    return [transfer] if 0 <= transfer.target < stages else []
