"""What the gradient memory of all ranks becomes in a checkpoint, and back.

Two forms. The *mean* form has one model copy of each thing: residuals (workers' and servers') summed over all ranks,
which is N times their mean, and what the averaged gradient is still owed. It is valid for any later number of ranks,
since that sum is all that matters for what will have been applied to the weights in the end. The *per-rank* form has
the memory of each rank, and makes a run on the same layout go on to the bit as if it had not been interrupted.
"""

import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from danon_lightning.strategies.communication.compressors.base import Region
from danon_lightning.strategies.communication.memory import Memory, Owed

_VERSION = 1
_CHUNK_BYTES = 32 << 20
_MEAN_KINDS: tuple[Owed, ...] = ("residual", "momentum", "dense_momentum")

State = dict[str, Any]


def rank_state(memory: Memory) -> State:
    """What this rank remembers, as tensors, numbers and strings only."""
    return {
        "step": memory.step,
        "residual": {_key(role, region): tensor for role, region, tensor in memory.items("residual")},
        "momentum": {_key(role, region): tensor for role, region, tensor in memory.items("momentum")},
        "state": {_key(role, region): state for role, region, state in memory.states()},
    }


def gather_state(
    memory: Memory, layout: Sequence[int], group: dist.ProcessGroup | None, *, per_rank: bool
) -> State | None:
    """Collect the memory of all ranks on rank 0, one rank at a time. Collective.

    Args:
        memory: This rank's.
        layout: Sizes of the inner and the outer level, and of a pipeline.
        group: All ranks; None for one alone.
        per_rank: Which of the two forms.

    Returns:
        The state on rank 0, None on the others.
    """
    if memory.pending is not None:  # nothing has happened since it was loaded
        is_first = group is None or dist.get_rank(group) == 0
        return {**_head(memory, layout), "mean": _to(memory.pending, torch.device("cpu"))} if is_first else None
    states = _receive_all(rank_state(memory), group)
    if group is not None and dist.get_rank(group) != 0:
        for _ in states:
            pass
        return None
    head = _head(memory, layout)
    if per_rank:
        return {**head, "ranks": list(states)}
    return {**head, "mean": _sum_up(states)}


def dense_state(layout: Sequence[int], rank: int) -> State | None:
    """The same where gradients are dense at present: nothing is owed."""
    mean: State = {**{kind: {} for kind in _MEAN_KINDS}, "state": {}}
    head = {"version": _VERSION, "compressor": None, "layout": list(layout), "step": 0}
    return {**head, "mean": mean} if rank == 0 else None


def has_residual(state: State) -> bool:
    """Whether a state says that something is owed."""
    if state.get("version") != _VERSION:
        return True  # nobody knows
    states = state["ranks"] if "ranks" in state else [state["mean"]]
    return any(bool(tensor.any()) for one in states for tensor in one["residual"].values())


def _head(memory: Memory, layout: Sequence[int]) -> State:
    return {"version": _VERSION, "compressor": memory.compressor.name, "layout": list(layout), "step": memory.step}


def restore_state(
    memory: Memory,
    state: State,
    regions: set[Region],
    layout: Sequence[int],
    rank: int,
    device: torch.device,
) -> bool:
    """Set a memory from a checkpoint.

    Args:
        memory: A fresh one.
        state: What :func:`gather_state` returned.
        regions: All that will be exchanged, whichever rank codes it.
        layout: The same now.
        rank: Global rank of this process.
        device: Where the memory is to lie.

    Returns:
        Whether this rank goes on to the bit as before.

    Raises:
        ValueError: If the state is of another version, or a parameter is missing or of another size.
    """
    if state.get("version") != _VERSION:
        raise ValueError(
            f"the checkpoint's gradient memory has version {state.get('version')!r}, expected {_VERSION}: "
            "delete its entry to start with empty residuals"
        )
    memory.step = int(state["step"])
    mean = _sum_up(state["ranks"]) if "ranks" in state else state["mean"]
    for kind in _MEAN_KINDS:
        for name, total in mean[kind].items():
            _check(name, total, memory.numels)
    head = _head(memory, layout)
    alike = all(state[key] == head[key] for key in ("compressor", "layout"))
    if "ranks" in state and alike and _regions_of(state["ranks"]) <= regions:
        _restore_own(memory, state["ranks"][rank], device)
        return True
    memory.pending = mean
    if memory.feedback is None and rank == 0 and any(bool(total.any()) for total in mean["residual"].values()):
        warnings.warn(
            "error feedback is off, so what earlier steps have left out is lost: error_feedback=True keeps it",
            stacklevel=3,
        )
    for kind in _MEAN_KINDS:
        for name, total in mean[kind].items():
            memory.owe(kind, name, total)
    if state["compressor"] == memory.compressor.name:
        for key, own_state in mean["state"].items():
            memory.owed_states[_parse(key)] = _to(own_state, device)
    return False


