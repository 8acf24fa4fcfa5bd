"""Attention models with sub-quadratic cost, and full attention in the same block to measure them against.

A model is built from the config of a variant, for instance ``MSRAModel(hidden_size=512)``. The mechanisms themselves,
without learned parts, are functions in ``danon_lightning.attention.functional``. A variant of your own is a subclass of
``AttentionCore`` with a config, made known by ``register_variant``.
"""

from danon_lightning.attention.config import AttentionConfig
from danon_lightning.attention.core import AttentionCore, State, detach_state, map_state, observing
from danon_lightning.attention.dala import DALAConfig, DALAModel, DALAOutput
from danon_lightning.attention.efficiency import Efficiency, measure_efficiency
from danon_lightning.attention.factories import (
    create_dala_model,
    create_full_attention_model,
    create_infinite_model,
    create_msra_model,
    create_super_hybrid_model,
    create_ucsa_model,
)
from danon_lightning.attention.full import FullAttentionConfig, FullAttentionModel
from danon_lightning.attention.hybrid import SuperHybridConfig, SuperHybridModel, SuperHybridOutput
from danon_lightning.attention.infinite import InfiniteAttentionConfig, InfiniteModel
from danon_lightning.attention.model import AttentionModel, AttentionModelOutput
from danon_lightning.attention.msra import MSRAConfig, MSRAModel, MSRAOutput
from danon_lightning.attention.registry import available_variants, get_variant, register_variant
from danon_lightning.attention.ucsa import UCSAConfig, UCSAModel, UCSAOutput

__all__ = [
    "AttentionConfig",
    "AttentionCore",
    "AttentionModel",
    "AttentionModelOutput",
    "DALAConfig",
    "DALAModel",
    "DALAOutput",
    "Efficiency",
    "FullAttentionConfig",
    "FullAttentionModel",
    "InfiniteAttentionConfig",
    "InfiniteModel",
    "MSRAConfig",
    "MSRAModel",
    "MSRAOutput",
    "State",
    "SuperHybridConfig",
    "SuperHybridModel",
    "SuperHybridOutput",
    "UCSAConfig",
    "UCSAModel",
    "UCSAOutput",
    "available_variants",
    "create_dala_model",
    "create_full_attention_model",
    "create_infinite_model",
    "create_msra_model",
    "create_super_hybrid_model",
    "create_ucsa_model",
    "detach_state",
    "get_variant",
    "map_state",
    "measure_efficiency",
    "observing",
    "register_variant",
]
