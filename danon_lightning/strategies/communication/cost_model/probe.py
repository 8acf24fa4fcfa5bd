"""A short measurement of the links at the start of a job, over connections like those that the exchange uses."""

import itertools
import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from danon_lightning.strategies.communication import kernels
from danon_lightning.strategies.communication.cost_model.links import Link, Links
from danon_lightning.strategies.communication.layout import build_levels
from danon_lightning.strategies.communication.levels import LARGEST_MESSAGE_BYTES, Box, GroupLevel, Level
from danon_lightning.strategies.communication.shared_memory import SharedMemoryLevel
from danon_lightning.strategies.communication.stats import CommunicationStats
from danon_lightning.strategies.mesh import Mesh

# Less fits into buffers and token buckets on the way, and seems to travel up to ten times as fast as it does.
MESSAGE_BYTES = 4 << 20
# To many peers a rank sends less each, but as much as this to all of them.
_MOST_MESSAGES = 4
_SMALL_BYTES = 64
_SMALL_WARM_UP, _SMALL_REPEATS = 5, 25
# Of a stream only what follows its first part is timed: that fills buffers and token buckets on the way.
_PARTS = 3
# A stream is repeated, a slow one less often than a fast one: that takes longer than whatever else disturbs it.
_LEAST_REPEATS, _MOST_REPEATS, _ENOUGH_SECONDS = 2, 7, 2.0
# Boxes that are under way at once, as in the exchange.
_IN_FLIGHT = 2
_REASON_BYTES = 256
# Larger than caches, and than a row.
_SOURCE_NUMEL = 8 << 20

T = TypeVar("T")


def probe_links(
    mesh: Mesh,
    *,
    device: torch.device | str = "cpu",
    time_limit: float = 30.0,
    message_bytes: int = MESSAGE_BYTES,
    pairwise: bool = False,
) -> Links | None:
    """Measure latency and bandwidth inside nodes and between them. Collective; takes about a second on fast links.

    All ranks send at the same time, as they do in an exchange, and the slowest counts: every rank returns the same
    numbers. If it fails on any rank all get None, and a warning names the reason; what is safe then is to exchange
    dense, by ring.

    Args:
        mesh: Layout of the ranks; how they share out replicas does not matter. The default process group must be
            initialised.
        device: Where gradients lie: "cpu" measures gloo (and memory, where ranks of a node share it), "cuda" nccl.
        time_limit: Seconds after which an operation that has not ended has failed, and after which measuring every two
            nodes is not begun. (On CUDA torch's own watchdog ends an operation that hangs, and the process.)
        message_bytes: What a rank sends to each peer at a time; less with more than four peers.
        pairwise: Whether to measure the links between any two nodes too, one after another.

    Returns:
        The links; None if they could not be measured, and for a single rank.

    Raises:
        ValueError: If ``time_limit`` or ``message_bytes`` is not positive.
    """
    if not 0 < time_limit < math.inf:
        raise ValueError(f"time_limit={time_limit} must be a number of seconds above 0")
    if message_bytes < 1:
        raise ValueError(f"message_bytes={message_bytes} must be at least 1; less than {MESSAGE_BYTES} over-reads")
    if mesh.world_size == 1:
        return None
    probe = _Probe(Mesh(mesh.num_nodes, mesh.ranks_per_node, mesh.rank), torch.device(device), time_limit)
    # What ranks agree over must not be what has failed on one of them, and must outlast that.
    agreement = probe.group_of_all(3 * time_limit + 30)
    start = time.perf_counter()
    try:
        findings = probe.run(message_bytes, pairwise)
    except Exception as error:  # whatever it is: training goes on without
        text = f"rank {mesh.rank}: {type(error).__name__}: {error}".splitlines()[0]
        findings = _Findings(mesh.num_nodes, failure=text, failed_after=time.perf_counter() - start)
    try:
        links, failure = _agree(findings, mesh, torch.device(device), agreement)
    except Exception as error:  # a rank is gone; whatever comes next will say so
        links, failure = None, f"ranks cannot agree: {type(error).__name__}: {error}"
    if links is None:
        # The groups are left as they are: giving them up would wait for operations that nobody completes.
        if mesh.rank == 0:
            warnings.warn(
                f"the links could not be measured ({failure}): what is safe without is to exchange dense, by ring",
                stacklevel=2,
            )
        return None
    probe.close()
    dist.destroy_process_group(agreement)
    return links


