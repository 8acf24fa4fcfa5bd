"""A step of a pipeline, played through: the passes of each rank in their order, and what goes over links in between."""

import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from danon_lightning.strategies.pipeline.orders import Action, Begin, Compute, Transfer


@dataclass(frozen=True)
class Simulated:
    """How a step has gone.

    Attributes:
        ends: When each rank has done all, in seconds.
        busy: How long each has computed.
    """

    ends: tuple[float, ...]
    busy: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """From the first pass to the last."""
        return max(self.ends, default=0.0)

    @property
    def bubble(self) -> float:
        """The share of ranks × time in which nothing is computed."""
        total = len(self.ends) * self.seconds
        return 0.0 if total <= 0 else max(0.0, 1 - sum(self.busy) / total)


@dataclass(frozen=True)
class Route:
    """How something is transferred.

    Attributes:
        wire: What it occupies, one transfer after another; None for nothing.
        latency: Seconds until the first byte is there.
        occupation: Seconds that the wire is taken for.
        overhead: Seconds that sender and receiver each are kept from computing.
    """

    wire: Hashable = None
    latency: float = 0.0
    occupation: float = 0.0
    overhead: float = 0.0


NO_ROUTE = Route()


def simulate(
    orders: Sequence[Sequence[Action]],
    seconds: Callable[[Compute], float],
    route: Callable[[Transfer], Route] = lambda _: NO_ROUTE,
) -> Simulated:
    """Play a step through.

    A transfer starts once both ranks have begun it, and the wire is free. Of all ranks that can go on, that one does
    whose clock is behind all others'.

    Args:
        orders: What each rank does.
        seconds: What a pass takes.
        route: How something goes from stage to stage.

    Raises:
        ValueError: If ranks wait for each other for ever.
    """
    clocks, busy, done = [0.0] * len(orders), [0.0] * len(orders), [0] * len(orders)
    begun: dict[Transfer, float] = {}
    arrived: dict[Transfer, float] = {}
    free: dict[Hashable, float] = {}
    computed: dict[tuple[str, int, int], float] = {}
    waiting: dict[Transfer, int] = {}
    ready = [(0.0, rank) for rank in range(len(orders))]
    while ready:
        _, rank = heapq.heappop(ready)
        if done[rank] == len(orders[rank]):
            continue
        action = orders[rank][done[rank]]
        if isinstance(action, Compute):
            took = seconds(action)
            clocks[rank] += took
            busy[rank] += took
            computed[action.kind, action.stage, action.micro_batch] = clocks[rank]
        elif isinstance(action, Begin):
            transfer = action.transfer
            way = route(transfer)
            clocks[rank] += way.overhead
            if transfer in begun:
                start = max(begun[transfer], clocks[rank])
                if way.wire is not None:
                    start = max(start, free.get(way.wire, 0.0))
                    free[way.wire] = start + way.occupation
                arrived[transfer] = start + way.occupation + way.latency
                if transfer in waiting:
                    waiter = waiting.pop(transfer)
                    heapq.heappush(ready, (max(clocks[waiter], arrived[transfer]), waiter))
            else:
                begun[transfer] = clocks[rank]
        else:
            transfer = action.transfer
            if transfer not in arrived:
                waiting[transfer] = rank  # whoever begins it last wakes this rank up
                continue
            clocks[rank] = max(clocks[rank], arrived[transfer])
        done[rank] += 1
        heapq.heappush(ready, (clocks[rank], rank))
    if any(count < len(order) for count, order in zip(done, orders, strict=True)):
        raise ValueError("ranks wait for each other for ever: this is no order that a pipeline can have")
    return Simulated(tuple(clocks), tuple(busy))


def in_flight(order: Sequence[Action], kept: Callable[[int], float], *, splits_backward: bool) -> float:
    """The most that a rank keeps for backward passes at any time.

    Args:
        order: What it does.
        kept: What a micro-batch leaves behind in a stage, in bytes, say.
        splits_backward: Whether it is needed until the gradients of weights are computed.
    """
    last = "weights" if splits_backward else "backward"
    # Torch may compute both at once where nothing is gained by waiting.
    split = {(one.stage, one.micro_batch) for one in order if isinstance(one, Compute) and one.kind == "weights"}
    now = most = 0.0
    for one in order:
        if not isinstance(one, Compute):
            continue
        if one.kind == "forward":
            now += kept(one.stage)
            most = max(most, now)
        elif one.kind == last or (one.kind == "backward" and (one.stage, one.micro_batch) not in split):
            now -= kept(one.stage)
    assert math.isclose(now, 0.0, abs_tol=max(1.0, most) * 1e-6), "every forward pass has a backward pass"
    return most
