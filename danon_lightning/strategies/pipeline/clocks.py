"""What the clocks of ranks have in common: on several machines, each begins to count when it likes."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

_ROUND_TRIPS = 16


def now() -> float:
    """Seconds on the clock of this rank."""
    return time.perf_counter()


def clock_offset(group: dist.ProcessGroup, device: torch.device) -> float:
    """By how many seconds the clock of this rank is ahead of that of the first one of a group. Collective.

    As in NTP (RFC 5905) the first rank asks each other one for the time, again and again, and takes it that the answer
    was given in the middle between question and arrival. That is wrong by half of the round trip at most, so the
    shortest one is believed.

    Args:
        group: The ranks.
        device: Where these move tensors.
    """
    rank = dist.get_rank(group)
    offsets = torch.zeros(dist.get_world_size(group), dtype=torch.float64, device=device)
    message = torch.zeros(1, dtype=torch.float64, device=device)
    for other in range(1, len(offsets)):
        if rank == 0:
            offsets[other] = _ask(other, message, group)
        elif rank == other:
            _answer(message, group)
    dist.broadcast(offsets, group=group, group_src=0)
    return float(offsets[rank])


def _ask(other: int, message: Tensor, group: dist.ProcessGroup) -> float:
    found = []
    for _ in range(_ROUND_TRIPS):
        asked = now()
        dist.send(message, group=group, group_dst=other)
        dist.recv(message, group=group, group_src=other)
        theirs = float(message)  # on CUDA this is where the answer has arrived
        arrived = now()
        found.append((arrived - asked, theirs - (asked + arrived) / 2))
    return min(found)[1]


def _answer(message: Tensor, group: dist.ProcessGroup) -> None:
    for _ in range(_ROUND_TRIPS):
        dist.recv(message, group=group, group_src=0)
        float(message)  # on CUDA this is where the question has arrived
        message.fill_(now())
        dist.send(message, group=group, group_dst=0)
