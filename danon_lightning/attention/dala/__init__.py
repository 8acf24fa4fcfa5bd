"""Dynamic adaptive long-range attention: a local window, a memory of the most important tokens, a recurrent state."""

from danon_lightning.attention.dala.functional import DALAStats, dala_attention
from danon_lightning.attention.dala.module import DALAAttention, DALAConfig, DALAModel, DALAOutput
from danon_lightning.attention.dala.reference import dala_attention_reference

__all__ = [
    "DALAAttention",
    "DALAConfig",
    "DALAModel",
    "DALAOutput",
    "DALAStats",
    "dala_attention",
    "dala_attention_reference",
]
