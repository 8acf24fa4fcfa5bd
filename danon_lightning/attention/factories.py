"""Models by one call each."""

from typing import Any

from danon_lightning.attention.dala import DALAConfig, DALAModel
from danon_lightning.attention.full import FullAttentionConfig, FullAttentionModel
from danon_lightning.attention.hybrid import SuperHybridConfig, SuperHybridModel
from danon_lightning.attention.infinite import InfiniteAttentionConfig, InfiniteModel
from danon_lightning.attention.msra import MSRAConfig, MSRAModel
from danon_lightning.attention.ucsa import UCSAConfig, UCSAModel

__all__ = [
    "create_dala_model",
    "create_full_attention_model",
    "create_infinite_model",
    "create_msra_model",
    "create_super_hybrid_model",
    "create_ucsa_model",
]


def create_msra_model(config: MSRAConfig | None = None, **settings: Any) -> MSRAModel:
    """Return a model with multi-scale recursive attention.

    Args:
        config: Its settings; ``None``: the defaults.
        **settings: Fields that replace those of ``config``.
    """
    return MSRAModel(config, **settings)


def create_dala_model(config: DALAConfig | None = None, **settings: Any) -> DALAModel:
    """Return a model with dynamic adaptive long-range attention; arguments as in ``create_msra_model``."""
    return DALAModel(config, **settings)


def create_ucsa_model(config: UCSAConfig | None = None, **settings: Any) -> UCSAModel:
    """Return a model with unified compressed sparse attention; arguments as in ``create_msra_model``."""
    return UCSAModel(config, **settings)


def create_infinite_model(config: InfiniteAttentionConfig | None = None, **settings: Any) -> InfiniteModel:
    """Return a model with enhanced infinite attention; arguments as in ``create_msra_model``."""
    return InfiniteModel(config, **settings)


def create_super_hybrid_model(config: SuperHybridConfig | None = None, **settings: Any) -> SuperHybridModel:
    """Return a model with several variants side by side; arguments as in ``create_msra_model``."""
    return SuperHybridModel(config, **settings)


def create_full_attention_model(config: FullAttentionConfig | None = None, **settings: Any) -> FullAttentionModel:
    """Return a model with full attention, the baseline; arguments as in ``create_msra_model``."""
    return FullAttentionModel(config, **settings)
