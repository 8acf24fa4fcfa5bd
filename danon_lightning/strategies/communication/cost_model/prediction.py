"""How long an exchange takes: the communicator's own schedule, played through on links that are given by numbers.

The ranks of one node stand for all. The thread of each works on several messages in turns while others are on the wire;
messages, their order, and where a thread waits are those of the communicator and its collectives. So what overlaps
there overlaps here, and what cannot, the first message's coding and the last one's transfer, does not.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from danon_lightning.strategies.communication.collectives.exchange import IN_FLIGHT
from danon_lightning.strategies.communication.compressors import Compressor, LinearCompressor, get_compressor
from danon_lightning.strategies.communication.cost_model.coding import NO_COSTS, CodingCosts
from danon_lightning.strategies.communication.cost_model.links import Link, Links
from danon_lightning.strategies.communication.cost_model.traffic import (
    STEADY_STEP,
    Levels,
    MessageTraffic,
    Parameters,
    Phase,
    exchange_traffic,
)


@dataclass(frozen=True)
class Prediction:
    """What an exchange costs.

    Attributes:
        seconds: From the first bucket's being ready to the last mean.
        inter_node_bytes: Bytes that leave the node that sends most.
        intra_node_bytes: Bytes that the ranks of that node hand one another.
        coding_seconds: Of these, what the busiest rank computes, copies and sends, hidden behind transfers or not.
        steps: Transfers that follow one another, each with a latency of its own.
        exposed_seconds: From the last bucket's being ready to the last mean: what a step becomes longer by.
    """

    seconds: float
    inter_node_bytes: float
    intra_node_bytes: float
    coding_seconds: float
    steps: int
    exposed_seconds: float = 0.0


def predict_exchange(
    buckets: Sequence[Parameters],
    links: Links,
    *,
    compression: "str | Compressor | LinearCompressor | None" = None,
    hierarchical: bool | Literal["auto"] = "auto",
    costs: CodingCosts = NO_COSTS,
    ready: Sequence[float] | None = None,
    step: int = STEADY_STEP,
    device: torch.device | str = "cpu",
    traffic: Sequence[Sequence[MessageTraffic]] | None = None,
) -> Prediction:
    """What one exchange of gradients by :class:`GradientCommunicator` takes.

    Args:
        buckets: Names and parameters in the order in which their gradients are exchanged; see :func:`ddp_buckets`. On
            the meta device they take no memory.
        links: The cluster.
        compression: As for the communicator.
        hierarchical: As for the communicator.
        costs: What coding and copying take (see :func:`coding_costs`); by default nothing, for the wire alone.
        ready: When each bucket is ready, in seconds, rising; by default all at 0. The backward pass takes place beside
            the exchange, and is taken not to slow it down.
        step: Number of the exchange, which matters during a compressor's warm-up.
        device: Kind of device that gradients lie on: it decides how long messages are.
        traffic: What :func:`exchange_traffic` has made of all these, if that is known already: for large models it
            takes most of the time.

    Raises:
        ValueError: For an unknown compression, ``hierarchical=True`` on links of one level, or ``ready`` of another
            length than ``buckets``.
    """
    compressor = get_compressor(compression)
    if ready is not None and len(ready) != len(buckets):
        raise ValueError(f"ready has {len(ready)} times, but there are {len(buckets)} buckets")
    levels = Levels.of(links.nodes, links.ranks_per_node, hierarchical=hierarchical, compressed=compressor is not None)
    messages = traffic
    if messages is None:
        messages = exchange_traffic(buckets, levels, compressor, step=step, device=device)
    times = list(ready) if ready is not None else [0.0] * len(buckets)
    clock = _Clock(links, levels)
    in_flight: deque[Generator[None, None, None]] = deque()

    def advance() -> None:
        for transfer in tuple(in_flight):
            if next(transfer, _ENDED) is _ENDED:
                in_flight.remove(transfer)

    for bucket, time in zip(messages, times, strict=True):
        clock.wait(time)
        for message in bucket:
            in_flight.append(_average(message, clock, levels, costs))
            advance()
    while in_flight:
        advance()
    if compressor is not None:
        clock.agree()
    leaving, inside = _bytes_of_nodes([message for bucket in messages for message in bucket], levels)
    busiest = max(range(links.nodes), key=lambda node: (leaving[node], inside[node]))
    return Prediction(
        seconds=max(clock.now) - (times[0] if times else 0.0),
        inter_node_bytes=leaving[busiest],
        intra_node_bytes=inside[busiest],
        coding_seconds=max(clock.worked),
        steps=clock.steps,
        exposed_seconds=max(clock.now) - (times[-1] if times else 0.0),
    )


_ENDED = object()


class _Clock:
    """Where the threads of a node's ranks are, and until when its wires are taken."""

    def __init__(self, links: Links, levels: Levels) -> None:
        self._links, self._levels = links, levels
        self.now, self.worked = [0.0] * levels.inner, [0.0] * levels.inner
        self.steps = 0
        self._free = {"inter": 0.0, "intra": 0.0}

    def work(self, seconds: Sequence[float]) -> None:
        """Each rank computes, copies or sends for so long."""
        self.now = [now + more for now, more in zip(self.now, seconds, strict=True)]
        self.worked = [worked + more for worked, more in zip(self.worked, seconds, strict=True)]

    def wait(self, until: float) -> None:
        self.now = [max(now, until) for now in self.now]

    def send(self, phase: Phase) -> float:
        """Post a transfer between outer ranks; returns when it has arrived."""
        self.steps += 1
        arrivals = []
        for wire, link, sizes in (
            ("inter", self._links.inter, max(phase.leaving, key=_total)),
            ("intra", self._links.intra, max(phase.inside, key=_total)),
        ):
            if link is not None and any(sizes):
                # With one level several ranks of a node are one here.
                threads = self._levels.outer_per_node
                per_transfer, per_byte = link.overhead_seconds, link.overhead_seconds_per_byte / threads
                self.work([(per_transfer * phase.transfers + per_byte * size) * (size > 0) for size in sizes])
                posted = max(now for now, size in zip(self.now, sizes, strict=True) if size)
                arrivals.append(self._occupy(wire, link, sum(sizes), posted))
        return max(arrivals, default=0.0)

    def hand_over(self, num_bytes: int, *, copied: bool) -> float:
        """Hand bytes to ranks of the same node; returns when they have come.

        Args:
            num_bytes: All of a node together.
            copied: Whether shared memory has to be filled with them. Otherwise they have been computed there.
        """
        link, inner = self._links.intra, self._levels.inner
        if inner == 1 or link is None:
            return 0.0
        self.steps += 1
        self.work([link.overhead_seconds] * inner)
        if not self._links.shared_memory:
            self.work([link.overhead_seconds_per_byte * num_bytes / inner] * inner)
            return self._occupy("intra", link, num_bytes, max(self.now))
        if copied:
            self.work([num_bytes / link.bytes_per_second] * inner)
        return max(self.now) + link.latency_seconds

    def agree(self) -> None:
        """One number of all ranks, reduced: a latency for each doubling."""
        for link, ranks in ((self._links.intra, self._links.ranks_per_node), (self._links.inter, self._links.nodes)):
            if link is not None and ranks > 1:
                rounds = 2 * (ranks - 1).bit_length()
                self.steps += rounds
                self.wait(max(self.now) + rounds * link.latency_seconds)

    def _occupy(self, wire: str, link: Link, num_bytes: int, posted: float) -> float:
        self._free[wire] = max(posted, self._free[wire]) + num_bytes / link.bytes_per_second
        return self._free[wire] + link.latency_seconds


