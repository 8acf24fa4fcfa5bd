"""Dynamic adaptive long-range attention: a local window, and a memory of the most important tokens of the past."""

from danon_lightning.attention.dala.functional import DALAStats, dala_attention
from danon_lightning.attention.dala.reference import dala_attention_reference

__all__ = ["DALAStats", "dala_attention", "dala_attention_reference"]
