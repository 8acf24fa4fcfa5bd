"""The 2-norm of all gradients together, also where each rank of a pipeline holds some of them."""

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from danon_lightning.callbacks.ranks import gather_tensors

# Each rank has pieces of gradients, in forms of their own.
_SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)

_ABSENT = -1.0


def has_whole_gradients(trainer: pl.Trainer) -> bool:
    """Whether each rank has gradients of whole parameters.

    Args:
        trainer: Whose strategy is asked.
    """
    return not isinstance(trainer.strategy, _SHARDED)


def squared_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Of the gradient of each parameter, −1 where there is none: [len(parameters)], float32. Reads nothing back.

    Args:
        parameters: All on one device.
    """
    groups: dict[torch.dtype, tuple[list[int], list[Tensor]]] = {}
    for index, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            gradient = gradient.coalesce().values()
        indices, gradients = groups.setdefault(gradient.dtype, ([], []))
        indices.append(index)
        gradients.append(gradient)
    if not groups:
        return torch.full((len(parameters),), _ABSENT)
    places: list[int] = []
    found: list[Tensor] = []
    for indices, gradients in groups.values():
        places += indices
        found += [norm.float() for norm in torch._foreach_norm(gradients)]
    norms = torch.stack(found)
    whole = norms.new_full((len(parameters),), _ABSENT)
    whole[torch.tensor(places, device=norms.device)] = norms.square()
    return whole


def global_norm(trainer: pl.Trainer, squares: Tensor) -> float:
    """Over all parameters, each counted once. Collective if the strategy has pipeline stages; one read of the host.

    Args:
        trainer: Whose strategy is asked.
        squares: From :func:`squared_norms`, of all parameters of the module in their order, on every rank.
    """
    mesh: Any = getattr(trainer.strategy, "mesh", None)
    if getattr(mesh, "pipeline_parallel_size", 1) > 1:
        squares = squares.to(trainer.strategy.root_device)
        every = gather_tensors(squares)
        rows = torch.stack([every[rank] for rank in mesh.ranks_of_replica(0)])
        # What several stages share (tied embeddings) has the same gradient on all of them.
        holders = (rows != _ABSENT).long().argmax(dim=0, keepdim=True)
        squares = rows.gather(0, holders).squeeze(0)
    present = squares != _ABSENT
    norm = torch.where(present, squares, 0.0).sum().sqrt()
    return float(torch.where(present.any(), norm, math.nan))
