"""Leaves a module as it was, whatever is tried with it in between."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from danon_lightning.callbacks.nan_debugger.sources import attributes
from danon_lightning.callbacks.nan_debugger.values import components, tensors_in

_CONTAINERS = (list, dict, OrderedDict, set, deque)
_DEPTH = 4


class KeptValues:
    """Keeps what is in tensors from before, when and only when something is about to write into them."""

    def __init__(self, module: nn.Module, batch: Any = None) -> None:
        """Take note of which tensors are to be kept, without copying any.

        Args:
            module: Its parameters, buffers, and tensors in attributes.
            batch: The tensors of a batch.
        """
        tensors = [*module.parameters(), *module.buffers(), *(one for _, one in attributes(module))]
        tensors += [one for _, one in tensors_in(batch)]
        self._parts = {part.untyped_storage()._cdata: part for one in tensors for part in components(one)}
        self._copies: dict[int, torch.UntypedStorage] = {}

    def before_writes(self, written: Sequence[Tensor]) -> None:
        """Copy what is about to be written."""
        for tensor in written:
            for part in components(tensor):
                key = part.untyped_storage()._cdata
                if key in self._parts and key not in self._copies:
                    self._copies[key] = part.untyped_storage().clone()

    def restore(self) -> None:
        """Write it back."""
        for key, copy in self._copies.items():
            self._parts[key].untyped_storage().copy_(copy)


@contextmanager
def preserved(module: pl.LightningModule) -> Iterator[None]:
    """Restore attributes of all modules, flags of parameters, and their gradients, which are None inside.

    Attributes are restored to the same objects, lists, dicts and sets among them to the same contents. What other
    objects hold inside is not. Values of tensors are a matter of :class:`KeptValues`.
    """
    attributes_before = [(vars(one), dict(vars(one))) for one in module.modules()]
    contents: dict[int, tuple[Any, Any]] = {}
    for _, values in attributes_before:
        for value in values.values():
            _note_contents(value, contents, _DEPTH)
    parameters = [(one, one.grad, one.requires_grad) for one in module.parameters()]
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for now, before in attributes_before:
            if not _same(now, before):
                now.clear()
                now.update(before)
        for container, before in contents.values():
            _refill(container, before)
        for parameter, gradient, requires in parameters:
            parameter.requires_grad_(requires)
            parameter.grad = gradient


@contextmanager
def silent(module: pl.LightningModule) -> Iterator[None]:
    """Have a module log and print nothing, also through its loggers."""
    with ExitStack() as stack:
        for one in module.modules():
            for name in ("log", "log_dict", "print") if isinstance(one, pl.LightningModule) else ():
                stack.enter_context(replaced(one, name, lambda *args, **kwargs: None))
        trainer = module._trainer
        if trainer is not None and trainer.loggers:
            stack.callback(setattr, trainer, "loggers", trainer.loggers)
            trainer.loggers = [DummyLogger()]
        yield


@contextmanager
def replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Give a module another method."""
    before = vars(module).get(name)
    vars(module)[name] = function
    try:
        yield
    finally:
        vars(module).pop(name, None)
        if before is not None:
            vars(module)[name] = before


def _note_contents(value: Any, contents: dict[int, tuple[Any, Any]], depth: int) -> None:
    if type(value) not in _CONTAINERS or id(value) in contents or not depth:
        return
    contents[id(value)] = (value, value.copy())
    for one in value.values() if isinstance(value, dict) else value:
        _note_contents(one, contents, depth - 1)


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, dict):
        same = _same(container, before)
    elif isinstance(container, set):
        same = container == before
    else:
        same = len(container) == len(before) and all(one is two for one, two in zip(container, before, strict=True))
    if same:
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(before)
    else:
        container.extend(before)


def _same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """The same keys in the same order, with the same objects."""
    return list(one) == list(other) and all(one[key] is other[key] for key in one)