def _average(message: MessageTraffic, clock: _Clock, levels: Levels, costs: CodingCosts) -> Generator[None, None, None]:
    """A message's way, with a ``yield`` wherever its collective has one."""
    inner, outer = levels.inner, levels.outer
    portions = len(message.collected)

    def work(per_element: float, per_region: float = 0.0) -> None:
        """On what each rank sums."""
        pairs = zip(message.rows, message.pieces, strict=True)
        clock.work([per_element * row + per_region * pieces for row, pieces in pairs])

    for num_bytes in message.collected:
        arrival = clock.hand_over(num_bytes, copied=True)
        if inner > 1:
            yield
        clock.wait(arrival)
        if message.way in ("dense", "linear"):
            work(costs.add * inner / portions)
    # What is to be done before the first transfer, after each, and at last with all: for an element, for a region.
    after = [(0.0, 0.0)] * len(message.phases)
    coding, sums = (costs.encode, costs.encode_region), costs.add * (inner - 1)
    decoding = costs.decode, costs.decode_region
    decoding_all = (
        costs.decode + costs.decode_add * (outer - 1), costs.decode_region + costs.decode_add_region * (outer - 1),
    )  # fmt: skip
    if message.way == "dense":
        before, finally_ = (0.0, 0.0), (costs.copy, 0.0)
        after[:1] = [(costs.add, 0.0)] * bool(after)
    elif message.way == "reduce":
        before, finally_ = (coding[0] + sums, coding[1]), decoding
        after[0] = (decoding_all[0] + coding[0]) / outer, (decoding_all[1] + coding[1]) / outer
    elif message.way == "gather":
        before, finally_ = (coding[0] + sums, coding[1]), decoding_all
    else:
        # The rounds, of two transfers each, share the work: two products and an update of the residual, for low rank.
        rounds = len(after) // 2
        before, finally_ = (coding[0] / (rounds + 1), coding[1] / (rounds + 1)), decoding
        after[1::2] = [before] * rounds
    work(*before)
    for phase, then in zip(message.phases, after, strict=True):
        arrival = clock.send(phase)
        for _ in range(IN_FLIGHT if outer > 1 else 0):
            yield
        clock.wait(arrival)
        work(*then)
    arrival = clock.hand_over(message.shared, copied=message.way == "linear")
    if inner > 1:
        yield
    clock.wait(arrival)
    clock.work([finally_[0] * message.numel + finally_[1] * sum(message.pieces)] * inner)


def _total(sizes: tuple[int, ...]) -> int:
    return sum(sizes)


def _bytes_of_nodes(messages: Sequence[MessageTraffic], levels: Levels) -> tuple[list[int], list[int]]:
    """Bytes that leave each node, and bytes that stay in it."""
    leaving, inside = [0] * levels.nodes, [0] * levels.nodes
    for message in messages:
        for node in range(levels.nodes):
            inside[node] += sum(message.collected) + message.shared
            for phase in message.phases:
                leaving[node] += sum(phase.leaving[node])
                inside[node] += sum(phase.inside[node])
    return leaving, inside
