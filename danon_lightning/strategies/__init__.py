"""Strategies: how a LightningModule is spread over processes, nodes and links."""

from danon_lightning.strategies.communication import (
    AutoCompression,
    Bf16Compressor,
    Compressor,
    Context,
    ErrorFeedback,
    Fp16Compressor,
    GradientCommunicator,
    Int4Compressor,
    Int8Compressor,
    LinearCompressor,
    PowerSGDCompressor,
    RandomKCompressor,
    SignCompressor,
    TopKCompressor,
    available_compressors,
)
from danon_lightning.strategies.hybrid import DanonHybridStrategy
from danon_lightning.strategies.mesh import Mesh

# Imported before there are process groups: fairscale, which it needs, keeps the default one in its functions' defaults.
from danon_lightning.strategies.pipelined import PipelinedStrategy
from danon_lightning.strategies.sync import AsyncSync, PeriodicSync

__all__ = [
    "AsyncSync",
    "AutoCompression",
    "Bf16Compressor",
    "Compressor",
    "Context",
    "DanonHybridStrategy",
    "ErrorFeedback",
    "Fp16Compressor",
    "GradientCommunicator",
    "Int4Compressor",
    "Int8Compressor",
    "LinearCompressor",
    "Mesh",
    "PeriodicSync",
    "PipelinedStrategy",
    "PowerSGDCompressor",
    "RandomKCompressor",
    "SignCompressor",
    "TopKCompressor",
    "available_compressors",
]
