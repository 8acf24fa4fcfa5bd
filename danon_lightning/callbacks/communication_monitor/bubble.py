"""How much of a pipeline's step its ranks are idle, and how much the order of passes makes inevitable."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from danon_lightning.callbacks.pipelines import Pass

_COMPUTE = ("forward", "backward", "weights")
# A pass: its kind, its stage, its micro-batch.
_Key = tuple[str, int, int]


@dataclass(frozen=True)
class Bubble:
    """Shares of ranks × time, from the start of the first pass to the end of the last one.

    Attributes:
        measured: Idle, as it was.
        ideal: Idle if passes in the same order took what they take on average, and transfers took nothing. That is
            (P − 1) / (M + P − 1) for 1f1b with P ranks and M micro-batches; less where ranks have several stages, or
            gradients of weights fill the gaps.
    """

    measured: float
    ideal: float


def bubble_of(ranks: Sequence[Sequence[Pass]]) -> Bubble | None:
    """The bubble of a step that was measured; None if nothing was.

    Args:
        ranks: What each rank of a pipeline has done, in the order of time.
    """
    passes = [[one for one in own if one.kind in _COMPUTE] for own in ranks]
    everything = [one for own in passes for one in own]
    if not everything:
        return None
    span = max(one.end for one in everything) - min(one.start for one in everything)
    if span <= 0:
        return None
    busy = sum(one.end - one.start for one in everything)
    return Bubble(max(0.0, 1 - busy / (len(ranks) * span)), _least_idle(passes))


def _least_idle(ranks: Sequence[Sequence[Pass]]) -> float:
    """Let the passes of each rank follow one another as early as those of other ranks allow."""
    everything = [one for own in ranks for one in own]
    lengths = {
        kind: sum(one.end - one.start for one in same) / len(same)
        for kind in _COMPUTE
        if (same := [one for one in everything if one.kind == kind])
    }
    known = {(one.kind, one.stage, one.micro_batch) for one in everything}
    last = max(one.stage for one in everything)
    ended: dict[_Key, float] = {}
    done = [0] * len(ranks)
    free = [0.0] * len(ranks)
    while any(count < len(own) for count, own in zip(done, ranks, strict=True)):
        before = sum(done)
        for rank, own in enumerate(ranks):
            while done[rank] < len(own):
                one = own[done[rank]]
                needed = [key for key in _before(one, last) if key in known]
                if any(key not in ended for key in needed):
                    break
                free[rank] = max([free[rank], *(ended[key] for key in needed)]) + lengths[one.kind]
                ended[one.kind, one.stage, one.micro_batch] = free[rank]
                done[rank] += 1
        if sum(done) == before:
            return math.nan  # not an order that a pipeline can have
    busy = sum(lengths[one.kind] for one in everything)
    return max(0.0, 1 - busy / (len(ranks) * max(free))) if busy else math.nan


def _before(one: Pass, last: int) -> list[_Key]:
    stage, index = one.stage, one.micro_batch
    if one.kind == "forward":
        return [("forward", stage - 1, index)]
    if one.kind == "weights":
        return [("backward", stage, index)]
    return [("forward", stage, index), ("backward", stage + 1, index)] if stage < last else [("forward", stage, index)]