def _regions_of(states: Iterable[State]) -> set[Region]:
    return {_parse(key)[1] for state in states for kind in ("residual", "momentum", "state") for key in state[kind]}


def _restore_own(memory: Memory, state: State, device: torch.device) -> None:
    for kind in ("residual", "momentum", "state"):
        for key, value in state[kind].items():
            memory.restore(*_parse(key), **{kind: _to(value, device)})


def _sum_up(states: Iterable[State]) -> State:
    """The mean form. The first rank's memory is the first to come."""
    mean: State = {"residual": {}, "momentum": {}, "dense_momentum": {}, "state": {}}
    for state in states:
        for kind in ("residual", "momentum"):
            for key, tensor in state[kind].items():
                role, region = _parse(key)
                if role != "dense":
                    _accumulate(mean[kind], region, tensor)
                elif region.parameter not in mean["dense_momentum"]:  # alike on all ranks that have it
                    mean["dense_momentum"][region.parameter] = tensor.clone()
        # Alike on all ranks that exchange a region, or (a threshold) a good start for any of them.
        for key, own_state in state["state"].items():
            if _parse(key)[0] == "worker":
                mean["state"].setdefault(key, own_state)
    return mean


def _accumulate(totals: dict[str, Tensor], region: Region, tensor: Tensor) -> None:
    total = totals.get(region.parameter, torch.zeros(0))
    if len(total) < region.stop:  # regions come in any order, and none says how long the parameter is
        total = torch.nn.functional.pad(total, (0, region.stop - len(total)))
    total[region.start : region.stop] += tensor
    totals[region.parameter] = total


def _check(name: str, tensor: Tensor, numels: dict[str, int]) -> None:
    if numels.get(name) != tensor.numel():
        raise ValueError(
            f"the checkpoint's gradient memory has {tensor.numel()} elements for {name}, but the model has "
            f"{numels.get(name, 'no such parameter')}: it belongs to another model"
        )


def _receive_all(own: State, group: dist.ProcessGroup | None) -> Iterator[State]:
    """On rank 0, the states of all ranks in order; elsewhere, this rank's is sent and nothing comes."""
    if group is None:
        yield _to(own, torch.device("cpu"))
        return
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    blob = _pack(own) if rank else torch.empty(0, dtype=torch.uint8)
    mine = torch.tensor([blob.numel()], dtype=torch.int64, device=device)
    lengths = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(lengths, mine, group=group)
    if rank:
        for chunk in blob.split(_CHUNK_BYTES):
            dist.send(chunk.to(device), 0, group=group)
        return
    yield _to(own, torch.device("cpu"))
    for peer in range(1, size):
        received = torch.empty(int(lengths[peer]), dtype=torch.uint8)
        for chunk in received.split(_CHUNK_BYTES):
            buffer = chunk.to(device)
            dist.recv(buffer, peer, group=group)
            chunk.copy_(buffer)
        yield torch.load(io.BytesIO(received.numpy().tobytes()), weights_only=True, map_location="cpu")


def _pack(state: State) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _to(value: Any, device: torch.device) -> Any:
    """A copy on another device."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value


def _key(role: str, region: Region) -> str:
    return f"{role} {region.start} {region.stop} {region.parameter}"


def _parse(key: str) -> tuple[str, Region]:
    role, start, stop, parameter = key.split(" ", 3)
    return role, Region(parameter, int(start), int(stop))
