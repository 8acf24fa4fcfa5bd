"""Cutting a batch into micro-batches, and putting together what they give."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

# Elements of a tensor that are compared between ranks, about.
_SAMPLED = 4096


def tensors_in(batch: Any) -> list[Tensor]:
    """All tensors of nested containers, also of such as torch does not know (BatchEncoding, dataclasses)."""
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    return tensors


def split_batch(batch: Any, micro_batches: int) -> tuple[list[Any], list[int]]:
    """Cut a batch along its first dimension.

    Args:
        batch: Nested containers of tensors and other things. Tensors whose first dimension is that of the first tensor
            with any are cut; all else goes into every part.
        micro_batches: Into how many parts; fewer, if there are fewer samples.

    Returns:
        The parts, and how many samples each has: as equal as can be, larger ones first.

    Raises:
        ValueError: If no tensor in it has a dimension.
    """
    size = next((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), 0)
    if not size:
        raise ValueError(
            f"a batch of type {type(batch).__name__} has no samples that micro-batches could be made of: it must "
            "contain a tensor whose first dimension counts them"
        )
    count = min(micro_batches, size)
    sizes = [size // count + (index < size % count) for index in range(count)]
    parts = []
    start = 0
    for length in sizes:
        parts.append(apply_to_collection(batch, Tensor, _part, size, start, start + length))
        start += length
    return parts, sizes


def _part(tensor: Tensor, size: int, start: int, stop: int) -> Tensor:
    return tensor[start:stop] if tensor.dim() and len(tensor) == size else tensor


def check_alike(batch: Any, group: dist.ProcessGroup, device: torch.device) -> None:
    """Check that all ranks of a pipeline have the same batch. Collective.

    Args:
        batch: That of this rank.
        group: The ranks of the pipeline.
        device: Where these move tensors.

    Raises:
        ValueError: On all of them, if they have not.
    """
    mine = _fingerprint(batch).to(device)
    prints = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(prints, mine, group=group)
    if any(not torch.equal(other, prints[0]) for other in prints):
        raise ValueError(
            "the ranks of a pipeline have been given different batches, but they work on the same one: a sampler of "
            "your own must be keyed on trainer.strategy.distributed_sampler_kwargs, and draw alike on all ranks "
            "(lightning.seed_everything)"
        )


def _fingerprint(batch: Any) -> Tensor:
    """Two numbers that batches of other shapes or (a sample of) other values hardly share."""
    tensors = tensors_in(batch)
    shapes = repr([(tensor.shape, tensor.dtype) for tensor in tensors]).encode()
    content = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
        content = zlib.crc32(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"", content)
    return torch.tensor([zlib.crc32(shapes), content])


def join_results(results: Sequence[Any], sizes: Sequence[int], weights: Sequence[float]) -> Any:
    """What a step would have returned for the whole batch.

    Args:
        results: What it has returned for each micro-batch.
        sizes: How many samples these have.
        weights: By how much each counts in means.

    Returns:
        Nested containers like them, in which tensors with a row for each sample are joined, and of numbers there is the
        mean. A list of what was returned where that is neither, and not the same for all.
    """
    first = results[0]
    if isinstance(first, Mapping):
        if all(isinstance(one, Mapping) and one.keys() == first.keys() for one in results):
            return {key: join_results([one[key] for one in results], sizes, weights) for key in first}
    elif isinstance(first, (list, tuple)):
        if all(type(one) is type(first) and len(one) == len(first) for one in results):
            joined = [join_results(leaves, sizes, weights) for leaves in zip(*results, strict=True)]
            return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    elif isinstance(first, Tensor):
        if all(one.dim() and len(one) == size for one, size in zip(results, sizes, strict=True)):
            return torch.cat([one.detach() for one in results])
        if all(one.dim() == 0 for one in results):
            return weighted_mean([one.detach() for one in results], weights)
    elif isinstance(first, float):
        return weighted_mean(results, weights)
    elif all(one is first for one in results):
        return first
    elif isinstance(first, (bool, int, str, bytes)) and all(type(one) is type(first) for one in results):
        if all(one == first for one in results):
            return first
    return list(results)


def weighted_mean(values: Sequence[Any], weights: Sequence[float]) -> Any:
    """The mean of numbers, of which some count more than others; if none counts, of all alike."""
    if not any(weights):
        weights = [1.0] * len(values)
    return sum(value * (weight / sum(weights)) for value, weight in zip(values, weights, strict=True))
