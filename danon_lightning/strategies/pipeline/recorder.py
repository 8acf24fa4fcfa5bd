"""Notes in a dry run where tensors are made and used, and finds what stands in the way of a cut."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from danon_lightning.strategies.pipeline.absent import Absent
from danon_lightning.strategies.pipeline.errors import AbsentDataError, UnsupportedStepError, user_location
from danon_lightning.strategies.pipeline.observer import Observer, backward_reason
from danon_lightning.strategies.pipeline.recording import HEAD, describe, position_of
from danon_lightning.strategies.pipeline.torch_internals import enclosing_checkpoint, flatten


@dataclass(frozen=True)
class _Birth:
    """Where a tensor was made: position, line of code and call of ``checkpoint``."""

    position: int
    location: str
    checkpoint: FrameType | None


class Recorder(Observer):
    """Watches a dry run.

    Attributes:
        position: Where the step is (see ``recording``).
        uses: At which positions each parameter and buffer was used, by name.
        tail_reads: Whether the tail has read a value, which was made up.
        fatal: Why the step is refused, should user code have caught the exception.
    """

    draws = False

    def __init__(self, blocks: int) -> None:
        """Start.

        Args:
            blocks: Number of blocks.
        """
        super().__init__()
        self.position = HEAD
        self.uses: defaultdict[str, set[int]] = defaultdict(set)
        self.tail_reads = False
        self.fatal: UnsupportedStepError | None = None
        self._tail = 2 * blocks
        # Kept alive with their tensors, or others might get the same ids.
        self._made: list[Tensor] = []
        self._births: dict[int, _Birth] = {}
        self._later_uses: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)

    @property
    def in_tail(self) -> bool:
        """Whether the last block has been called."""
        return self.position == self._tail

    def used(self, tensor: Tensor) -> None:
        """Note the position."""
        assert isinstance(tensor, Absent)
        if tensor.full_name is not None:
            self.uses[tensor.full_name].add(self.position)
            return
        birth = self._births.get(id(tensor))
        if birth is None or birth.position == self.position:
            return
        later = self._later_uses[id(tensor)]
        if not later or later[-1][0] < self.position:
            later.append((self.position, user_location()))

    def made(self, tensor: Tensor) -> None:
        """Note the position."""
        self._made.append(tensor)
        self._births[id(tensor)] = _Birth(self.position, user_location(), enclosing_checkpoint())

    def read(self, tensor: Tensor) -> None:
        """Allow it in the tail, which is run with all data on the last stage."""
        if not self.in_tail:
            super().read(tensor)
        self.tail_reads = True

    def backward(self) -> None:
        """Refuse the step."""
        self.refuse(backward_reason())

    def write(self, func: torch._ops.OpOverload, target: Tensor) -> None:
        """Allow it in the tail."""
        if not self.in_tail:
            super().write(func, target)

    def refused(self, error: AbsentDataError) -> None:
        """Keep the reason, unless this is in a block, which may be run otherwise, or in the tail."""
        between_blocks = self.position % 2 == 0
        if between_blocks and not self.in_tail and self.fatal is None:
            self.fatal = error

    def refuse(self, reason: str) -> NoReturn:
        """Refuse the step.

        Raises:
            UnsupportedStepError: Always.
        """
        self.fatal = UnsupportedStepError(reason)
        raise self.fatal

    def obstacle(self, block: int, arguments: Iterable[Any], checkpoint: FrameType | None) -> str | None:
        """Why the step cannot be cut in front of a block.

        Args:
            block: The block.
            arguments: The leaves of its arguments.
            checkpoint: The call of ``checkpoint`` in which it is called.
        """
        position = position_of(block)
        travelling = {id(argument) for argument in arguments}
        for tensor in self._made:
            birth = self._births[id(tensor)]
            if birth.position > position:
                continue
            if id(tensor) in travelling:
                if checkpoint is not None and birth.checkpoint is checkpoint:
                    return (
                        f"an argument of block {block} is made inside the torch.utils.checkpoint in which the block is "
                        f"called, at {birth.location}, so that it would be made again on a stage that cannot: "
                        "checkpoint each block by itself"
                    )
                continue
            use = next((use for use in self._later_uses.get(id(tensor), ()) if use[0] >= position), None)
            if use is not None and birth.position < position:
                return (
                    f"a tensor made {describe(birth.position)}, at {birth.location}, is used {self._describe(use[0])}, "
                    f"at {use[1]}, but is not an argument of block {block}: pass it through the blocks"
                )
        return None

    def _describe(self, position: int) -> str:
        return "after the last block" if position == self._tail else describe(position)


class BufferUses(TorchFunctionMode):
    """Notes where buffers are used that are not absent."""

    def __init__(self, recorder: Recorder, buffers: Mapping[int, str]) -> None:
        """Start.

        Args:
            recorder: What knows the position and gets the notes.
            buffers: Names of the buffers by id.
        """
        super().__init__()
        self._recorder, self._buffers = recorder, buffers

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the buffers among the arguments, and carry the function out."""
        for leaf in flatten((args, kwargs))[0]:
            name = self._buffers.get(id(leaf))
            if name is not None:
                self._recorder.uses[name].add(self._recorder.position)
        return func(*args, **(kwargs or {}))
