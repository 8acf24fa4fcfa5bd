"""Which module is running, in forward and in backward."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from danon_lightning.callbacks.nan_debugger.user_code import user_location

# How far back to look for the operation of a node that has been made beside it, as for in-place writes into views.
_NEAR = 8


class Place(NamedTuple):
    """Where an operation of forward was called.

    Attributes:
        module: Name of the module.
        module_type: Its class.
        location: The user's line, see :func:`user_location`.
        op: The operation; that of a custom function is its name.
        stage: The pipeline stage.
        micro_batch: Which micro-batch.
    """

    module: str
    module_type: str
    location: str
    op: str
    stage: int
    micro_batch: int


class RunningModules:
    """Knows the module that runs, and by autograd's sequence numbers the one whose operation is differentiated.

    A node of backward carries the number that was drawn when its operation ran in forward; so the number that was drawn
    last, seen while an operation runs, leads from the node to all that is known about the operation.
    """

    def __init__(self, root: nn.Module) -> None:
        """Learn the names of the modules.

        Args:
            root: Its own name is empty.
        """
        self._root = type(root).__name__
        self._names = {id(module): name for name, module in root.named_modules()}
        self._stacks = threading.local()  # on CUDA, what checkpointing computes again runs in a thread of autograd
        self._places: dict[int, Place] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the calls of modules in here."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What is called in here has ended at its end, also where a call was left in a way that hooks do not see."""
        depth = len(self._stack)
        try:
            yield
        finally:
            del self._stack[depth:]

    @property
    def inside(self) -> bool:
        """Whether a module is running; in backward this is one that checkpointing runs again."""
        return bool(self._stack)

    @property
    def current(self) -> tuple[str, str]:
        """Name and class of the module that runs."""
        return self._stack[-1] if self._stack else ("", self._root)

    def note(self, op: str, stage: int, micro_batch: int) -> None:
        """Remember where the operation that runs was called, if autograd has made a node for it."""
        number = torch._C._autograd._get_sequence_nr() - 1
        if number < 0 or number in self._places:  # none has been drawn in this thread; or none for this operation
            return
        around = self.differentiated()
        if around is not None and not self.inside:  # the derivative of a derivative belongs where that does
            self._places[number] = around
        else:
            self._places[number] = Place(*self.current, user_location(), op, stage, micro_batch)

    def differentiated(self) -> Place | None:
        """Where what is being differentiated was called; None outside of backward."""
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        number = node._sequence_nr()
        place = next((self._places[n] for n in range(number, number - _NEAR, -1) if n in self._places), None)
        custom = custom_function(node)
        return place._replace(op=custom) if place is not None and custom else place

    @property
    def _stack(self) -> list[tuple[str, str]]:
        if not hasattr(self._stacks, "calls"):
            self._stacks.calls = []
        return self._stacks.calls

    def _enter(self, module: nn.Module, args: Any) -> None:
        # A module that is none of the root's (made on the fly, say) belongs to the one that calls it.
        name = self._names.get(id(module), self.current[0])
        self._stack.append((name, type(module).__name__))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()


def node_name() -> str:
    """The autograd node that is running, such as ``"SqrtBackward0"``; empty outside of backward."""
    node = torch._C._current_autograd_node()
    return "" if node is None else node.name()


def custom_function(node: Any) -> str:
    """The name of the ``torch.autograd.Function`` that a node belongs to; empty if it is one of torch's own."""
    forward = getattr(type(node), "_forward_cls", None)
    return "" if forward is None else forward.__name__
