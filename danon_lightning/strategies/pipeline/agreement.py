"""Telling other ranks plain data: JSON and raw tensors, so that nothing received is ever executed."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_Transport = Callable[[Tensor], None]


def broadcast_plain(value: Any, source: int, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Tell all ranks of a group something. Collective.

    Args:
        value: On the source: None, numbers, strings, tensors, and lists, tuples and dictionaries of such; anything else
            where it comes from somewhere else.
        source: Rank in the group that knows it.
        group: The ranks.
        device: Where the group moves tensors.

    Returns:
        A copy of it, with tensors on ``device``; on the source the value itself.

    Raises:
        TypeError: If the value contains anything else.
    """

    def transport(tensor: Tensor) -> None:
        dist.broadcast(tensor, group=group, group_src=source)

    if dist.get_rank(group) == source:
        _send(value, transport, device)
        return value
    return _receive(transport, device)


def send_plain(value: Any, rank: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Tell one rank something (see :func:`broadcast_plain`), which must call :func:`receive_plain`.

    Args:
        value: What.
        rank: In the group.
        group: The ranks.
        device: Where the group moves tensors.
    """
    _send(value, lambda tensor: dist.send(tensor, group=group, group_dst=rank), device)


def receive_plain(rank: int, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Be told something by one rank.

    Args:
        rank: In the group.
        group: The ranks.
        device: Where the group moves tensors.
    """

    def transport(tensor: Tensor) -> None:
        dist.recv(tensor, group=group, group_src=rank)

    return _receive(transport, device)


def _send(value: Any, transport: _Transport, device: torch.device) -> None:
    tensors: list[Tensor] = []
    text = json.dumps(_encode(value, tensors)).encode()
    transport(torch.tensor([len(text)], device=device))
    transport(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device))
    for tensor in tensors:
        if tensor.numel():
            transport(tensor.detach().to(device).contiguous())


def _receive(transport: _Transport, device: torch.device) -> Any:
    length = torch.zeros(1, dtype=torch.int64, device=device)
    transport(length)
    text = torch.empty(int(length), dtype=torch.uint8, device=device)
    transport(text)
    tensors: list[Tensor] = []
    value = _decode(json.loads(text.cpu().numpy().tobytes()), tensors, device)
    for tensor in tensors:
        if tensor.numel():
            transport(tensor)
    return value


def _encode(value: Any, tensors: list[Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(key, tensors), _encode(item, tensors)] for key, item in value.items()]}
    raise TypeError(
        f"a {type(value).__name__} cannot be sent to other ranks: only None, numbers, strings, tensors, and lists, "
        "tuples and dictionaries of them can"
    )


def _decode(code: Any, tensors: list[Tensor], device: torch.device) -> Any:
    if not isinstance(code, dict):
        return code
    ((kind, content),) = code.items()
    if kind == "tensor":
        name, shape = content
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        tensors.append(torch.empty(shape, dtype=dtype, device=device))
        return tensors[-1]
    if kind == "dict":
        return {_decode(key, tensors, device): _decode(item, tensors, device) for key, item in content}
    items = [_decode(item, tensors, device) for item in content]
    return items if kind == "list" else tuple(items)
