"""Undoing what a trial run changes in a module."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from danon_lightning.strategies.pipeline.torch_internals import tensor_dictionaries


@contextmanager
def restored(root: nn.Module) -> Iterator[None]:
    """Restore the attributes of a module and of all its submodules at the end.

    Inside, tensors that are attributes or buffers are copies, so that what is written into them is forgotten as well.
    Lists, dictionaries and sets get their former elements back; other objects that the run changes stay changed.
    Parameters are neither copied nor looked at.
    """
    modules = list(root.modules())
    attributes = [dict(module.__dict__) for module in modules]
    containers = [(value, value.copy()) for kept in attributes for value in kept.values() if _is_container(value)]
    copies: dict[int, Tensor] = {}
    for module in modules:
        parameters, buffers = tensor_dictionaries(module)
        for key, value in list(module.__dict__.items()):
            if isinstance(value, Tensor):
                module.__dict__[key] = _copy(value, copies)
            elif value is not parameters and (value is buffers or _is_container(value)):
                _copy_elements(value, copies)
    try:
        yield
    finally:
        for module, kept in zip(modules, attributes, strict=True):
            module.__dict__.clear()
            module.__dict__.update(kept)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


def _is_container(value: object) -> bool:
    return isinstance(value, (list, dict, set)) and hasattr(value, "copy")


def _copy_elements(container: Any, copies: dict[int, Tensor]) -> None:
    if isinstance(container, dict):
        elements = list(container.items())
    elif isinstance(container, list):
        elements = list(enumerate(container))
    else:
        return
    for key, value in elements:
        if isinstance(value, Tensor):
            container[key] = _copy(value, copies)


def _copy(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    """A copy, the same one for every place of a tensor. Results of earlier steps, which have a graph, lose it."""
    if id(tensor) not in copies:
        copies[id(tensor)] = tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
    return copies[id(tensor)]
