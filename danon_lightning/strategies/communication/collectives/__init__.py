"""How a message is averaged over all ranks: one file for each way."""

from torch import Tensor

from danon_lightning.strategies.communication.collectives.dense import average_dense
from danon_lightning.strategies.communication.collectives.exchange import Exchange, Steps
from danon_lightning.strategies.communication.collectives.flush import average_flushed
from danon_lightning.strategies.communication.collectives.gather import average_gathered
from danon_lightning.strategies.communication.collectives.linear import average_linear
from danon_lightning.strategies.communication.collectives.reduce import average_reduced
from danon_lightning.strategies.communication.compressors import Compressor
from danon_lightning.strategies.communication.messages import LinearMessage, Message


def average(exchange: Exchange, message: Message | LinearMessage, bucket: Tensor) -> Steps[None]:
    """Replace the message's elements of ``bucket`` by their mean over all ranks: the same bits everywhere."""
    if isinstance(message, LinearMessage):
        return average_linear(exchange, message, bucket)
    if message.kind == "dense":
        return average_dense(exchange, message, bucket)
    compressor, memory = exchange.compressor, exchange.memory
    assert isinstance(compressor, Compressor) and memory is not None
    if memory.flushes or compressor.prefers_dense(memory.step, exchange.outer.size):
        return average_flushed(exchange, message, bucket)
    if message.kind == "reduce":
        return average_reduced(exchange, message, bucket)
    return average_gathered(exchange, message, bucket)


__all__ = ["Exchange", "Steps", "average"]
