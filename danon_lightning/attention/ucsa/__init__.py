"""Unified compressed sparse attention: sinks, a window, the blocks worth reading, and summaries of all others."""

from danon_lightning.attention.ucsa.cells import block_errors, compensate_errors
from danon_lightning.attention.ucsa.functional import UCSAStats, ucsa_attention
from danon_lightning.attention.ucsa.module import UCSAAttention, UCSAConfig, UCSAModel, UCSAOutput
from danon_lightning.attention.ucsa.reference import ucsa_attention_reference

__all__ = [
    "UCSAAttention",
    "UCSAConfig",
    "UCSAModel",
    "UCSAOutput",
    "UCSAStats",
    "block_errors",
    "compensate_errors",
    "ucsa_attention",
    "ucsa_attention_reference",
]
