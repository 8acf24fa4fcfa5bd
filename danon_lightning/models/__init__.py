"""LightningModules around the attention models, their metrics and optimizers."""

from danon_lightning.models.classification import SequenceClassifier
from danon_lightning.models.language_model import LanguageModel
from danon_lightning.models.metrics import BitsPerByte
from danon_lightning.models.optimization import OptimizerConfig
from danon_lightning.models.variants import (
    DALALightning,
    FullAttentionLightning,
    InfiniteLightning,
    MSRALightning,
    SuperHybridLightning,
    UCSALightning,
)

__all__ = [
    "BitsPerByte",
    "DALALightning",
    "FullAttentionLightning",
    "InfiniteLightning",
    "LanguageModel",
    "MSRALightning",
    "OptimizerConfig",
    "SequenceClassifier",
    "SuperHybridLightning",
    "UCSALightning",
]
