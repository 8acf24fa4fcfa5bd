"""LightningModules around the attention models, their metrics and optimizers."""

from danon_lightning.models.classification import SequenceClassifier
from danon_lightning.models.language_model import FullAttentionLightning, LanguageModel, MSRALightning
from danon_lightning.models.metrics import BitsPerByte
from danon_lightning.models.optimization import OptimizerConfig

__all__ = [
    "BitsPerByte",
    "FullAttentionLightning",
    "LanguageModel",
    "MSRALightning",
    "OptimizerConfig",
    "SequenceClassifier",
]
