"""How gradients travel: a communicator composes a collective (who exchanges) with a compressor (what is sent)."""

from danon_lightning.strategies.communication.communicator import GradientCommunicator
from danon_lightning.strategies.communication.compressors import (
    BlockCompressor,
    Int8Compressor,
    available_compressors,
    get_compressor,
)

__all__ = ["BlockCompressor", "GradientCommunicator", "Int8Compressor", "available_compressors", "get_compressor"]
