"""Parts of attention models that are of use by themselves."""

from danon_lightning.attention.components.cache import AttentionCache, CacheStats, CacheValue
from danon_lightning.attention.components.cells import CompressedSequence, CompressionStats
from danon_lightning.attention.components.compression import DynamicCompression
from danon_lightning.attention.components.fusion import MultiScaleFeatureFusion
from danon_lightning.attention.components.hierarchy import HierarchicalCompression
from danon_lightning.attention.components.importance import ImportanceNetwork
from danon_lightning.attention.components.recurrent import RecurrentState
from danon_lightning.attention.components.router import DynamicRouter
from danon_lightning.attention.components.stability import StabilityEnhancer

__all__ = [
    "AttentionCache",
    "CacheStats",
    "CacheValue",
    "CompressedSequence",
    "CompressionStats",
    "DynamicCompression",
    "DynamicRouter",
    "HierarchicalCompression",
    "ImportanceNetwork",
    "MultiScaleFeatureFusion",
    "RecurrentState",
    "StabilityEnhancer",
]
