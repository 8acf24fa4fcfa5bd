"""The arguments of modules in an actual forward pass, kept so that it can be measured afterwards.

Measuring later, and on a few sequences, leaves the forward pass as it is: no random number is drawn, nothing is added
to the graph, an error harms nobody, and checkpointing finds everything as it was.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Call", "Recorder", "replaying"]

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class Call(NamedTuple):
    """How a module was called.

    Attributes:
        args: Its arguments, tensors detached and cut to the first sequences.
        kwargs: Those by name.
        autocast: Device type, and dtype of autocast or ``None`` where it was off.
        batch: Sequences before the cut.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype | None]
    batch: int

    @property
    def streams(self) -> bool:
        """Whether an argument is a mapping, as states of streaming forms are."""
        return any(isinstance(x, Mapping) for x in (*self.args, *self.kwargs.values()))


class _Unusable(Exception):
    """An argument has no data here: another stage of a pipeline holds it, or it is spread over ranks."""


class Recorder:
    """Keeps the last call of modules between ``start`` and ``stop``, and of streams the first one before it.

    Calls do not count whose tensors have no data here, or whose module in the end has no parameters here: stages of a
    pipeline run with such, and to try a step out before it is made, with values that are made up. Such trials are why
    it is the last call and not the first.

    Args:
        root: The module that all others are part of.
        modules: The modules by name.
        sequences: Sequences to keep, the first ones; ``None``: all.
    """

    def __init__(self, root: nn.Module, modules: Mapping[str, nn.Module], sequences: int | None) -> None:
        """See the class."""
        self.modules, self.sequences = modules, sequences
        # A module without parameters of its own lies where those around it do.
        self._around: dict[str, nn.Module] = {}
        for part in root.modules():
            if next(part.parameters(), None) is not None:
                inside = set(part.modules())
                self._around |= {name: part for name, module in modules.items() if module in inside}
        self.calls: dict[str, list[Call]] = {}
        self._undo: list[Callable[[], None]] = []

    def start(self) -> None:
        """Forget what was kept, and listen."""
        self.stop()
        self.calls = {}
        for name, module in self.modules.items():
            compiled = getattr(module, "_compiled_call_impl", None)
            if compiled is None:
                handle = module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
                self._undo.append(handle.remove)
            else:
                # Of a module compiled in place hooks are part of what was compiled.
                module._compiled_call_impl = self._wrapped(name, compiled)
                self._undo.append(partial(setattr, module, "_compiled_call_impl", compiled))

    def stop(self) -> None:
        """Listen no longer, and drop calls of modules that another rank holds."""
        while self._undo:
            self._undo.pop()()
        for name in list(self.calls):
            around = self._around.get(name)
            if around is not None and not all(_has_data(parameter) for parameter in around.parameters()):
                del self.calls[name]

    def _hook(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # What is being compiled would go on to listen forever.
            if not torch.compiler.is_compiling():
                self._record(name, args, kwargs)

        return record

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            self._record(name, args, kwargs)
            return call(*args, **kwargs)

        return record

    def _record(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is None or not _has_data(first) or first.dim() == 0:
            return
        batch = first.shape[0]
        try:
            with torch.no_grad():
                args, kwargs = (_cut(x, batch, self.sequences or batch) for x in (args, kwargs))
        except _Unusable:
            return
        kind = first.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        call = Call(args, kwargs, (kind, dtype), batch)
        self.calls[name] = [*(self.calls.get(name, [])[:1] if call.streams else []), call]


def _has_data(x: Tensor) -> bool:
    return type(x) in _PLAIN and not x.is_meta


def _cut(x: Any, batch: int, count: int) -> Any:
    """Copy the first sequences of tensors that have as many as the first argument, and others as a whole."""
    if isinstance(x, Tensor):
        if not _has_data(x):
            raise _Unusable
        return (x.detach()[:count] if x.dim() and x.shape[0] == batch else x.detach()).clone()
    if isinstance(x, dict):
        return {key: _cut(value, batch, count) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        parts = [_cut(value, batch, count) for value in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


@contextmanager
def replaying(modules: Sequence[nn.Module], autocast: tuple[str, torch.dtype | None]) -> Iterator[None]:
    """Call modules once more without a trace: no gradients, no dropout, no compiling, the random state as before.

    Args:
        modules: What is called.
        autocast: As in ``Call``.
    """
    kind, dtype = autocast
    devices = [torch.accelerator.current_device_index()] if kind != "cpu" else []
    training = {part: part.training for module in modules for part in module.modules()}
    with ExitStack() as stack:
        for part, mode in training.items():
            stack.callback(setattr, part, "training", mode)
            part.training = False
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices, device_type=kind if devices else "cuda"))
        stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
