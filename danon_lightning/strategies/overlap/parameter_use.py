"""In which module's forward pass each parameter is first used."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _FirstUses(TorchDispatchMode):
    """Notes, for each parameter, which module is running when an operation first takes it or a view of it."""

    supports_higher_order_operators = True

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._unseen: dict[int, list[int]] = {}
        for parameter in parameters:
            if parameter.numel():
                self._unseen.setdefault(parameter.untyped_storage().data_ptr(), []).append(id(parameter))
        self.running: list[nn.Module] = []
        self.found: dict[nn.Module, set[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._unseen:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self._note(leaf)
        return func(*args, **(kwargs or {}))

    def _note(self, tensor: Tensor) -> None:
        try:
            pointer = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # of a kind that has no memory of its own
            return
        seen = self._unseen.pop(pointer, None)
        if seen is not None and self.running:
            self.found.setdefault(self.running[-1], set()).update(seen)


@contextmanager
def first_uses(modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> Iterator[dict[nn.Module, set[int]]]:
    """Watch a forward pass, which takes longer for it.

    Args:
        modules: Those to tell apart. Of nested ones the innermost counts.
        parameters: What to look for.

    Yields:
        Filled meanwhile: the ``id`` of the parameters that are first used while a module runs, by module. Those that
        are used outside of all of them, or not at all, are in none.
    """
    uses = _FirstUses(parameters)

    def enter(module: nn.Module, _: Any) -> None:
        uses.running.append(module)

    def leave(module: nn.Module, *_: Any) -> None:
        uses.running.pop()

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        if "torch._dynamo" in sys.modules:  # it takes long to import, and without it nothing is compiled
            # What is compiled is not seen; nor can it be while something watches.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(uses)
        yield uses.found


def modules_to_watch(root: nn.Module) -> list[nn.Module]:
    """All modules below ``root`` whose forward pass can be waited in front of: not inside of what is compiled."""
    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if child in found or isinstance(child, torch.jit.ScriptModule):
                continue
            if getattr(child, "_compiled_call_impl", None) is not None:  # its hooks are compiled too
                continue
            found[child] = None
            if not hasattr(child, "_orig_mod"):  # torch.compile(module), whose own hooks are outside of it
                visit(child)

    if getattr(root, "_compiler_ctx", None) is None and getattr(root, "_compiled_call_impl", None) is None:
        visit(root)
    return list(found)
