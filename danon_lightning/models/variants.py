"""Language modelling with each of the attention variants."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from typing_extensions import override

from danon_lightning.attention import (
    DALAConfig,
    DALAModel,
    FullAttentionConfig,
    FullAttentionModel,
    InfiniteAttentionConfig,
    InfiniteModel,
    MSRAConfig,
    MSRAModel,
    SuperHybridConfig,
    SuperHybridModel,
    UCSAConfig,
    UCSAModel,
)
from danon_lightning.models.diversity import check_diversity, less_diversity
from danon_lightning.models.language_model import LanguageModel
from danon_lightning.models.optimization import OptimizerConfig


class MSRALightning(LanguageModel):
    """Language modelling with multi-scale recursive attention; ``config`` has the fields of :class:`MSRAConfig`."""

    model_class = MSRAModel
    config_class = MSRAConfig


class DALALightning(LanguageModel):
    """Language modelling with dynamic adaptive long-range attention; ``config`` as in :class:`DALAConfig`."""

    model_class = DALAModel
    config_class = DALAConfig


class UCSALightning(LanguageModel):
    """Language modelling with unified compressed sparse attention; ``config`` as in :class:`UCSAConfig`."""

    model_class = UCSAModel
    config_class = UCSAConfig


class InfiniteLightning(LanguageModel):
    """Language modelling with enhanced infinite attention; ``config`` as in :class:`InfiniteAttentionConfig`."""

    model_class = InfiniteModel
    config_class = InfiniteAttentionConfig


class SuperHybridLightning(LanguageModel):
    """Language modelling with several variants side by side; ``config`` has the fields of :class:`SuperHybridConfig`.

    With a ``diversity_weight`` λ, training minimises the loss less λ times the mean entropy of the weights of the
    components (nats). What is logged as loss stays the cross-entropy; ``train/component_entropy`` is logged beside it.

    Args:
        config: The model's config, or its fields as a mapping.
        optimizer: As in :class:`LanguageModel`.
        chunk_length: As in :class:`LanguageModel`.

    Raises:
        ValueError: Also if ``diversity_weight`` is set together with what leaves no gradient to the weights.
    """

    model_class = SuperHybridModel
    config_class = SuperHybridConfig
    config: SuperHybridConfig
    model: SuperHybridModel

    def __init__(
        self,
        config: SuperHybridConfig | Mapping[str, Any] | None = None,
        optimizer: OptimizerConfig | Mapping[str, Any] | None = None,
        chunk_length: int | None = None,
    ) -> None:
        """See the class."""
        super().__init__(config, optimizer, chunk_length)
        check_diversity(self.config, chunk_length)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch ``[b, n + 1]``."""
        return less_diversity(self, self.model, partial(super().training_step, batch, batch_idx))


class FullAttentionLightning(LanguageModel):
    """The baseline: full softmax attention; ``config`` has the fields of :class:`FullAttentionConfig`."""

    model_class = FullAttentionModel
    config_class = FullAttentionConfig
