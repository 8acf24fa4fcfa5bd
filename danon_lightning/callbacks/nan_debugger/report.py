"""What all ranks have found, and what follows from it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from danon_lightning.callbacks.nan_debugger.origin import Cause, Origin

# As many names are listed.
_LISTED = 5


@dataclass(frozen=True)
class RankFinding:
    """What one rank has found out about a step that was not finite.

    Attributes:
        rank: Which one.
        stage: The first of its pipeline stages, 0 without.
        reproduced: Whether it has seen the same happen again.
        replayed: Whether it could run its batches again at all.
        origin: Where it began, as far as known.
        batch_number: Which of the batches of the optimizer step it was, from 0.
        batch_idx: Its index in the epoch.
        batches: How many there were.
        losses: Of all of them.
        bad_gradients: Parameters whose gradient is not finite, after the ranks have exchanged theirs.
        bad_inputs: What is not finite in the batch, in plain words; NaN only, unless the batch is to blame.
        largest: The largest absolute value of the gradients of each of these parameters, computed on this rank alone.
        limit: Above which sums of gradients overflow on their way, and in which type.
        limit_type: See above.
        notes: What else there is to say.
        bundle: Folder with all that is needed to run it again; empty if there is none.
    """

    rank: int
    stage: int = 0
    reproduced: bool = False
    replayed: bool = True
    origin: Origin | None = None
    batch_number: int = 0
    batch_idx: int = 0
    batches: int = 1
    losses: tuple[float, ...] = ()
    bad_gradients: tuple[str, ...] = ()
    bad_inputs: tuple[str, ...] = ()
    largest: dict[str, float] = field(default_factory=dict)
    limit: float = float("inf")
    limit_type: str = ""
    notes: tuple[str, ...] = ()
    bundle: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RankFinding":
        """The inverse, also after JSON, where NaN and Inf are strings."""
        values = {**data}
        for name in ("bad_gradients", "bad_inputs", "notes"):
            values[name] = tuple(values.get(name, ()))
        values["losses"] = tuple(map(float, values.get("losses", ())))
        values["largest"] = {name: float(value) for name, value in values.get("largest", {}).items()}
        values["limit"] = float(values.get("limit", "inf"))
        origin = values.get("origin")
        values["origin"] = None if origin is None else Origin.from_dict(origin)
        return cls(**values)


@dataclass(frozen=True)
class Report:
    """One step that was not finite.

    Attributes:
        step: Number of the optimizer step.
        epoch: In which epoch.
        cause: Its class: input, weight, forward, backward, optimizer, reduction, transient; or "unknown", if it could
            not be run again.
        origin: Where it began; None if no rank can tell.
        finding: Of the rank that can tell most.
        findings: Of all ranks.
        why: Why the step was looked at, if not for a plain NaN.
        action: What is done now.
        advice: What to try, most promising first.
    """

    step: int
    epoch: int
    cause: Cause | str
    origin: Origin | None
    finding: RankFinding
    findings: tuple[RankFinding, ...]
    why: str = ""
    action: str = ""
    advice: tuple[str, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks on which it happens again."""
        return tuple(one.rank for one in self.findings if one.reproduced)

    def headline(self) -> str:
        """One sentence: what and where."""
        what = {
            "input": "the batch is not finite",
            "weight": "a weight was not finite before the step",
            "optimizer": "the optimizer has made a weight that is not finite",
            "reduction": "the sum of gradients, each of them finite, has overflowed",
            "transient": "it does not happen again, a fault of the hardware or of something that cannot be run again",
        }.get(self.cause)
        origin = self.origin
        if what is None and origin is not None:
            module = f" in {origin.module or 'the LightningModule'}" if origin.module_type else ""
            what = f"{origin.name or 'some operation'}{module}, {self.cause} pass"
        return f"Step {self.step} is not finite: {what or 'it could not be run again'}"

    def lines(self) -> list[str]:
        """All there is to say, a line each."""
        one, origin = self.finding, self.origin
        lines = [f"{self.headline()}."]
        if self.why:
            lines.append(f"Why now:   {self.why}")
        lines.append(f"Where:     {self._where()}")
        if origin is not None:
            lines.append(f"What:      {origin.describe()}")
            lines += [f"  input:   {statistics.describe()}" for statistics in origin.inputs]
            if origin.output is not None:
                lines.append(f"  output:  {origin.output.describe()}")
            if not origin.exact:
                lines.append("  This is the best guess, not a proof.")
        lines += [f"Batch:     {text}" for text in one.bad_inputs]
        if one.bad_gradients:
            lines.append(f"Gradients: not finite in {_listed(one.bad_gradients)}")
        notes = list(dict.fromkeys([origin.note] if origin is not None and origin.note else []))
        notes += [note for finding in self.findings for note in finding.notes if note not in notes]
        lines += [f"Note:      {note}" for note in dict.fromkeys(notes)]
        lines += [f"Try:       {text}" for text in self.advice]
        if self.action:
            lines.append(f"Now:       {self.action}")
        if one.bundle:
            lines.append(f"Replay:    danon-replay {shlex.quote(one.bundle)}")
        return lines

    def text(self) -> str:
        """All there is to say."""
        return "\n".join(self.lines())

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "cause": self.cause,
            "ranks": list(self.ranks),
            "why": self.why,
            "action": self.action,
            "advice": list(self.advice),
            "origin": None if self.origin is None else self.origin.to_dict(),
            "findings": [one.to_dict() for one in self.findings],
        }

    def _where(self) -> str:
        one, parts = self.finding, [f"epoch {self.epoch}"]
        if len(self.findings) > 1:
            ranks = self.ranks or (("none",) if self.cause in ("reduction", "transient") else ())
            if ranks:
                parts.append(f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}")
            parts.append(f"of {len(self.findings)} ranks")
        if any(finding.stage for finding in self.findings):
            parts.append(f"stage {self.origin.stage if self.origin is not None else one.stage}")
        if self.cause not in ("reduction", "transient"):
            parts.append(f"batch {one.batch_idx}")
            if one.batches > 1:
                parts.append(f"the {one.batch_number + 1}. of {one.batches} that are accumulated")
            if self.origin is not None and any(finding.stage for finding in self.findings):
                parts.append(f"micro-batch {self.origin.micro_batch}")
        return ", ".join(parts)


