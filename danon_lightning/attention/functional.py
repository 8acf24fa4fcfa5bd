"""The functional cores of all variants, each beside its dense oracle where it has one.

Tensors are laid out as in ``torch.nn.functional.scaled_dot_product_attention``: ``[b, H, n, d]``.
"""

from danon_lightning.attention.dala.functional import DALAStats, dala_attention
from danon_lightning.attention.dala.reference import dala_attention_reference
from danon_lightning.attention.full import full_attention
from danon_lightning.attention.linear.functional import gated_delta_rule, gated_linear_attention
from danon_lightning.attention.linear.reference import gated_delta_rule_reference, gated_linear_attention_reference
from danon_lightning.attention.msra.functional import MSRAStats, msra_attention
from danon_lightning.attention.msra.reference import msra_attention_reference
from danon_lightning.attention.ucsa.cells import block_errors, compensate_errors
from danon_lightning.attention.ucsa.functional import UCSAStats, ucsa_attention
from danon_lightning.attention.ucsa.reference import ucsa_attention_reference

__all__ = [
    "DALAStats",
    "MSRAStats",
    "UCSAStats",
    "block_errors",
    "compensate_errors",
    "dala_attention",
    "dala_attention_reference",
    "full_attention",
    "gated_delta_rule",
    "gated_delta_rule_reference",
    "gated_linear_attention",
    "gated_linear_attention_reference",
    "msra_attention",
    "msra_attention_reference",
    "ucsa_attention",
    "ucsa_attention_reference",
]
