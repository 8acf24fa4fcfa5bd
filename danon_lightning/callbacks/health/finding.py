"""What a callback has to say of a run in the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable


@dataclass(frozen=True)
class Finding:
    """Something that was slow or odd, or that was measured and is well.

    Attributes:
        severity: ``"note"`` for what is well or merely good to know, ``"warning"`` for what costs time or quality,
            ``"error"`` for what has spoilt the run.
        subject: What it is about, in a few words: "data loading", "gradients of model.layers.3".
        text: What was measured, with numbers and units: "the trainer waited for batches 31 % of the time".
        advice: What to try; empty where nothing needs to be done.
    """

    severity: Literal["note", "warning", "error"]
    subject: str
    text: str
    advice: str = ""


@runtime_checkable
class ReportsFindings(Protocol):
    """A callback that has something to say when a run has ended."""

    def findings(self) -> Sequence[Finding]:
        """What it has found on this rank, most important first. Not collective."""
        ...
