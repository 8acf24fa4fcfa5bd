"""What a dry run finds out: what blocks return, what must travel at each cut, and who uses which parameter.

Positions in a step are numbered: 0 is the head (what comes before the first block), 2k + 1 is block k and 2k + 2 what
comes between it and the next one; after the last block that is the tail.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danon_lightning.strategies.pipeline.absent import Absent, meta_of
from danon_lightning.strategies.pipeline.torch_internals import (
    TreeSpec,
    flatten_with_paths,
    unflatten,
    without_torch_function,
)

HEAD = 0


def position_of(block: int) -> int:
    """The position of a block; the following one is what comes after it."""
    return 2 * block + 1


def describe(position: int) -> str:
    """A position in words."""
    if position == HEAD:
        return "before the first block"
    block, after = divmod(position - 1, 2)
    return f"after block {block}" if after else f"in block {block}"


@dataclass(frozen=True)
class TensorMeta:
    """All of a tensor but its data.

    Attributes:
        meta: Shape, strides and dtype: a tensor on the meta device.
        device: Where it is.
        requires_grad: Whether a gradient comes back for it.
    """

    meta: Tensor
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorMeta":
        """That of an absent or ordinary tensor."""
        return cls(meta_of(tensor), tensor.device, tensor.requires_grad)

    def absent(self) -> Tensor:
        """An absent tensor like it."""
        requires_grad = self.requires_grad and torch.is_grad_enabled()
        absent = Absent(self.meta, self.device, requires_grad=requires_grad)
        # Not a leaf where the original was none, or user code could not change it in place.
        with without_torch_function():
            return absent.clone() if requires_grad else absent

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has this shape and dtype."""
        return tensor.shape == self.meta.shape and tensor.dtype == self.meta.dtype

    def __str__(self) -> str:
        """Shape and dtype."""
        return f"{tuple(self.meta.shape)} {self.meta.dtype}"


@dataclass(frozen=True)
class ArgumentAt:
    """A result that is the argument of the block at ``path``."""

    path: str


@dataclass(frozen=True)
class Constant:
    """A result that is no tensor."""

    value: Any


@dataclass(frozen=True)
class BlockRecord:
    """What a block gets and gives.

    Attributes:
        results: The leaves of what it returns.
        structure: The containers they are in.
        arrives: What must come from the stage before if the step is cut in front of it: paths among its arguments.
        obstacle: Why the step cannot be cut in front of it; None if it can.
    """

    results: tuple[TensorMeta | ArgumentAt | Constant, ...]
    structure: TreeSpec
    arrives: Mapping[str, TensorMeta]
    obstacle: str | None

    def stand_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block returns for these arguments, absent."""
        passes = any(isinstance(result, ArgumentAt) for result in self.results)
        arguments = flatten_with_paths((args, kwargs)) if passes else {}
        leaves: list[Any] = []
        for result in self.results:
            if isinstance(result, TensorMeta):
                leaves.append(result.absent())
            else:
                leaves.append(arguments[result.path] if isinstance(result, ArgumentAt) else result.value)
        return unflatten(leaves, self.structure)


@dataclass(frozen=True)
class Recording:
    """What a dry run has found out, for batches of one signature.

    Attributes:
        blocks: The blocks.
        uses: At which positions parameters and buffers are used, by their first full name.
        losses: Number of calls of losses that take a mean (see ``loss_weights``).
        tail_problem: Why the tail could not be followed to its end; None if it could.
        tail_reads: Whether values were made up for the tail, so that it may go another way with true ones.
    """

    blocks: tuple[BlockRecord, ...]
    uses: Mapping[str, frozenset[int]]
    losses: int
    tail_problem: str | None
    tail_reads: bool


@dataclass(frozen=True)
class Cuts:
    """Where a step is cut.

    Attributes:
        bounds: Stage s has blocks ``bounds[s]`` to ``bounds[s + 1] - 1``.
    """

    bounds: tuple[int, ...]

    @classmethod
    def checked(cls, bounds: Sequence[int], blocks: int) -> "Cuts":
        """Cuts of a module.

        Args:
            bounds: First blocks of the stages, and after the last of them the number of blocks.
            blocks: Number of blocks.

        Raises:
            ValueError: If they do not ascend from 0 to ``blocks``.
        """
        ascending = all(low < high for low, high in zip(bounds, bounds[1:], strict=False))
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != blocks or not ascending:
            raise ValueError(f"cuts {tuple(bounds)} must ascend from 0 to {blocks}, the number of blocks")
        return cls(tuple(bounds))

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.bounds) - 1

    def blocks_of(self, stage: int) -> range:
        """The blocks of a stage."""
        return range(self.bounds[stage], self.bounds[stage + 1])

    def stage_of_block(self, block: int) -> int:
        """The stage that has a block."""
        return bisect_right(self.bounds, block) - 1

    def stage_at(self, position: int) -> int:
        """The stage that has the data at a position."""
        return 0 if position == HEAD else self.stage_of_block((position - 1) // 2)
