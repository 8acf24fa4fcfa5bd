"""What a compressor is. To add one of your own, subclass :class:`Compressor`: the documentation shows how."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from danon_lightning.strategies.communication import kernels


@dataclass(frozen=True)
class Region:
    """Consecutive elements of one parameter: what one rank codes, and keeps a residual of.

    Regions follow from the parameter, the layout of the ranks and the compressor alone. They never depend on DDP's
    buckets, which are regrouped after the first step (also after the first step of a resumed run).

    Attributes:
        parameter: Name of the parameter.
        start: First element of the flattened parameter.
        stop: One past the last.
    """

    parameter: str
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass
class Context:
    """What an encoder may know beside the values. All of it is the same again in a resumed run.

    Attributes:
        step: Number of exchanges completed so far.
        seed: For random choices: differs between steps, regions and ranks.
        shared_seed: Differs between steps and regions, but is the same on all ranks that exchange the region.
        state: The compressor's own memory of the region: what it wrote to ``new_state`` in the last finite step.
        new_state: To be filled with tensors and numbers. It takes effect only once all ranks agree that the step's
            gradients are finite; otherwise it is forgotten.
    """

    step: int = 0
    seed: int = 0
    shared_seed: int = 0
    state: dict[str, Tensor | float] = field(default_factory=dict)
    new_state: dict[str, Tensor | float] = field(default_factory=dict)

    def generator(self, device: torch.device) -> torch.Generator:
        """A random number generator seeded with ``seed``."""
        return torch.Generator(device).manual_seed(self.seed)


class Compressor(ABC):
    """Two functions and a wire format.

    How payloads are exchanged is one of two ways:

    - ``"reduce"``: each rank codes one part of the region for every other; the receiver decodes what it got, sums in
      float32, codes the sum, and sends it to all. For payloads of constant size.
    - ``"gather"``: each rank sends its payload of the whole region to all others, and every rank sums all of them. For
      sparse payloads, of which each rank has other elements.

    Attributes:
        name: For logs and tables, and for ``compression=`` where it is registered.
        exchange: One of the two ways.
        alignment: Regions start at multiples of this many elements (a block of the code, say).
        needs_error_feedback: Whether training suffers unless what a step leaves out is added to the next one. It then
            is by default.
        may_overflow: Whether finite values may decode to Inf. What is decoded is then looked at too, before a step
            counts as finite.
    """

    name: str
    exchange: ClassVar[Literal["reduce", "gather"]] = "reduce"
    alignment: int = 1
    needs_error_feedback: bool = False
    may_overflow: bool = False

    @abstractmethod
    def payload_bytes(self, numel: int, step: int) -> int:
        """Size of the payload of a region of ``numel`` elements at exchange number ``step``; at most 4·numel + 64."""

    @abstractmethod
    def encode(self, values: Tensor, payload: Tensor, context: Context) -> None:
        """Code ``values`` (float32 ``[n]``) into ``payload`` (uint8 ``[payload_bytes(n, step)]``), on the same device.

        ``values`` are not changed. A region that holds a non-finite value must decode to one: NaN and Inf are never
        hidden from the training loop. ``payload`` starts at a multiple of 8 bytes.
        """

    @abstractmethod
    def decode(self, payload: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Write what ``payload`` stands for to ``out`` (float32 ``[n]``), or add it: the same bits on every rank."""

    def encode_with_feedback(
        self, values: Tensor, residual: Tensor, decay: float, new_residual: Tensor, payload: Tensor, context: Context
    ) -> None:
        """Code ``values + decay · residual`` and write what the code leaves out of it to ``new_residual``.

        All are float32 ``[n]``. Subclasses may do in one pass over memory what is done in four here, with equal
        results.
        """
        torch.mul(residual, decay, out=new_residual)
        new_residual.add_(values)
        self.encode(new_residual, payload, context)
        sent = torch.empty_like(values)
        self.decode(payload, sent)
        new_residual.sub_(sent)

    def encode_sum(self, sources: Sequence[Tensor], scale: float, payload: Tensor, context: Context) -> "bool | Tensor":
        """Code ``scale · (sources[0] + sources[1] + …)``, added in this order in float32; returns whether it is finite.

        Args:
            sources: Tensors ``[n]`` of any floating-point type, on one device.
            scale: A factor, rounded to float32.
            payload: See :meth:`encode`.
            context: See :meth:`encode`.

        Returns:
            A bool; on CUDA a bool tensor, for which the host has not waited.
        """
        values = torch.empty_like(sources[0], dtype=torch.float32)
        finite = kernels.add_scaled(values, sources, scale)
        self.encode(values, payload, context)
        return finite

    def prefers_dense(self, step: int, groups: int) -> bool:
        """Whether at exchange number ``step`` among ``groups`` ranks plain float32 is the better choice.

        By default it is where a gathered code would send as many bytes.
        """
        numel = 1 << 20
        return self.exchange == "gather" and groups * self.payload_bytes(numel, step) >= 8 * numel


class LinearCompressor(ABC):
    """A compressor whose codes are linear in the values, so that codes can be summed in place of values.

    Attributes:
        name: As for :class:`Compressor`.
        num_rounds: How many sums over the ranks a code takes.
        whole_parameters: Whether a region is always a whole parameter (for codes of matrices).
        needs_error_feedback: As for :class:`Compressor`.
    """

    name: str
    num_rounds: int
    whole_parameters: bool = False
    needs_error_feedback: bool = True

    @abstractmethod
    def code_numel(self, shape: torch.Size) -> int | None:
        """Float32 numbers in the code of a region of this shape, or None if it is better sent dense."""

    @abstractmethod
    def rounds(self, values: Tensor, context: Context, *, feedback: bool) -> Generator[Tensor, Tensor, Tensor]:
        """Code ``values``: float32 of the region's shape, contiguous.

        Yields ``num_rounds`` float32 tensors, and is sent the sum of each over all ranks, with the same bits
        everywhere.

        Args:
            values: What is to be coded.
            context: See there.
            feedback: Whether what the code leaves out is kept for the next step. If so, the code stands for a part of
                the values, and ``values`` must end as the rest of them: without what this rank has contributed to the
                decoded sum. If not, it may be scaled up so as to be right on average.

        Returns:
            The code ``[code_numel]``, the same on all ranks.
        """

    @abstractmethod
    def decode(self, code: Tensor, out: Tensor, context: Context) -> None:
        """Write the sum that ``code`` stands for to ``out``: float32 of the region's shape, contiguous."""
