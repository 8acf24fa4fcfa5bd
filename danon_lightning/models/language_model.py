"""LightningModules that train an attention model to predict the next byte."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from danon_lightning.attention import (
    AttentionConfig,
    AttentionModel,
    FullAttentionConfig,
    FullAttentionModel,
    MSRAConfig,
    MSRAModel,
)
from danon_lightning.models.metrics import BitsPerByte
from danon_lightning.models.optimization import OptimizerConfig, optimizer_with_schedule
from danon_lightning.models.settings import build_config
from danon_lightning.models.text import TextGeneration


class LanguageModel(TextGeneration):
    """Next-symbol prediction with one of the attention models; subclasses say which.

    A batch is a long tensor ``[b, n + 1]``: symbols 0 … n−1 are the input, 1 … n what is to be predicted.

    Keys logged:
        ``train/loss`` (nats), ``train/bits_per_byte`` of each step on rank 0; ``val/loss``, ``val/bits_per_byte`` over
        the whole validation set of all ranks.

    Args:
        config: The model's config, or its fields as a mapping.
        optimizer: How it is optimized, or its fields as a mapping.

    Raises:
        ValueError: If a field is unknown or out of range, or the model is not causal.
    """

    model_class: ClassVar[type[AttentionModel]]
    config_class: ClassVar[type[AttentionConfig]]

    def __init__(
        self,
        config: AttentionConfig | Mapping[str, Any] | None = None,
        optimizer: OptimizerConfig | Mapping[str, Any] | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        self.config = build_config(self.config_class, config, "config")
        self.optimizer_config = build_config(OptimizerConfig, optimizer, "optimizer")
        if not self.config.causal:
            raise ValueError("causal=False cannot be trained to predict the next symbol, which it would see")
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters({"config": asdict(self.config), "optimizer": asdict(self.optimizer_config)})
        self.model = self.model_class(self.config)
        self.head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=self.config.initializer_range)
        self.val_bits_per_byte = BitsPerByte()

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``[b, n, vocabulary]`` of the symbol after each of ``input_ids [b, n]``."""
        logits: Tensor = self.head(self.model(input_ids, attention_mask).last_hidden_state)
        return logits

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``tokens [b, n + 1]``, a scalar."""
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch ``[b, n + 1]``."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/bits_per_byte", loss.detach() / math.log(2), prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """One batch ``[b, n + 1]``."""
        loss = self.loss(batch)
        self.val_bits_per_byte.update(loss, batch[:, 1:].numel())
        self.log("val/loss", loss, batch_size=len(batch), sync_dist=True)
        self.log("val/bits_per_byte", self.val_bits_per_byte, prog_bar=True)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The chosen optimizer, warm-up and cosine over the steps of the run."""
        return optimizer_with_schedule(self, self.optimizer_config, self.trainer.estimated_stepping_batches)


class MSRALightning(LanguageModel):
    """Language modelling with multi-scale recursive attention; ``config`` has the fields of :class:`MSRAConfig`."""

    model_class = MSRAModel
    config_class = MSRAConfig


class FullAttentionLightning(LanguageModel):
    """The baseline: full softmax attention; ``config`` has the fields of :class:`FullAttentionConfig`."""

    model_class = FullAttentionModel
    config_class = FullAttentionConfig
