"""The functional cores of all variants, each beside its dense oracle where it has one.

Tensors are laid out as in ``torch.nn.functional.scaled_dot_product_attention``: ``[b, H, n, d]``.
"""

from danon_lightning.attention.full import full_attention
from danon_lightning.attention.msra.functional import MSRAStats, msra_attention
from danon_lightning.attention.msra.reference import msra_attention_reference

__all__ = ["MSRAStats", "full_attention", "msra_attention", "msra_attention_reference"]
