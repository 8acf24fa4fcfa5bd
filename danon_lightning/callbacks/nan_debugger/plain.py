"""Nested containers as tensors and plain data, which ``torch.load(weights_only=True)`` reads, and back.

What is read back has the same shape, without importing anybody's classes: a named tuple becomes one of the same name
and fields, a dataclass an object with the same attributes, another mapping a dict whose keys are attributes as well.
"""

from collections import namedtuple
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from lightning.fabric.utilities.data import AttributeDict
from torch import Tensor

from danon_lightning.callbacks.nan_debugger.values import components

_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class NotPlainError(ValueError):
    """Something that plain data cannot express."""


def to_plain(tree: Any, path: str = "batch") -> tuple[str, Any]:
    """Express a tree by pairs of a kind and plain data. Tensors are copied to the CPU.

    Args:
        tree: Tensors, arrays, numbers and strings in lists, tuples, mappings and dataclasses.
        path: What the tree is called in errors.

    Raises:
        NotPlainError: Where in the tree there is something else.
    """
    if isinstance(tree, Tensor):
        return "tensor", plain_tensor(tree, path)
    if isinstance(tree, numpy.ndarray) and tree.dtype.kind in "biufc":
        return "array", torch.from_numpy(tree.copy())
    if isinstance(tree, numpy.generic):
        return to_plain(tree.item(), path)
    if type(tree) in _NUMBERS:
        return "value", tree
    if isinstance(tree, Mapping):
        kind = "dict" if isinstance(tree, dict) and type(tree).__module__ in ("builtins", "collections") else "mapping"
        return kind, [
            (to_plain(key, f"a key of {path}"), to_plain(one, f"{path}[{key!r}]")) for key, one in tree.items()
        ]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return "namedtuple", (type(tree).__name__, _named(tree, tree._fields, path))
    if type(tree) in (list, tuple, torch.Size):
        kind = "list" if type(tree) is list else "tuple"
        return kind, [to_plain(one, f"{path}[{index}]") for index, one in enumerate(tree)]
    if is_dataclass(tree) and not isinstance(tree, type):
        return "object", _named(tree, tuple(field.name for field in fields(tree)), path)
    raise NotPlainError(
        f"{path} is of {type(tree).__module__}.{type(tree).__qualname__}: only tensors, arrays, numbers and strings in "
        "lists, tuples, mappings and dataclasses can be written"
    )


def from_plain(pair: tuple[str, Any], device: torch.device | None = None) -> Any:
    """The inverse of :func:`to_plain`.

    Args:
        pair: What it has returned.
        device: Where tensors go; None for the CPU.

    Raises:
        NotPlainError: If it is nothing of the kind.
    """
    try:
        kind, data = pair
        if kind == "tensor":
            return data.to(device)
        if kind == "array":
            return data.numpy()
        if kind == "value":
            return data
        if kind in ("dict", "mapping"):
            made = {from_plain(key): from_plain(one, device) for key, one in data}
            return made if kind == "dict" else AttributeDict(made)
        if kind in ("list", "tuple"):
            found = [from_plain(one, device) for one in data]
            return found if kind == "list" else tuple(found)
        if kind == "namedtuple":
            name, named = data
            return namedtuple(name, [key for key, _ in named])(*(from_plain(one, device) for _, one in named))
        if kind == "object":
            return SimpleNamespace(**{key: from_plain(one, device) for key, one in data})
    except (TypeError, ValueError, AttributeError) as error:
        raise NotPlainError(f"this is not what a bundle holds: {error}") from error
    raise NotPlainError(f"a bundle holds nothing of kind {kind!r}")


def plain_tensor(tensor: Tensor, path: str = "") -> Tensor:
    """A tensor on the CPU that holds its values and nothing else, not the rest of a storage that it is a view of.

    Of a sharded tensor it is the part on this rank.

    Raises:
        NotPlainError: If its values cannot be looked at.
    """
    local = getattr(tensor, "_local_tensor", tensor)
    parts = list(components(local))
    if len(parts) != 1:
        raise NotPlainError(f"{path} is a {type(tensor).__name__} whose values are not on this rank, or not one tensor")
    plain = local if local.layout != torch.strided else parts[0]
    plain = plain.detach().cpu()
    if plain.layout == torch.strided and plain.untyped_storage().nbytes() != plain.numel() * plain.element_size():
        plain = plain.clone(memory_format=torch.contiguous_format)
    return plain


def size_of(tree: Any) -> int:
    """The bytes of all tensors in a tree, without copying any; of other data a rough estimate."""
    if isinstance(tree, Tensor):
        return sum(part.numel() * part.element_size() for part in components(tree))
    if isinstance(tree, numpy.ndarray):
        return int(tree.nbytes)
    if isinstance(tree, (str, bytes)):
        return len(tree)
    if isinstance(tree, Mapping):
        return sum(64 + size_of(key) + size_of(one) for key, one in tree.items())
    if isinstance(tree, (list, tuple)):
        return sum(32 + size_of(one) for one in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return sum(size_of(getattr(tree, field.name)) for field in fields(tree))
    return 16


def _named(tree: Any, names: tuple[str, ...], path: str) -> list[tuple[str, Any]]:
    return [(name, to_plain(getattr(tree, name), f"{path}.{name}")) for name in names]
