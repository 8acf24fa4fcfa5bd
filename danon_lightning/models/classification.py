"""A LightningModule that sorts sequences into classes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from typing_extensions import override

from danon_lightning.attention import AttentionConfig, AttentionModel, get_variant
from danon_lightning.models.diversity import check_diversity, less_diversity
from danon_lightning.models.optimization import OptimizerConfig, optimizer_with_schedule
from danon_lightning.models.settings import build_config

# {"input_ids": …, "attention_mask": …, "labels": …}, or the three in that order; no mask, or None: all tokens are real.
Batch: TypeAlias = Mapping[str, Tensor] | Sequence[Tensor | None]


class SequenceClassifier(pl.LightningModule):
    """An attention model of any variant, the mean of its last hidden states over the real tokens, a linear layer.

    The mean is the choice because it serves both kinds of attention: with a causal model the last token alone knows the
    whole sequence, but only what the core still reaches from there; without causality no token is special.

    A batch is a mapping with ``input_ids`` (long ``[b, n]``), ``labels`` (long ``[b]``) and, unless all tokens are
    real, ``attention_mask`` (1 for real ones ``[b, n]``); or a tuple of ids, mask and labels.

    The ``diversity_weight`` of a hybrid counts as in :class:`SuperHybridLightning`, but padding does not.

    Keys logged:
        ``train/loss`` (nats), ``train/accuracy`` of each step on rank 0; ``val/loss``, ``val/accuracy`` (share of all
        sequences) and ``val/f1`` (mean over the classes) over the whole validation set of all ranks; ``test/…``
        likewise. With a ``diversity_weight`` also ``train/component_entropy`` (nats).

    Args:
        variant: Name of the attention variant, such as "msra"; see ``danon_lightning.attention.available_variants``.
        num_classes: Number of classes, at least 2.
        config: The config of the variant, or its fields as a mapping. ``causal=False`` lets tokens see both sides,
            where the variant can: that learns sooner.
        optimizer: How it is optimized, or its fields as a mapping.

    Raises:
        ValueError: If the variant or a field is unknown or out of range, or if ``diversity_weight`` is set together
            with what leaves no gradient to the weights; with a batch, also if a label is out of range.
    """

    def __init__(
        self,
        variant: str,
        num_classes: int,
        config: AttentionConfig | Mapping[str, Any] | None = None,
        optimizer: OptimizerConfig | Mapping[str, Any] | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 2:
            raise ValueError(f"num_classes={num_classes!r} must be an integer of at least 2")
        self.config = build_config(get_variant(variant).config_class, config, "config")
        check_diversity(self.config)
        self.num_classes = num_classes
        self.optimizer_config = build_config(OptimizerConfig, optimizer, "optimizer")
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters(
            {
                "variant": variant,
                "num_classes": num_classes,
                "config": asdict(self.config),
                "optimizer": asdict(self.optimizer_config),
            }
        )
        self.model = AttentionModel(self.config)
        self.head = nn.Linear(self.config.hidden_size, num_classes)
        nn.init.normal_(self.head.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.head.bias)
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_{name}": metric
                for stage in ("val", "test")
                for name, metric in (
                    ("accuracy", MulticlassAccuracy(num_classes, average="micro")),
                    ("f1", MulticlassF1Score(num_classes, average="macro")),
                )
            }
        )

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``[b, classes]`` of ``input_ids [b, n]``; those of a row without real tokens are of the bias alone.

        Args:
            input_ids: Long ``[b, n]``.
            attention_mask: 0 for padding, anything else for real tokens ``[b, n]``; None: all are real.
        """
        hidden = self.model(input_ids, attention_mask, output_details=()).last_hidden_state
        if attention_mask is None:
            pooled = hidden.mean(dim=1)
        else:
            # Hidden states of padding are zero.
            tokens = attention_mask.bool().sum(dim=1, keepdim=True)
            pooled = hidden.sum(dim=1) / tokens.clamp_min(1).to(hidden.dtype)
        logits: Tensor = self.head(pooled)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch."""

        def step() -> Tensor:
            loss, logits, labels = self._evaluate(batch)
            accuracy = (logits.argmax(dim=-1) == labels).float().mean()
            self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
            self.log("train/accuracy", accuracy, prog_bar=True, batch_size=len(labels))
            return loss

        return less_diversity(self, self.model, step, real=_unpack(batch)[1])

    def reads_between_steps(self, trainer: pl.Trainer) -> bool:
        """Never looks at weights or gradients between the backward pass and the next forward pass."""
        return False

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Move on what follows the course of training."""
        self.model.finish_step(self.global_step)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """One batch."""
        self._measure(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """One batch."""
        self._measure(batch, "test")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities ``[b, classes]``; labels, if there are any, are not looked at."""
        input_ids, attention_mask, _ = _unpack(batch)
        return self(input_ids, attention_mask).float().softmax(dim=-1)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The chosen optimizer, warm-up and cosine over the steps of the run."""
        return optimizer_with_schedule(self, self.optimizer_config, self.trainer.estimated_stepping_batches)

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        input_ids, attention_mask, labels = _unpack(batch)
        if labels is None:
            raise ValueError("the batch has no labels: without them there is only predict")
        # On an accelerator the look itself would wait for all that was queued, and cross_entropy stops the run there.
        if labels.device.type == "cpu" and ((labels < 0) | (labels >= self.num_classes)).any():
            raise ValueError(
                f"labels lie in [{int(labels.min())}, {int(labels.max())}], but num_classes={self.num_classes} takes "
                f"0 … {self.num_classes - 1}: number the classes from 0, or build the classifier with more"
            )
        logits = self(input_ids, attention_mask)
        return F.cross_entropy(logits.float(), labels), logits, labels

    def _measure(self, batch: Batch, stage: str) -> None:
        loss, logits, labels = self._evaluate(batch)
        self.log(f"{stage}/loss", loss, batch_size=len(labels), sync_dist=True)
        for name in ("accuracy", "f1"):
            metric: Any = self.metrics[f"{stage}_{name}"]
            metric.update(logits, labels)
            self.log(f"{stage}/{name}", metric, prog_bar=True, batch_size=len(labels))


def _unpack(batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return ids, mask and labels of a batch in either form."""
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise ValueError(f"the batch has {sorted(batch)}; it must have input_ids, labels and maybe attention_mask")
        return batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
    if len(batch) != 3 or batch[0] is None:
        raise ValueError(f"the batch has {len(batch)} parts; it must have input_ids, attention_mask (or None), labels")
    return batch[0], batch[1], batch[2]
