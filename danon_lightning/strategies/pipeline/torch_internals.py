"""Every name that torch does not document and this package relies on, but for those of ``torch_pipelining``.

Nothing else in the package may touch such names; ``tests/strategies/pipeline/test_torch_internals.py`` fails where
torch has changed one of them.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._device import _device_constructors

TreeSpec = pytree.TreeSpec
flatten = pytree.tree_flatten
unflatten = pytree.tree_unflatten

# What a mode sees of ``tensor.is_meta``.
ASKS_FOR_DATA = Tensor.is_meta.__get__  # type: ignore[attr-defined]

_TensorType = TypeVar("_TensorType", bound=Tensor)
_OF_INSTANCE = ("_call_impl", "_compiled_call_impl")
_REENTRANT = checkpoint.CheckpointFunction.forward.__code__
_CHECKPOINT = inspect.unwrap(checkpoint.checkpoint).__code__


def flatten_with_paths(tree: object) -> dict[str, Any]:
    """The leaves of nested containers by their paths, such as ``[0][1]['mask']``."""
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(tree)[0]}


def make_wrapper(cls: type[_TensorType], meta: Tensor, device: torch.device, requires_grad: bool) -> _TensorType:
    """A tensor of class ``cls``, without storage, with shape, strides and dtype of ``meta``, as if on ``device``."""
    return torch.Tensor._make_wrapper_subclass(
        cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device, requires_grad=requires_grad
    )


def mark_as_parameter(tensor: Tensor) -> None:
    """Make ``isinstance(tensor, nn.Parameter)`` true for a tensor of another class."""
    tensor._is_param = True


def without_torch_function() -> AbstractContextManager[None]:
    """A context in which tensor subclasses are not asked how to carry out a torch function."""
    return torch._C.DisableTorchFunctionSubclass()


def written_arguments(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator changes in place."""
    values: list[Any] = []
    if not func._schema.is_mutable:
        return values
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return [value for value in flatten(values)[0] if isinstance(value, Tensor)]


def returns_written_arguments(func: torch._ops.OpOverload) -> bool:
    """Whether what an operator returns is what it has changed in place."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and r.alias_info.is_write for r in returns)


def draws_random_numbers(func: torch._ops.OpOverload) -> bool:
    """Whether an operator advances a random number generator."""
    return torch.Tag.nondeterministic_seeded in func.tags


def parameter_places(root: nn.Module) -> Iterator[tuple[str, dict[str, Tensor | None], str]]:
    """All places where parameters are kept: full name, the dictionary of the module and the key in it."""
    return _places(root, 0)


def buffer_places(root: nn.Module) -> Iterator[tuple[str, dict[str, Tensor | None], str]]:
    """The same for buffers."""
    return _places(root, 1)


def _places(root: nn.Module, which: int) -> Iterator[tuple[str, dict[str, Tensor | None], str]]:
    for prefix, module in root.named_modules():
        dictionary = tensor_dictionaries(module)[which]
        for key in dictionary:
            yield f"{prefix}.{key}" if prefix else key, dictionary, key


def tensor_dictionaries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """The dictionaries in which a module keeps its own parameters and buffers."""
    return module._parameters, module._buffers


@contextmanager
def calls_replaced(
    modules: Iterable[nn.Module], replace: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Run something else when any of ``modules`` is called.

    Args:
        modules: The modules, each only once.
        replace: Gets the position of a module and what a call of it does now, hooks (and compilation) included;
            returns what is to be done instead.
    """
    saved: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for index, module in enumerate(modules):
            saved.append((module, {name: module.__dict__[name] for name in _OF_INSTANCE if name in module.__dict__}))
            replacement = replace(index, module._compiled_call_impl or module._call_impl)
            # What is compiled would go first, so both must be replaced; not forward, or hooks would run twice.
            module.__dict__.update(_call_impl=replacement, _compiled_call_impl=None)
        yield
    finally:
        for module, attributes in saved:
            for name in _OF_INSTANCE:
                module.__dict__.pop(name, None)
            module.__dict__.update(attributes)


def call_with_forward(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module with another ``forward``; its hooks run as ever, but nothing compiled does."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        return type(module)._call_impl(module, *args, **kwargs)
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def in_reentrant_checkpoint() -> bool:
    """Whether the caller runs inside ``torch.utils.checkpoint.checkpoint(..., use_reentrant=True)``."""
    return _enclosing(_REENTRANT) is not None


def enclosing_checkpoint() -> FrameType | None:
    """Which call of ``torch.utils.checkpoint.checkpoint`` the caller runs in (the innermost); None if in none."""
    return _enclosing(_CHECKPOINT)


def _enclosing(code: object) -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def makes_tensors(func: Callable[..., Any]) -> bool:
    """Whether a function is one of those that make a tensor on the default device."""
    return func in _device_constructors()


def storage_identity(tensor: Tensor) -> int:
    """The same for all tensors that share their data, also where these have none (on the meta device)."""
    return int(tensor.untyped_storage()._cdata)


def overflow_flags(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
    """Whether a gradient was not finite, by device, as a scaler has found it when it unscaled: 0 or 1."""
    found: dict[torch.device, Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return found
