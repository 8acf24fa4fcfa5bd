"""When the stages of a rank have run which pass of which micro-batch."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

KINDS = ("forward", "backward", "weights")


@dataclass(frozen=True)
class Pass:
    """One pass of one micro-batch through one stage.

    Attributes:
        stage: The stage.
        kind: ``"forward"``; ``"backward"``, in schedules that split it the gradients of activations only; and there
            ``"weights"``, the gradients of weights.
        micro_batch: Which one.
        start: Seconds since the rank has begun with the batch.
        end: The same.
    """

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


class Stopwatch:
    """Takes the time of passes; on CUDA without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        """Start.

        Args:
            device: Where the passes run.
        """
        self._device = device
        self._passes: list[tuple[int, str, int, Any, Any]] = []
        self._begin = self._now()

    @contextmanager
    def measuring(self, stage: int, kind: str, micro_batch: int) -> Iterator[None]:
        """Measure what happens in here."""
        start = self._now()
        yield
        self._passes.append((stage, kind, micro_batch, start, self._now()))

    def passes(self) -> list[Pass]:
        """What was measured, in its order. On CUDA it waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [
            Pass(stage, kind, index, self._since_begin(start), self._since_begin(end))
            for stage, kind, index, start, end in self._passes
        ]

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since_begin(self, moment: Any) -> float:
        if self._device.type != "cuda":
            return float(moment - self._begin)
        return float(self._begin.elapsed_time(moment)) / 1e3


def gather_passes(own: Sequence[Pass], group: dist.ProcessGroup, device: torch.device) -> list[list[Pass]]:
    """The passes of all ranks of a pipeline, on each of them. Collective.

    Args:
        own: Those of this rank.
        group: The ranks.
        device: Where these move tensors.
    """
    size = dist.get_world_size(group)
    rows = [[p.stage, KINDS.index(p.kind), *astuple(p)[2:]] for p in own]
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(rows)], device=device), group=group)
    mine = torch.zeros(max(int(length) for length in lengths), 5, dtype=torch.float64, device=device)
    mine[: len(rows)] = torch.tensor(rows, dtype=torch.float64, device=device).view(-1, 5)
    tables = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(tables, mine, group=group)
    return [
        [Pass(int(stage), KINDS[int(kind)], int(index), start, end) for stage, kind, index, start, end in rows]
        for rows in (table[: int(length)].tolist() for table, length in zip(tables, lengths, strict=True))
    ]
