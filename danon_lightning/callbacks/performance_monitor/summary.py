"""What a window of steps looks like over all ranks, and what a whole run has to say in the end."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from danon_lightning.callbacks.health import Finding
from danon_lightning.callbacks.performance_monitor.averages import mean
from danon_lightning.callbacks.performance_monitor.parts import PARTS, PAUSES

# Shares of a step from which on something should be done.
_MUCH_WAITING = 0.1
_MUCH_MOVING = 0.1
_MUCH_WATCHING = 0.1
_MUCH_PAUSE = 0.3
_NEAR_LIMIT = 0.9


@dataclass
class RankWindow:
    """What one rank has measured in a window, as numbers that can be gathered.

    Attributes:
        steps: Optimizer steps.
        samples: NaN if unknown.
        tokens: NaN if unknown.
        resident: GiB, as those below; see :class:`~danon_lightning.callbacks.performance_monitor.memory.MemoryUse`.
        resident_peak: The same.
        allocated_peak: The same.
        reserved_peak: The same.
        memory_limit: How much there is of the memory that may run out.
    """

    steps: float
    samples: float
    tokens: float
    resident: float
    resident_peak: float
    allocated_peak: float
    reserved_peak: float
    memory_limit: float

    def row(self, seconds: dict[str, float]) -> list[float]:
        """Plain numbers.

        Args:
            seconds: By part and pause.
        """
        return [*astuple(self), *(seconds.get(part, 0.0) for part in (*PARTS, *PAUSES))]

    @classmethod
    def of(cls, row: Sequence[float]) -> "tuple[RankWindow, dict[str, float]]":
        """What :meth:`row` was made of.

        Args:
            row: From any rank.
        """
        size = len(fields(cls))
        return cls(*row[:size]), dict(zip((*PARTS, *PAUSES), row[size:], strict=True))


def values_to_log(rows: Sequence[Sequence[float]], replicas: int) -> dict[str, float]:
    """The tags of one window. Times are means over the ranks, memory is that of the rank that takes most.

    Args:
        rows: One a rank.
        replicas: How many of the model there are.
    """
    windows, seconds = zip(*map(RankWindow.of, rows), strict=True)
    steps = windows[0].steps
    found: dict[str, float] = {}
    if steps:
        parts = {part: mean([one[part] for one in seconds]) / steps for part in PARTS}
        total = sum(parts.values())
        found["step_seconds"] = total
        found |= {f"seconds/{part}": value for part, value in parts.items()}
        for name in ("samples", "tokens"):
            # The ranks of a pipeline have the same batch.
            count = sum(getattr(window, name) for window in windows) * replicas / len(windows)
            if total > 0:
                found[f"{name}_per_second"] = count / (total * steps)
    found |= {f"pause_seconds/{pause}": mean([one[pause] for one in seconds]) for pause in PAUSES}
    for name in ("resident", "resident_peak", "allocated_peak", "reserved_peak"):
        known = [value for window in windows if not math.isnan(value := getattr(window, name))]
        found[f"memory/{name}_gib"] = max(known, default=math.nan)
    optional = {"seconds/communication", "seconds/pipeline_wait", *(f"pause_seconds/{pause}" for pause in PAUSES)}
    return {
        f"performance/{name}": value
        for name, value in found.items()
        if not math.isnan(value) and (value or name not in optional)
    }


class RunTotals:
    """Adds up windows, for findings."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._seconds: list[dict[str, float]] = []
        self._steps = 0.0
        self._counts = {"samples": 0.0, "tokens": 0.0}
        self._memory: list[tuple[float, float]] = []

    def add(self, rows: Sequence[Sequence[float]], replicas: int) -> None:
        """Add a window.

        Args:
            rows: One a rank.
            replicas: How many of the model there are.
        """
        if not self._seconds:
            self._seconds = [{} for _ in rows]
            self._memory = [(0.0, math.nan) for _ in rows]
        for rank, row in enumerate(rows):
            window, seconds = RankWindow.of(row)
            for part, value in seconds.items():
                self._seconds[rank][part] = self._seconds[rank].get(part, 0.0) + value
            # With a device, its memory is what runs out.
            peak = window.resident_peak if math.isnan(window.reserved_peak) else window.reserved_peak
            self._memory[rank] = max(self._memory[rank][0], 0.0 if math.isnan(peak) else peak), window.memory_limit
            for name in self._counts:
                self._counts[name] += getattr(window, name) * replicas / len(rows)
            if rank == 0:
                self._steps += window.steps

    def findings(self, *, cuda: bool, ranks_per_host: int, warm_up: int) -> list[Finding]:
        """What there is to say.

        Args:
            cuda: Whether the model computes on CUDA.
            ranks_per_host: How many processes share the memory of a host.
            warm_up: How many steps were left out.
        """
        if not self._steps:
            return []
        found = [*self._waiting(), *self._other_parts(cuda), *self._full_memory(cuda, ranks_per_host)]
        total = self._mean_of(PARTS)
        parts = {part: self._mean_of([part]) / total for part in PARTS} if total else {}
        split = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in parts.items() if share >= 0.005)
        speed = "".join(
            f", {count / total:,.0f} {name}/s" for name, count in self._counts.items() if total and count == count
        )
        left_out = f"; the first {warm_up} steps of fit are left out" if warm_up else ""
        text = f"{total / self._steps:.3g} s a step over {self._steps:.0f} steps{speed}: {split}{left_out}"
        return [*found, Finding("note", "time of a step", text)]

    def _mean_of(self, parts: Sequence[str]) -> float:
        return mean([sum(seconds.get(part, 0.0) for part in parts) for seconds in self._seconds])

    def _shares(self, part: str) -> list[float]:
        totals = [sum(seconds.get(one, 0.0) for one in PARTS) for seconds in self._seconds]
        return [s.get(part, 0.0) / total if total else 0.0 for s, total in zip(self._seconds, totals, strict=True)]

    def _waiting(self) -> list[Finding]:
        shares = self._shares("data_wait")
        worst = max(range(len(shares)), key=shares.__getitem__)
        if shares[worst] < _MUCH_WAITING:
            return []
        where = f" (rank {worst}; {mean(shares):.0%} over all ranks)" if len(shares) > 1 else ""
        return [
            Finding(
                "warning",
                "data loading",
                f"training waited for batches {shares[worst]:.0%} of the time{where}",
                "more workers: DataLoader(num_workers=…, persistent_workers=True), or cheaper preparation of samples, "
                "done once beforehand",
            )
        ]

    def _other_parts(self, cuda: bool) -> list[Finding]:
        found = []
        moving, watching = mean(self._shares("batch_transfer")), mean(self._shares("callbacks"))
        if moving >= _MUCH_MOVING:
            advice = "DataLoader(pin_memory=True), and smaller dtypes in the batch" if cuda else "smaller batches"
            text = f"moving batches to the device took {moving:.0%} of the time"
            found.append(Finding("warning", "batch transfer", text, advice))
        if watching >= _MUCH_WATCHING:
            text = f"callbacks took {watching:.0%} of the time"
            found.append(Finding("warning", "callbacks", text, "let them log less often (every_n_steps)"))
        pauses = {pause: self._mean_of([pause]) for pause in PAUSES}
        whole = self._mean_of((*PARTS, *PAUSES))
        for pause, seconds in pauses.items():
            if whole and seconds / whole >= _MUCH_PAUSE:
                advice = {
                    "validation": "validate less often (val_check_interval) or on fewer batches (limit_val_batches)",
                    "checkpoint": "save less often (ModelCheckpoint(every_n_train_steps=…)), or to a faster disk",
                }[pause]
                text = f"{seconds / whole:.0%} of the time went to {pause} ({seconds:.3g} s)"
                found.append(Finding("warning", pause, text, advice))
        return found

    def _full_memory(self, cuda: bool, ranks_per_host: int) -> list[Finding]:
        taken = [peak * (1 if cuda else ranks_per_host) for peak, _ in self._memory]
        shares = [take / limit if limit == limit else 0.0 for take, (_, limit) in zip(taken, self._memory, strict=True)]
        worst = max(range(len(shares)), key=shares.__getitem__)
        if shares[worst] < _NEAR_LIMIT:
            return []
        where = f" on rank {worst}" if len(shares) > 1 else ""
        text = f"{taken[worst]:.1f} of {self._memory[worst][1]:.1f} GiB were in use{where}"
        return [
            Finding(
                "warning",
                "memory",
                text + ("" if cuda or ranks_per_host == 1 else f" by {ranks_per_host} processes"),
                "a smaller batch with accumulate_grad_batches, bf16 precision, or activation checkpointing",
            )
        ]
