"""Watches every operation of a step and tells where something non-finite began."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from danon_lightning.callbacks.nan_debugger.origin import Origin


class OriginTracer(TorchDispatchMode):
    """Watches every operation inside ``with tracer:``, forward and backward, below autograd.

    ``with tracer: ...step...`` and then :meth:`resolve` with the loss and the gradients.
    """

    def __init__(
        self, module: nn.Module, batch: Any = None, *, stage: int = 0, micro_batch: int = 0, sharing: bool = True
    ) -> None:
        """Prepare."""
        super().__init__()

    @contextmanager
    def measuring(self, stage: int, kind: str, micro_batch: int) -> Iterator[None]:
        """Say which pass is running in here; the signature is that of the pipeline's stopwatch.

        Args:
            stage: The pipeline stage.
            kind: ``"forward"``, ``"backward"``, or anything else, such as ``"communication"``.
            micro_batch: Which one.
        """
        yield

    def mark(self, stage: int, kind: str, micro_batch: int) -> None:
        """Do nothing: there are moments that only a stopwatch notes."""

    def resolve(
        self, loss: Tensor | None = None, gradients: Mapping[str, Tensor | None] | None = None
    ) -> Origin | None:
        """Tell from where what is bad in the loss or else in the gradients came.

        Args:
            loss: None if there is none on this rank.
            gradients: By parameter.

        Returns:
            None if all of it is finite, or has come from another rank.
        """
        raise NotImplementedError

    @property
    def origin(self) -> Origin | None:
        """What :meth:`resolve` has told; before it, the best guess: the first operation that made a NaN, or else an infinity."""
        raise NotImplementedError
