"""What cannot work with pipeline stages, said before anything is trained."""

from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer

from danon_lightning.strategies.pipeline.absent import Absent


def check_trainer(trainer: pl.Trainer, *, syncs_batch_norm: bool) -> None:
    """Look at a module, and at the callbacks of its Trainer.

    Args:
        trainer: About to do something with its module.
        syncs_batch_norm: Whether it has been asked to.

    Raises:
        MisconfigurationException: If something cannot work.
    """
    module = trainer.lightning_module
    if trainer.state.fn == TrainerFn.FITTING and not module.automatic_optimization:
        raise MisconfigurationException(
            f"pipeline stages need automatic optimization, but {type(module).__name__} sets "
            "automatic_optimization=False: its training_step would call backward() on ranks that have no loss"
        )
    if syncs_batch_norm or any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        raise MisconfigurationException(
            "SyncBatchNorm (sync_batchnorm=True) talks to all ranks, but those of a pipeline run different layers: use "
            "BatchNorm, which sees the micro-batches of one replica, or another norm"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise MisconfigurationException(
                f"{type(callback).__name__} copies the whole module, of which a rank of a pipeline holds a part only: "
                "remove it, or train with pipeline_parallel_size=1"
            )


def check_whole(module: pl.LightningModule) -> None:
    """Look for what another Trainer has left on other ranks.

    Raises:
        ValueError: If there is any.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(tensor, Absent):
            raise ValueError(
                f"{name} of {type(module).__name__} is on another rank: the module has been trained with pipeline "
                "stages by another Trainer. Use that one, or load a checkpoint into a new module"
            )


def check_optimizers(optimizers: Iterable[Optimizer], scaler: torch.amp.GradScaler | None) -> None:
    """Look at the optimizers.

    Args:
        optimizers: Of the module.
        scaler: Scales the loss, in half precision.

    Raises:
        MisconfigurationException: If one of them cannot work.
    """
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                f"{name} decides by its own parameters how often it runs a step, but a rank of a pipeline has some of "
                "them only: take another optimizer"
            )
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise MisconfigurationException(
                f"a fused {name} looks for overflows by itself, on each rank alone: set fused=False, or take "
                "precision='bf16-mixed'"
            )
