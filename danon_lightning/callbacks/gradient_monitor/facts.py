"""What has to be known of a Trainer."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor


def may_clip(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether gradients may be changed after the hook before the step."""
    hooks = ("configure_gradient_clipping", "on_before_optimizer_step")
    return bool(trainer.gradient_clip_val) or any(is_overridden(hook, module) for hook in hooks)


def loss_scaler(trainer: pl.Trainer) -> "torch.amp.GradScaler | None":
    """The scaler of 16-bit training, if there is one at work."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def loss_scale(trainer: pl.Trainer) -> Tensor | None:
    """The factor of the loss, still on the device."""
    scaler = loss_scaler(trainer)
    return None if scaler is None else scaler.scale(torch.ones((), device=trainer.strategy.root_device))


def samples_of(batch: Any) -> int:
    """How many there are in a batch; 0 if that cannot be told."""
    try:
        return int(extract_batch_size(batch))
    except Exception:  # of any kind, for batches may be of any kind
        return 0
