"""Multi-scale recursive attention: near tokens one by one, far ones through summaries that grow with the distance."""

from danon_lightning.attention.msra.functional import MSRAStats, msra_attention
from danon_lightning.attention.msra.fusion import LevelFusion
from danon_lightning.attention.msra.module import MSRAAttention, MSRAConfig, MSRAModel, MSRAOutput
from danon_lightning.attention.msra.reference import msra_attention_reference

__all__ = [
    "LevelFusion",
    "MSRAAttention",
    "MSRAConfig",
    "MSRAModel",
    "MSRAOutput",
    "MSRAStats",
    "msra_attention",
    "msra_attention_reference",
]