def conclude(step: int, epoch: int, findings: Sequence[RankFinding], why: str = "") -> Report:
    """Put together what the ranks have found.

    A rank on which it happens again is to blame, the one that has an exact origin before others. If there is none, the
    ranks' own gradients are finite: then their sum has overflowed, if it is large enough, or it was transient. Where
    a rank could not run its batches again, neither can be said.

    Args:
        step: Number of the optimizer step.
        epoch: In which epoch.
        findings: Of all ranks.
        why: See :class:`Report`.
    """
    culprits = [one for one in findings if one.reproduced]
    if culprits:
        best = min(culprits, key=_weight_of)
        cause = best.origin.cause if best.origin is not None else "unknown"
        return Report(step, epoch, cause, best.origin, best, tuple(findings), why)
    first = findings[0]
    if not all(one.replayed for one in findings):
        best = next((one for one in findings if one.origin is not None), first)
        cause = best.origin.cause if best.origin is not None else "unknown"
        return Report(step, epoch, cause, best.origin, best, tuple(findings), why)
    overflow = _overflow(findings)
    if overflow is None:
        note = "On no rank does it happen again with the same batch, weights and random numbers."
        origin = Origin("transient", note=note)
        return Report(step, epoch, "transient", origin, first, tuple(findings), why)
    name, total = overflow
    note = (
        f"Each rank's own gradients are finite. Those of {name} can add up to {total:.3g}, and {first.limit_type} ends "
        f"at {first.limit:.4g}."
    )
    origin = Origin("reduction", parameter=name, phase="reduction", note=note)
    return Report(step, epoch, "reduction", origin, first, tuple(findings), why)


def with_outcome(report: Report, action: str, advice: Sequence[str]) -> Report:
    """The same with what is done now, and what to try."""
    return replace(report, action=action, advice=tuple(advice))


def with_bundle(report: Report, bundle: str, note: str) -> Report:
    """The same with the folder of the bundle that the rank to blame has written, or why there is none."""
    notes = (*report.finding.notes, note) if note else report.finding.notes
    finding = replace(report.finding, bundle=bundle, notes=notes)
    findings = tuple(finding if one is report.finding else one for one in report.findings)
    return replace(report, finding=finding, findings=findings)


def _weight_of(finding: RankFinding) -> tuple[int, int, int]:
    origin = finding.origin
    return (origin is None, origin is not None and not origin.exact, finding.rank)


def _overflow(findings: Sequence[RankFinding]) -> tuple[str, float] | None:
    """The parameter whose gradients may add up to more than their type holds, and how much."""
    sums: dict[str, float] = {}
    for one in findings:
        for name, value in one.largest.items():
            sums[name] = sums.get(name, 0.0) + value
    bad = set(findings[0].bad_gradients)
    sums = {name: total for name, total in sums.items() if not bad or name in bad}
    name = max(sums, key=lambda name: sums[name], default="")
    return (name, sums[name]) if name and sums[name] > findings[0].limit else None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
