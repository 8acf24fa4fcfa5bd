"""Linear attention with decay: the whole past in one matrix a head, plain or with the delta rule."""

from danon_lightning.attention.linear.functional import gated_delta_rule, gated_linear_attention
from danon_lightning.attention.linear.reference import gated_delta_rule_reference, gated_linear_attention_reference

__all__ = [
    "gated_delta_rule",
    "gated_delta_rule_reference",
    "gated_linear_attention",
    "gated_linear_attention_reference",
]
