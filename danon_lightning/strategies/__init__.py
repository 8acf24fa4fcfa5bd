"""Strategies: how a LightningModule is spread over processes, nodes and links."""

from danon_lightning.strategies.communication import GradientCommunicator, available_compressors
from danon_lightning.strategies.hybrid import DanonHybridStrategy
from danon_lightning.strategies.mesh import Mesh

__all__ = ["DanonHybridStrategy", "GradientCommunicator", "Mesh", "available_compressors"]
