"""A few numbers of every rank, on every rank."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch


def gather_rows(trainer: pl.Trainer, values: Sequence[float]) -> list[list[float]]:
    """One row of numbers a rank. Collective, and one read of the host.

    Args:
        trainer: Whose strategy is asked.
        values: As many on all ranks.
    """
    device = trainer.strategy.root_device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    own = torch.tensor(values, dtype=dtype, device=device)
    if trainer.world_size == 1:
        return [list(values)]
    rows: list[list[float]] = trainer.strategy.all_gather(own).reshape(-1, len(values)).tolist()
    return rows


def replicas_of(trainer: pl.Trainer) -> int:
    """How many replicas of the model there are: several ranks may share one, and its batch.

    Args:
        trainer: Whose strategy is asked.
    """
    shares = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return int(shares.get("num_replicas", trainer.world_size))


def mean(values: Sequence[float]) -> float:
    """Of those that are known; NaN if none is.

    Args:
        values: NaN for unknown.
    """
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")
