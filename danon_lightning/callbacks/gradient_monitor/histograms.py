"""How the elements of gradients are spread."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danon_lightning.callbacks import logs
from danon_lightning.callbacks.gradient_monitor.placement import Placement
from danon_lightning.callbacks.gradient_monitor.tensors import values_of


def write_histograms(
    trainer: pl.Trainer, module: nn.Module, optimizer: Optimizer, placement: Placement, step: int
) -> None:
    """Write one for each watched layer that this rank has and an optimizer is about to change."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    layers: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        place = placement.places.get(name)
        if place is not None and id(parameter) in own and parameter.grad is not None:
            layers.setdefault(placement.layers[place.layer], []).append(values_of(parameter.grad).flatten())
    for layer, gradients in layers.items():
        logs.histogram(trainer, f"grad/histogram/{layer}", torch.cat(gradients), step)
