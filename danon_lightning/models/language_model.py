"""LightningModules that train an attention model to predict the next byte."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from danon_lightning.attention import AttentionConfig, AttentionModel, detach_state
from danon_lightning.models.metrics import BitsPerByte
from danon_lightning.models.optimization import OptimizerConfig, optimizer_with_schedule
from danon_lightning.models.settings import build_config
from danon_lightning.models.text import TextGeneration
from danon_lightning.models.truncation import sum_with_gradients


class LanguageModel(TextGeneration):
    """Next-symbol prediction with one of the attention models; subclasses say which.

    A batch is a long tensor ``[b, n + 1]``: symbols 0 … n−1 are the input, 1 … n what is to be predicted.

    Keys logged:
        ``train/loss`` (nats), ``train/bits_per_byte`` of each step on rank 0; ``val/loss``, ``val/bits_per_byte`` over
        the whole validation set of all ranks; ``test/…`` likewise.

    Args:
        config: The model's config, or its fields as a mapping.
        optimizer: How it is optimized, or its fields as a mapping.
        chunk_length: If given, batches are worked on in chunks of so many symbols, through the streaming form, and
            gradients are truncated at their borders: backpropagation through time for long documents. The loss stays
            the same, since a chunk sees through the state what the parallel form would let it see (with UCSA as long
            as its cache holds all blocks); but it sends no gradient there. Activations are held for one chunk at a
            time, beside the state and one copy of all gradients (``models/truncation.py`` says how, and why not to use
            it with float16).
            Models that stream without end take batches longer than ``max_sequence_length``.

    Raises:
        ValueError: If a field is unknown or out of range, or the model is not causal.

    Reference:
        Williams and Peng, "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network
        Trajectories", Neural Computation 2, 1990.
    """

    model_class: ClassVar[type[AttentionModel]]
    config_class: ClassVar[type[AttentionConfig]]

    def __init__(
        self,
        config: AttentionConfig | Mapping[str, Any] | None = None,
        optimizer: OptimizerConfig | Mapping[str, Any] | None = None,
        chunk_length: int | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        self.config = build_config(self.config_class, config, "config")
        self.optimizer_config = build_config(OptimizerConfig, optimizer, "optimizer")
        if not self.config.causal:
            raise ValueError("causal=False cannot be trained to predict the next symbol, which it would see")
        if chunk_length is not None and (not isinstance(chunk_length, int) or chunk_length < 1):
            raise ValueError(
                f"chunk_length={chunk_length!r} must be an integer of at least 1, or None for whole batches"
            )
        self.chunk_length = chunk_length
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters(
            {
                "config": asdict(self.config),
                "optimizer": asdict(self.optimizer_config),
                "chunk_length": chunk_length,
            }
        )
        self.model = self.model_class(self.config)
        self.head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=self.config.initializer_range)
        self.val_bits_per_byte = BitsPerByte()
        self.test_bits_per_byte = BitsPerByte()

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``[b, n, vocabulary]`` of the symbol after each of ``input_ids [b, n]``."""
        logits: Tensor = self.head(self.model(input_ids, attention_mask, output_details=()).last_hidden_state)
        return logits

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``tokens [b, n + 1]``, a scalar."""
        if self.chunk_length is not None:
            return sum_with_gradients(self.chunk_losses(tokens, self.chunk_length), self.parameters())
        return _cross_entropy(self(tokens[:, :-1]), tokens[:, 1:], "mean")

    def chunk_losses(self, tokens: Tensor, chunk_length: int, *, detach: bool = True) -> Iterator[Tensor]:
        """The loss in parts, each made when it is asked for.

        Args:
            tokens: Long ``[b, n + 1]``.
            chunk_length: Symbols of the input in a chunk; the last one may have fewer.
            detach: Whether gradients end at the borders of chunks. Otherwise the sum of the parts has the gradients of
                the parallel form.

        Returns:
            Scalars in nats that add up to the mean cross-entropy over all symbols.
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        state = self.model.init_state(len(tokens))
        for chunk, wanted in zip(inputs.split(chunk_length, 1), targets.split(chunk_length, 1), strict=True):
            output = self.model(chunk, state=state, output_details=())
            state = detach_state(output.state) if detach else output.state
            yield _cross_entropy(self.head(output.last_hidden_state), wanted, "sum") / targets.numel()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch ``[b, n + 1]``."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/bits_per_byte", loss.detach() / math.log(2), prog_bar=True)
        return loss

    def reads_between_steps(self, trainer: Any) -> bool:
        """Never looks at weights or gradients between the backward pass and the next forward pass."""
        return False

    @override
    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """Move on what follows the course of training."""
        self.model.finish_step(self.global_step)

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """One batch ``[b, n + 1]``."""
        self._measure(batch, "val", self.val_bits_per_byte)

    @override
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """One batch ``[b, n + 1]``."""
        self._measure(batch, "test", self.test_bits_per_byte)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The chosen optimizer, warm-up and cosine over the steps of the run."""
        return optimizer_with_schedule(self, self.optimizer_config, self.trainer.estimated_stepping_batches)

    def _measure(self, batch: Tensor, stage: str, bits_per_byte: BitsPerByte) -> None:
        loss = self.loss(batch)
        bits_per_byte.update(loss, batch[:, 1:].numel())
        self.log(f"{stage}/loss", loss, batch_size=len(batch), sync_dist=True)
        self.log(f"{stage}/bits_per_byte", bits_per_byte, prog_bar=True)


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """In nats, of logits ``[b, n, vocabulary]`` and targets ``[b, n]``; in float32 at least."""
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.flatten(), reduction=reduction)