@dataclass
class _Findings:
    """What one rank has measured: seconds, and seconds a byte of a node, so that the slowest rank has the maximum."""

    nodes: int
    failure: str = ""
    failed_after: float = 0.0
    intra: tuple[float, ...] = (
        0.0,
    ) * 4  # latency, for a byte of a node, and of the thread: for a transfer, for a byte
    inter: tuple[float, ...] = (0.0,) * 4
    uses_sockets: bool = False
    pairwise: list[list[float]] = field(default_factory=list)

    def to_tensor(self, device: torch.device) -> Tensor:
        matrix = self.pairwise or [[0.0] * self.nodes for _ in range(self.nodes)]
        numbers = [float(bool(self.failure)), *self.intra, *self.inter, float(self.uses_sockets)]
        return torch.tensor(numbers + [value for row in matrix for value in row], dtype=torch.float64, device=device)


def _agree(findings: _Findings, mesh: Mesh, device: torch.device, group: dist.ProcessGroup) -> tuple[Links | None, str]:
    """The links as the slowest rank has found them, or what has prevented that."""
    agreed = findings.to_tensor(device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
    failed, *numbers = agreed.tolist()
    intra, inter, (sockets, *matrix) = numbers[:4], numbers[4:8], numbers[8:]
    if failed:
        # The first failure is the cause of the others, which have waited in vain.
        text = f"{findings.failed_after:09.3f}{findings.failure}" if findings.failure else ""
        mine = torch.tensor(
            [*text.encode()[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")], dtype=torch.uint8, device=device
        )
        rows = [torch.empty_like(mine) for _ in range(mesh.world_size)]
        dist.all_gather(rows, mine, group=group)
        texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]
        return None, min(text for text in texts if text)[9:]
    size = mesh.num_nodes
    return Links(
        nodes=size,
        ranks_per_node=mesh.ranks_per_node,
        intra=Link(intra[0], 1 / intra[1], *intra[2:]) if intra[1] else None,
        inter=Link(inter[0], 1 / inter[1], *inter[2:]) if inter[1] else None,
        shared_memory=bool(intra[1]) and not sockets,
        pairwise=tuple(tuple(1 / matrix[i * size + j] if i != j else 0.0 for j in range(size)) for i in range(size))
        if any(matrix)
        else None,
    ), ""


class _Probe:
    """The connections of a probe, and how long it may go on."""

    def __init__(self, mesh: Mesh, device: torch.device, time_limit: float) -> None:
        self._mesh, self._device, self._time_limit = mesh, device, time_limit
        self._control: dist.ProcessGroup | None = None
        self._levels: tuple[Level, GroupLevel] | None = None
        self._source, self._taken = torch.empty(0), 0
        self._spent = 0.0

    def group_of_all(self, timeout: float) -> dist.ProcessGroup:
        """A new group of all ranks."""
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        group: dist.ProcessGroup = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout))
        return group

    def run(self, message_bytes: int, pairwise: bool) -> _Findings:
        """Measure everything."""
        mesh, findings = self._mesh, _Findings(self._mesh.num_nodes)
        self._control = self.group_of_all(self._time_limit)
        inner, outer = self._levels = build_levels(
            mesh,
            "auto",
            compressed=False,
            row_bytes=LARGEST_MESSAGE_BYTES,
            device=self._device,
            timeout=timedelta(seconds=self._time_limit),
            stats=CommunicationStats(),
        )
        if inner.size > 1:
            findings.intra = self._measure_level(inner, message_bytes)
            findings.uses_sockets = not isinstance(inner, SharedMemoryLevel)
        if outer.size > 1:
            findings.inter = self._measure_level(outer, message_bytes)
            if pairwise and self._spent < self._time_limit:
                findings.pairwise = self._measure_pairs(outer, message_bytes)
        return findings

    def close(self) -> None:
        """Give up the connections, with nothing under way."""
        for level in self._levels or ():
            level.close()
        if self._control is not None:
            dist.destroy_process_group(self._control)

    def _measure_level(self, level: Level, message_bytes: int) -> tuple[float, ...]:
        """Seconds: of latency; for a byte of a node; and of this thread, for a transfer and for a byte of its own."""
        latency, overhead = self._measure_small(level)
        peers = level.size - 1
        # In whole rows that are about as long as those of the exchange.
        by_peer = math.ceil(message_bytes * min(peers, _MOST_MESSAGES) / peers)
        boxes = math.ceil(by_peer / LARGEST_MESSAGE_BYTES)
        row = math.ceil(by_peer / boxes)
        sent = peers * boxes * row
        if isinstance(level, SharedMemoryLevel):
            filling = self._measure_filling(level, boxes, row) - boxes * overhead
            return latency, max(filling, 1e-12 * sent) / (self._mesh.ranks_per_node * sent), overhead, 0.0
        busy: list[float] = []

        def stream() -> float:
            start = time.thread_time()
            first = self._stream(boxes, lambda: self._start(level, row), self._finish)
            busy.append(time.thread_time() - start)
            return first

        slowest, _ = self._repeat(stream)
        per_byte = slowest / (self._mesh.ranks_per_node * sent)
        if self._device.type == "cuda":  # sending keeps the device busy, not the thread
            return latency, per_byte, 0.0, 0.0
        by_thread = max(0.0, statistics.median(busy) / _PARTS - boxes * overhead) / sent
        return latency, per_byte, overhead, by_thread

    def _measure_small(self, level: Level) -> tuple[float, float]:
        """Median seconds of a short transfer, and for how long of these this thread is busy."""
        seconds, busy = [], []
        for _ in range(_SMALL_WARM_UP + _SMALL_REPEATS):
            start, start_busy = self._now(), time.thread_time()
            self._finish(self._start(level, _SMALL_BYTES))
            busy.append(time.thread_time() - start_busy)
            seconds.append(self._now() - start)
        return statistics.median(seconds[_SMALL_WARM_UP:]), statistics.median(busy[_SMALL_WARM_UP:])

    def _measure_filling(self, level: SharedMemoryLevel, boxes: int, row: int) -> float:
        """Median seconds to fill shared memory: what reading it takes is counted with what is done with it."""
        seconds = []
        for _ in range(1 + _MOST_REPEATS):
            dist.barrier(self._control)
            filling = 0.0
            for _ in range(boxes):
                start = self._now()
                box = self._start(level, row)
                filling += self._now() - start
                self._finish(box)
            seconds.append(filling)
        return statistics.median(seconds[1:])

    def _stream(self, count: int, start: Callable[[], T], finish: Callable[[T], None]) -> float:
        """Do :data:`_PARTS` times ``count`` transfers, two at a time; returns when the first part had ended."""
        under_way = deque(start() for _ in range(_IN_FLIGHT))
        timed_from, posted = 0.0, len(under_way)
        for finished in range(1, _PARTS * count + 1):
            finish(under_way.popleft())
            if finished == count:
                timed_from = self._now()
            if posted < _PARTS * count:
                under_way.append(start())
                posted += 1
        return timed_from

    def _start(self, level: Level, row_bytes: int) -> Box:
        box = level.all_to_all([row_bytes] * level.size)
        for index, row in enumerate(box.outgoing):
            if index != level.index and isinstance(level, SharedMemoryLevel):
                whole = row.numel() // 4 * 4
                kernels.copy(row[:whole].view(torch.float32), self._values(whole // 4))
        box.post()
        return box

    def _finish(self, box: Box) -> None:
        box.wait()
        box.release()

    def _values(self, numel: int) -> Tensor:
        """What to fill shared memory with: each time another part, as gradients are not in the cache either."""
        if not self._source.numel():
            self._source = torch.ones(_SOURCE_NUMEL)
        if self._taken + numel > _SOURCE_NUMEL:
            self._taken = 0
        self._taken += numel
        return self._source[self._taken - numel : self._taken]

    def _measure_pairs(self, outer: GroupLevel, message_bytes: int) -> list[list[float]]:
        """Seconds a byte from node (row) to node (column), of which this rank knows one column."""
        nodes, me = outer.size, outer.index
        matrix = [[0.0] * nodes for _ in range(nodes)]
        boxes = math.ceil(message_bytes / LARGEST_MESSAGE_BYTES)
        row = math.ceil(message_bytes / boxes)
        sent, received = (torch.zeros(_IN_FLIGHT, row, dtype=torch.uint8, device=self._device) for _ in range(2))
        for turn in range(nodes - 1 + nodes % 2):
            peer = _partner(me, turn, nodes)

            stream = partial(self._stream_pairwise, outer, peer, boxes, sent, received)
            _, seconds = self._repeat(stream)
            if peer is not None:
                own = statistics.median(nodes[self._mesh.node] for nodes in seconds)
                matrix[peer][me] = own / (self._mesh.ranks_per_node * boxes * row)
        return matrix

    def _stream_pairwise(
        self, outer: GroupLevel, peer: int | None, boxes: int, sent: Tensor, received: Tensor
    ) -> float:
        if peer is None:
            return self._now()
        rank, slots = outer.ranks[peer], itertools.cycle(range(_IN_FLIGHT))

        def start() -> list[dist.Work]:
            slot = next(slots)
            works: list[dist.Work] = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.irecv, received[slot], rank, outer.group),
                    dist.P2POp(dist.isend, sent[slot], rank, outer.group),
                ]
            )
            return works

        def finish(works: list[dist.Work]) -> None:
            for work in works:
                work.wait()

        return self._stream(boxes, start, finish)

    def _repeat(self, stream: Callable[[], float]) -> tuple[float, list[list[float]]]:
        """Median seconds for one part of a stream, on the slowest node; and by repetition and node.

        All ranks begin at once, and repeat it equally often. ``stream`` returns when its first part had ended.
        """
        by_node: list[list[float]] = []
        ranks = self._mesh.ranks_per_node
        began = self._spent
        while len(by_node) < _LEAST_REPEATS or (len(by_node) < _MOST_REPEATS and self._spent - began < _ENOUGH_SECONDS):
            dist.barrier(self._control)
            start = self._now()
            times = torch.tensor([stream() - start, self._now() - start], dtype=torch.float64, device=self._device)
            rows = [torch.empty_like(times) for _ in range(self._mesh.world_size)]
            dist.all_gather(rows, times, group=self._control)
            first, whole = (column.view(-1, ranks) for column in torch.stack(rows).unbind(1))
            # Ranks share a link unevenly, so that one is late with its first part, and another one with the rest.
            by_node.append(((whole.amax(dim=1) - first.mean(dim=1)) / (_PARTS - 1)).tolist())
            self._spent += float(whole.max())
        return statistics.median(max(nodes) for nodes in by_node), by_node

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _partner(node: int, turn: int, nodes: int) -> int | None:
    """Whom a node meets in a turn of a tournament in which each meets each (the circle method); None for nobody."""
    size = nodes + nodes % 2
    fixed, circle = size - 1, size - 1
    if node == fixed:
        peer = turn * (circle + 1) // 2 % circle
    else:
        peer = (turn - node) % circle
        if peer == node:
            peer = fixed
    return peer if peer < nodes else None
