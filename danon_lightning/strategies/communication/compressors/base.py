"""The interface of compressors that code a gradient block by block."""

from abc import ABC, abstractmethod

from torch import Tensor


class BlockCompressor(ABC):
    """Two pure functions and a wire format of constant size a block.

    A message can be cut between ranks at any block, so one ``encode`` serves a whole message whoever sums its parts.
    Blocks begin at the start of each parameter and never span two, so what is sent does not depend on how DDP groups
    parameters into buckets (it regroups them after the first step, also after the first step of a resumed run).

    Attributes:
        name: For logs and tables.
        block_size: Elements of a block.
        block_bytes: Bytes of a coded block.
    """

    name: str
    block_size: int
    block_bytes: int

    @abstractmethod
    def encode(self, blocks: Tensor) -> Tensor:
        """Code float32 ``[m, block_size]`` as uint8 ``[m, block_bytes]`` on the same device.

        A block that holds a non-finite value must decode to one: NaN and Inf are never hidden from the training loop.
        """

    @abstractmethod
    def decode(self, payload: Tensor) -> Tensor:
        """Restore float32 ``[m, block_size]`` from uint8 ``[m, block_bytes]``: the same bits on every rank."""
