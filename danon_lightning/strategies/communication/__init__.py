"""How gradients travel: a communicator composes a collective (who exchanges) with a compressor (what is sent)."""

from danon_lightning.strategies.communication.communicator import GradientCommunicator
from danon_lightning.strategies.communication.compressors import (
    Bf16Compressor,
    BlockCompressor,
    Fp16Compressor,
    Int4Compressor,
    Int8Compressor,
    available_compressors,
    get_compressor,
)

__all__ = [
    "Bf16Compressor",
    "BlockCompressor",
    "Fp16Compressor",
    "GradientCommunicator",
    "Int4Compressor",
    "Int8Compressor",
    "available_compressors",
    "get_compressor",
]
