"""Runs single modules in a higher precision for a while."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

_HALF = (torch.float16, torch.bfloat16)
# A module that fails again and again is not kept for longer than so many times the first duration.
_LONGEST = 16


class HigherPrecision:
    """Modules that run in a higher precision, each for a number of optimizer steps.

    Under autocast, and for weights in half precision, that is float32 without autocast; for float32 it is float64,
    where the device has it. Weights stay as they are: the module computes with copies. What comes out is float32 under
    autocast, so that it may be larger than half precision holds, and otherwise of the type that the module would have
    given. A module that fails again while it is on the list, or later, is put there for twice as long.

    Args:
        steps: How many finite steps a module runs so when it has failed for the first time.
    """

    def __init__(self, steps: int) -> None:
        """See the class."""
        if steps < 1:
            raise ValueError(f"fallback_steps={steps} must be at least 1")
        self.steps = steps
        self.left: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._undo: dict[str, Callable[[], None]] = {}

    def add(self, root: nn.Module, name: str) -> int:
        """Put a module on the list; for how many steps.

        Args:
            root: The LightningModule.
            name: Of the module, as in ``named_modules``; not empty.
        """
        self._failures[name] = self._failures.get(name, 0) + 1
        self.left[name] = self.steps * min(2 ** (self._failures[name] - 1), _LONGEST)
        self._wrap(root, name)
        return self.left[name]

    def count_down(self) -> list[str]:
        """A finite step was made; names of the modules that run as usual from now on."""
        ended = [name for name, left in self.left.items() if left <= 1]
        self.left = {name: left - 1 for name, left in self.left.items() if left > 1}
        for name in ended:
            self._undo.pop(name, lambda: None)()
        return ended

    def restore(self, root: nn.Module) -> None:
        """Wrap the modules on the list, after a checkpoint was loaded."""
        for name in list(self.left):
            self._wrap(root, name)

    def release(self) -> None:
        """Have all modules run as usual. The list stays, for the next ``fit``."""
        for undo in self._undo.values():
            undo()
        self._undo.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers by name."""
        return {"left": dict(self.left), "failures": dict(self._failures)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the list of a checkpoint; :meth:`restore` has it come true."""
        self.left, self._failures = dict(state["left"]), dict(state["failures"])

    def _wrap(self, root: nn.Module, name: str) -> None:
        modules = dict(root.named_modules())
        if name in self._undo or name not in modules:  # a later version of the model may not have it
            return
        module = modules[name]
        own = vars(module).get("forward")
        module.forward = _raised(module, module.forward)

        def undo() -> None:
            if own is None:
                del module.forward
            else:
                module.forward = own

        self._undo[name] = undo


class _Shell(nn.Module):
    """Calls a function in place of a module, so that weights can be exchanged for the call without its hooks."""

    def __init__(self, inner: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _raised(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function in a higher precision."""
    shell = [_Shell(module, forward)]  # in a list: it is not to become a child of the module

    def raised(*args: Any, **kwargs: Any) -> Any:
        tensors = [p for p in module.parameters()] + [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        device = floating[0].device.type if floating else "cpu"
        autocast = torch.is_autocast_enabled(device)
        half = autocast or any(tensor.dtype in _HALF for tensor in floating)
        high = torch.float32 if half or device == "mps" else torch.float64
        weights = {
            f"inner.{name}": value.to(high)
            for named in (module.named_parameters(), module.named_buffers())
            for name, value in named
            if value.is_floating_point() and value.dtype != high and value.dtype != torch.float64
        }
        low = None if autocast else next((tensor.dtype for tensor in floating), None)
        with torch.autocast(device, enabled=False):
            args, kwargs = tree_map(lambda leaf: _cast(leaf, high), (args, kwargs))
            result = functional_call(shell[0], weights, args, kwargs)
        return result if low is None else tree_map(lambda leaf: _back(leaf, high, low), result)

    return raised


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    floats = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64
    return leaf.to(dtype) if floats else leaf


def _back(leaf: Any, high: torch.dtype, low: torch.dtype) -> Any:
    return leaf.to(low) if isinstance(leaf, Tensor) and leaf.dtype == high else leaf
