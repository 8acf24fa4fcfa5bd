"""The passage of one micro-batch through one stage: what each call of a block does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from danon_lightning.strategies.pipeline.absent import Absent, find_absent, with_arrived
from danon_lightning.strategies.pipeline.errors import AbsentDataError, UnsupportedStepError, user_location
from danon_lightning.strategies.pipeline.random_numbers import reseed
from danon_lightning.strategies.pipeline.recording import Recording
from danon_lightning.strategies.pipeline.torch_internals import call_with_forward, flatten_with_paths


@dataclass(frozen=True)
class MicroBatch:
    """A part of a batch.

    Attributes:
        step: Runs the user's step on it, the same on every stage.
        index: Which one of the batch it is.
        seed: What random numbers of the whole batch depend on: the same on every stage, another for each batch.
        recording: The dry run of a micro-batch of its signature.
    """

    step: Callable[[], Any]
    index: int
    seed: int
    recording: Recording


class NextStageReachedError(BaseException):
    """Ends a step where the next stage takes over. No Exception, so that user code does not catch it.

    Attributes:
        arguments: Those of the first block of the next stage, by their paths.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Start.

        Args:
            arguments: See above.
        """
        super().__init__()
        self.arguments = arguments


class Passage:
    """Blocks of earlier stages give absent results, own ones are run, and the first of the next stage ends the step."""

    def __init__(
        self, micro_batch: MicroBatch, own: range, received: Sequence[Tensor], reveal: Callable[[], None]
    ) -> None:
        """Start before the first block.

        Args:
            micro_batch: What passes.
            own: The blocks of the stage.
            received: What the stage before has sent for the first of them.
            reveal: Called before the first own block: from then on, the data of the stage are needed.
        """
        self._micro_batch, self._own, self._received, self._reveal = micro_batch, own, received, reveal
        self._next = 0
        self._blocks = micro_batch.recording.blocks

    @property
    def in_tail(self) -> bool:
        """Whether all blocks have been called."""
        return self._next == len(self._blocks)

    def call(
        self,
        index: int,
        block: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Do what a call of a block means here.

        Args:
            index: Which one it is.
            block: The block.
            original: What calls it for real.
            args: Its arguments.
            kwargs: The others.

        Returns:
            What it returns, absent if it belongs to an earlier stage.

        Raises:
            NextStageReachedError: If it belongs to the next stage.
            UnsupportedStepError: If the step takes another way than in its dry run.
        """
        if index != self._next:
            self._diverged(f"block {index} is called where block {self._next} was expected")
        if index == self._own.stop:
            raise NextStageReachedError(flatten_with_paths(with_arrived((args, kwargs))))
        self._next += 1
        if index < self._own.start:
            result = call_with_forward(block, self._stand_in(index), *args, **kwargs)
        else:
            if index == self._own.start > 0:
                self._reveal()
                self._fill(args, kwargs)
            args, kwargs = with_arrived((args, kwargs))
            result = original(*args, **kwargs)
            if find_absent(result) is not None:
                raise AbsentDataError(
                    f"block {index}, called at {user_location()}, uses a tensor that its stage does not hold"
                )
        # Blocks draw numbers on their own stage only, yet all must draw the same afterwards.
        reseed(self._micro_batch.seed, self._micro_batch.index, index)
        return result

    def finish(self) -> None:
        """Check that all blocks have been called.

        Raises:
            UnsupportedStepError: If the step has left some out.
        """
        if not self.in_tail:
            self._diverged(f"block {self._next} is not called")

    def outgoing(self, reached: NextStageReachedError) -> tuple[Tensor, ...]:
        """What the next stage must get.

        Args:
            reached: What ended the step.
        """
        sent = []
        for path, expected in self._blocks[self._own.stop].arrives.items():
            tensor = reached.arguments.get(path)
            if not isinstance(tensor, Tensor) or isinstance(tensor, Absent):
                self._diverged(f"argument {path} of block {self._own.stop} is a {type(tensor).__name__}, not a tensor")
            if not expected.fits(tensor) or expected.requires_grad != tensor.requires_grad:
                self._diverged(
                    f"argument {path} of block {self._own.stop} is {tuple(tensor.shape)} {tensor.dtype} with "
                    f"requires_grad={tensor.requires_grad}, not {expected} with requires_grad={expected.requires_grad}"
                )
            sent.append(tensor)
        return tuple(sent)

    def _stand_in(self, index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._blocks[index].stand_in(args, kwargs)

    def _fill(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give absent arguments of the first own block the values that were sent for them."""
        first = self._own.start
        arguments = flatten_with_paths((args, kwargs))
        for (path, expected), value in zip(self._blocks[first].arrives.items(), self._received, strict=True):
            argument = arguments.get(path)
            if not isinstance(argument, Absent) or argument.shape != value.shape or not expected.fits(value):
                sent = f"{tuple(value.shape)} {value.dtype}"
                self._diverged(f"argument {path} of block {first} is {argument!r} where {sent} was sent")
            argument.arrive(_Arrival.apply(value) if value.requires_grad else value)

    def _diverged(self, difference: str) -> NoReturn:
        raise UnsupportedStepError(
            f"micro-batch {self._micro_batch.index} takes another way through the step than its dry run did: "
            f"{difference} ({user_location()}). What blocks are called with must not depend on the values in a batch"
        )


class _Arrival(torch.autograd.Function):
    """The same data as no leaf, which user code may change in place as it may what a block has returned."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]
