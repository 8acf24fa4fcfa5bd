"""Several variants side by side in one block, weighed token by token."""

from danon_lightning.attention.hybrid.module import (
    SuperHybridAttention,
    SuperHybridConfig,
    SuperHybridModel,
    SuperHybridOutput,
    component_prior,
)
from danon_lightning.attention.hybrid.monitor import PerformanceStats

__all__ = [
    "PerformanceStats",
    "SuperHybridAttention",
    "SuperHybridConfig",
    "SuperHybridModel",
    "SuperHybridOutput",
    "component_prior",
]
