"""An optimizer with sensible parameter groups, and a warm-up followed by a cosine."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import nn

from danon_lightning.optim import OneBitAdam

_OPTIMIZERS = ("adamw", "sgd", "onebit_adam")


@dataclass(kw_only=True)
class OptimizerConfig:
    """How a model is optimized.

    Args:
        name: "adamw"; "sgd"; or "onebit_adam", AdamW whose momentum can be compressed to one bit.
        learning_rate: Peak learning rate.
        weight_decay: Decay of the weights of linear layers, decoupled (but added to the gradient with "sgd"); nothing
            else is decayed, neither biases, gains and embeddings (nor a linear layer that shares its weight with one)
            nor filters and maps that start as the identity.
        beta1: Decay of the mean of the gradient (not with "sgd").
        beta2: Decay of its mean square (not with "sgd").
        momentum: Momentum of "sgd".
        freeze_step: For "onebit_adam": steps after which the mean square is frozen. None for three times
            ``warmup_steps``.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from near zero.
        final_learning_rate: What the cosine ends at, as a fraction of the peak.

    Raises:
        ValueError: For a value out of range, naming it.
    """

    name: str = "adamw"
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.9
    freeze_step: int | None = None
    warmup_steps: int = 20
    final_learning_rate: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.name not in _OPTIMIZERS:
            raise ValueError(f"name={self.name!r} must be one of: {', '.join(map(repr, _OPTIMIZERS))}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if self.freeze_step is not None and self.freeze_step < 1:
            raise ValueError(f"freeze_step={self.freeze_step} must be at least 1, or None")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not be negative")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate={self.final_learning_rate} is a fraction of the peak, in [0, 1]")


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer over the parameters of ``module``, weight decay only for the weights of its linear layers.

    The module that a parameter belongs to decides, not its shape: that of a gain for each head, or of a map that is the
    identity at first, is that of a matrix too, but zero is not where it should go without data.

    Reference:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019 (arXiv:1711.05101).
    """
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    linear -= {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if id(p) in linear]
    rest = [p for p in parameters if id(p) not in linear]
    both = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in both if group["params"]]
    betas = (config.beta1, config.beta2)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    if config.name == "onebit_adam":
        freeze_step = config.freeze_step or max(1, 3 * config.warmup_steps)
        return OneBitAdam(groups, lr=config.learning_rate, betas=betas, freeze_step=freeze_step)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas)


def warmup_cosine(config: OptimizerConfig, total_steps: float) -> Callable[[int], float]:
    """Factor of the learning rate at each optimizer step, for ``torch.optim.lr_scheduler.LambdaLR``.

    Args:
        config: Gives ``warmup_steps`` and ``final_learning_rate``.
        total_steps: Steps of the whole run; where it is infinite the rate stays at its peak after the warm-up.

    Reference:
        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017 (arXiv:1608.03983).
    """

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if math.isinf(total_steps):
            return 1.0
        progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
        low = config.final_learning_rate
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def optimizer_with_schedule(module: nn.Module, config: OptimizerConfig, total_steps: float) -> OptimizerLRScheduler:
    """What ``configure_optimizers`` of a LightningModule returns: the optimizer, warm-up and cosine over the run.

    Args:
        module: Whose parameters are optimized.
        config: How.
        total_steps: Optimizer steps of the whole run, ``trainer.estimated_stepping_batches``.
    """
    optimizer = build_optimizer(module, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(config, total_steps))
    # The name puts it beside the loss in the logs: TensorBoard opens with only the first groups of tags unfolded.
    schedule: LRSchedulerConfigType = {"scheduler": scheduler, "interval": "step", "name": "train/learning_rate"}
    return {"optimizer": optimizer, "lr_scheduler": schedule}
