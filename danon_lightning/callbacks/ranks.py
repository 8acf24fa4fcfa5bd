"""What all ranks have to say, on every rank. Nothing that travels is ever unpickled."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor


def gather_tensors(tensor: Tensor) -> list[Tensor]:
    """One tensor of every rank, all of one shape and dtype. Collective in the default process group, if there is one.

    Args:
        tensor: Where the group can send it from.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return found


def gather_texts(text: bytes, device: torch.device) -> list[bytes]:
    """One text of every rank. Collective in the default process group, if there is one.

    Args:
        text: Of any length.
        device: That of this rank; the memory of the host serves where the group cannot send from elsewhere.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        device = torch.device("cpu")
    lengths = [int(length) for length in gather_tensors(torch.tensor([len(text)], device=device))]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else 0
    texts = gather_tensors(padded.to(device))
    return [part[:length].cpu().numpy().tobytes() for part, length in zip(texts, lengths, strict=True)]


def gather_numbers(trainer: pl.Trainer, values: Sequence[float]) -> list[list[float]]:
    """One row of numbers a rank. Collective, and one read of the host.

    Args:
        trainer: Whose strategy is asked for the device.
        values: As many on all ranks.
    """
    device = trainer.strategy.root_device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack(gather_tensors(torch.tensor(values, dtype=dtype, device=device))).tolist()


def replicas_of(trainer: pl.Trainer) -> int:
    """How many replicas of the model there are: several ranks may share one, and its batch.

    Args:
        trainer: Whose strategy is asked.
    """
    shares = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return int(shares.get("num_replicas", trainer.world_size))
