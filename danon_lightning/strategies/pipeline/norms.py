"""Decisions about gradients that the ranks of a pipeline must take together: clipping, and overflow."""

from collections.abc import Callable, Collection

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from danon_lightning.strategies.pipeline.torch_internals import overflow_flags


def clip_by_total_norm(
    optimizer: Optimizer, max_norm: float, counted: Collection[int], group: dist.ProcessGroup, device: torch.device
) -> None:
    """Clip by the norm of all gradients, wherever they are. Collective.

    Args:
        optimizer: Has the parameters.
        max_norm: What the norm shall not exceed.
        counted: The ``id`` of each parameter that this rank is to count.
        group: The ranks of the pipeline.
        device: Where these communicate.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [parameter.grad for parameter in parameters if id(parameter) in counted]
    square = torch.zeros((), dtype=torch.float64, device=device)
    for norm in torch._foreach_norm(gradients) if gradients else ():
        square += norm.double().square()
    dist.all_reduce(square, group=group)
    if parameters:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, square.sqrt())


def agreeing_on_overflow(scaler: torch.amp.GradScaler, device: torch.device) -> Callable[[Optimizer], None]:
    """What to put in the place of ``unscale_``, so that a scaler skips a step everywhere if it must anywhere.

    Args:
        scaler: Of this rank.
        device: Where ranks communicate.
    """
    unscale = type(scaler).unscale_.__get__(scaler)

    def unscale_(optimizer: Optimizer) -> None:
        unscale(optimizer)
        found = overflow_flags(scaler, optimizer)
        flag = torch.stack([one.to(device) for one in found.values()] or [torch.zeros((), device=device)]).max()
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        for one in found.values():
            one.copy_(flag)
        found.setdefault(device, flag)

    return unscale_
