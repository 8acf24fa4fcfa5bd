"""How gradients travel.

A communicator composes collectives (who exchanges with whom, and how) with a compressor (what is sent) and a memory
(what compression has left out).
"""

from danon_lightning.strategies.communication.adaptive import AutoCompression
from danon_lightning.strategies.communication.communicator import GradientCommunicator
from danon_lightning.strategies.communication.compressors import (
    Bf16Compressor,
    Compressor,
    Context,
    Fp16Compressor,
    Int4Compressor,
    Int8Compressor,
    LinearCompressor,
    PowerSGDCompressor,
    RandomKCompressor,
    SignCompressor,
    TopKCompressor,
    available_compressors,
    get_compressor,
)
from danon_lightning.strategies.communication.error_feedback import ErrorFeedback

__all__ = [
    "AutoCompression",
    "Bf16Compressor",
    "Compressor",
    "Context",
    "ErrorFeedback",
    "Fp16Compressor",
    "GradientCommunicator",
    "Int4Compressor",
    "Int8Compressor",
    "LinearCompressor",
    "PowerSGDCompressor",
    "RandomKCompressor",
    "SignCompressor",
    "TopKCompressor",
    "available_compressors",
    "get_compressor",
]
