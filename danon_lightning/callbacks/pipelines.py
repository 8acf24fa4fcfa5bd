"""What callbacks know of strategies with pipeline stages."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


class Pass(Protocol):
    """One pass of a micro-batch through a stage, or a wait.

    Attributes:
        stage: Of the model.
        kind: ``"forward"``, ``"backward"``, ``"weights"``, ``"communication"`` or ``"waiting"``.
        micro_batch: Which one.
        start: Seconds since the first rank has begun.
        end: The same.
    """

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


@runtime_checkable
class HasTimeline(Protocol):
    """A strategy with pipeline stages that can be measured."""

    mesh: Any

    def measure_pipeline(self) -> None:
        """Take the time of all passes in the next training step."""
        ...

    def pipeline_timeline(self) -> Sequence[Sequence[Pass]]:
        """What each rank of this pipeline has done in the step measured last. Collective."""
        ...
