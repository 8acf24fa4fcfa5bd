"""Who is told what happens to absent tensors, and decides about what they cannot do."""

from collections.abc import Container, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from danon_lightning.strategies.pipeline.errors import AbsentDataError, UnsupportedStepError, user_location


class Observer:
    """Refuses what absent tensors cannot do, and notes nothing.

    Attributes:
        draws: Whether random operations on absent tensors are to advance the generator.
    """

    draws = True

    def __init__(self, buffers: Container[int] = ()) -> None:
        """Start.

        Args:
            buffers: Ids of tensors into which absent data may be "written", which leaves them as they are: buffers
                that another stage keeps up to date.
        """
        self.buffers = buffers

    def used(self, tensor: Tensor) -> None:
        """Note that an operator gets ``tensor``."""

    def made(self, tensor: Tensor) -> None:
        """Note that an operator has given ``tensor``."""

    def refused(self, error: AbsentDataError) -> None:
        """Note that an operator has been refused."""

    def read(self, tensor: Tensor) -> None:
        """Decide whether a made-up value may stand for that of ``tensor``.

        Raises:
            AbsentDataError: If it may not.
        """
        raise AbsentDataError(
            f"the value of a tensor that depends on parameters is read before the last block, at {user_location()}: "
            "stages that do not hold these parameters cannot know it. Move what depends on it into a block or after "
            "the last one, or use torch.where"
        )

    def backward(self) -> None:
        """Decide about a call of ``backward`` on an absent tensor.

        Raises:
            UnsupportedStepError: Always.
        """
        raise UnsupportedStepError(backward_reason())

    def write(self, func: torch._ops.OpOverload, target: Tensor) -> None:
        """Decide whether the write of absent data into the ordinary tensor ``target`` may be left out.

        Raises:
            AbsentDataError: If it may not.
        """
        if id(target) not in self.buffers:
            raise AbsentDataError(
                f"{func} writes data that depends on parameters into an ordinary tensor in place, at "
                f"{user_location()}: stages that do not hold these parameters cannot do that. Make a new tensor "
                "instead (torch.cat, torch.where, an operation without the underscore), or do it inside a block"
            )


def backward_reason() -> str:
    """Why ``backward`` cannot be called in a step, and where it is."""
    return (
        f"the step calls backward itself, at {user_location()}: with pipeline stages the schedule does that. Return "
        "the loss instead (automatic optimization)"
    )


_observer = Observer()


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Tell ``observer`` what happens to absent tensors."""
    global _observer
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous


def current_observer() -> Observer:
    """The one that is told at the moment."""
    return _observer
