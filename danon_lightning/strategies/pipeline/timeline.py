"""When the stages of a rank have run which pass of which micro-batch, and for what the rank has waited in between."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from danon_lightning.strategies.pipeline import clocks

COMPUTE = ("forward", "backward", "weights")
# A wait for a transfer, as measured -> what has to happen before anything can be transferred: in which stage, seen from
# the one that waits, and what it is that must have ended there.
_WAITS = {
    "receive activation": (-1, "forward"),
    "receive gradient": (1, "backward"),
    "send activation": (1, "want activation"),
    "send gradient": (-1, "want gradient"),
}
_MEASURED = (*COMPUTE, "communication", *_WAITS, "want activation", "want gradient")


@dataclass(frozen=True)
class Pass:
    """One pass of one micro-batch through one stage, or what keeps the rank from it.

    A rank *waits* for an activation or a gradient until the stage that makes it has done so; from then on until it has
    arrived, the time is that of *communication*. In the same way a rank that cannot go on before something is sent
    waits until the receiver asks for it. Where one exchange does both, what is received counts. Communication is also
    what it takes to start transfers. Transfers that go on while the rank computes are not seen, nor what they take
    from its computing. Ranks tell each other the time, so what is called one or the other is exact up to half of the
    shortest round trip between them.

    Attributes:
        stage: The stage.
        kind: ``"forward"``; ``"backward"``, in schedules that split it the gradients of activations only; and there
            ``"weights"``, the gradients of weights; ``"communication"``; ``"waiting"``.
        micro_batch: Which one.
        start: Seconds since the first of the ranks has begun.
        end: The same.
    """

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


class PassObserver(Protocol):
    """Is told what a rank does in a training step, while it does it. It must not raise: other ranks would wait."""

    def measuring(self, stage: int, kind: str, micro_batch: int) -> AbstractContextManager[None]:
        """Give a context for a pass, or for a transfer.

        Args:
            stage: A stage of this rank.
            kind: See :class:`Pass`; ``"waiting"`` is ``"receive activation"``, ``"receive gradient"``, ``"send
                activation"`` or ``"send gradient"`` here.
            micro_batch: Which one.
        """
        ...

    def mark(self, stage: int, kind: str, micro_batch: int) -> None:
        """Hear of a moment.

        Args:
            stage: A stage of this rank.
            kind: ``"want activation"`` or ``"want gradient"``: the stage asks for what it is to receive.
            micro_batch: Which one.
        """
        ...


class Stopwatch:
    """Takes the time of passes and waits; on CUDA without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        """Start. On CUDA this waits for the device, so that its clock can be set by that of the host.

        Args:
            device: Where the passes run.
        """
        self._device = device
        self._passes: list[tuple[int, str, int, Any, Any]] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = clocks.now()
            self._begin = self._now()
            self._begin.synchronize()
            self._begin_on_host = (before + clocks.now()) / 2

    @contextmanager
    def measuring(self, stage: int, kind: str, micro_batch: int) -> Iterator[None]:
        """Measure what happens in here. See :class:`PassObserver`."""
        start = self._now()
        yield
        self._passes.append((stage, kind, micro_batch, start, self._now()))

    def mark(self, stage: int, kind: str, micro_batch: int) -> None:
        """Note a moment. See :class:`PassObserver`."""
        moment = self._now()
        self._passes.append((stage, kind, micro_batch, moment, moment))

    def passes(self) -> list[Pass]:
        """What was measured, in its order and on the clock of the host, for :func:`gather_passes`.

        On CUDA this waits for the device.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [
            Pass(stage, kind, index, self._on_host(start), self._on_host(end))
            for stage, kind, index, start, end in self._passes
        ]

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return clocks.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _on_host(self, moment: Any) -> float:
        if self._device.type != "cuda":
            return float(moment)
        return float(self._begin_on_host + self._begin.elapsed_time(moment) / 1e3)


def gather_passes(own: Sequence[Pass], group: dist.ProcessGroup, device: torch.device) -> list[list[Pass]]:
    """What all ranks of a pipeline have done, on each of them, told on one clock. Collective.

    Clocks are compared now: they have drifted apart since, if the measured step is long ago and on several machines.

    Args:
        own: What the stopwatch of this rank has measured.
        group: The ranks.
        device: Where these move tensors.
    """
    size = dist.get_world_size(group)
    ahead = clocks.clock_offset(group, device)
    rows = [[p.stage, _MEASURED.index(p.kind), p.micro_batch, p.start - ahead, p.end - ahead] for p in own]
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(rows)], device=device), group=group)
    mine = torch.zeros(max(int(length) for length in lengths), 5, dtype=torch.float64, device=device)
    mine[: len(rows)] = torch.tensor(rows, dtype=torch.float64, device=device).view(-1, 5)
    tables = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(tables, mine, group=group)
    return tell_apart(
        [
            [Pass(int(stage), _MEASURED[int(kind)], int(index), start, end) for stage, kind, index, start, end in rows]
            for rows in (table[: int(length)].tolist() for table, length in zip(tables, lengths, strict=True))
        ]
    )


def tell_apart(ranks: Sequence[Sequence[Pass]]) -> list[list[Pass]]:
    """Divide waits into waiting for another rank and communication; count seconds from when the first rank begins.

    Args:
        ranks: What the stopwatch of each rank has measured, on one clock.
    """
    ends = {(p.stage, p.kind, p.micro_batch): p.end for passes in ranks for p in passes}
    begin = min((p.start for passes in ranks for p in passes), default=0.0)
    return [
        [
            replace(part, start=part.start - begin, end=part.end - begin)
            for measured in passes
            for part in _parts(measured, ends)
        ]
        for passes in ranks
    ]


def _parts(measured: Pass, ends: dict[tuple[int, str, int], float]) -> list[Pass]:
    if measured.kind in (*COMPUTE, "communication"):
        return [measured]
    if measured.kind not in _WAITS:
        return []
    away, what = _WAITS[measured.kind]
    ready = ends.get((measured.stage + away, what, measured.micro_batch))
    if ready is None:
        return []  # that rank has measured nothing
    ready = min(max(ready, measured.start), measured.end)
    parts = [replace(measured, kind="waiting", end=ready), replace(measured, kind="communication", start=ready)]
    return [part for part in parts if part.start < part.end]
