"""What stands in, while a step is replayed, for what would leave traces: optimizers, backward passes, checkpoints."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor

from danon_lightning.callbacks.nan_debugger.preservation import replaced


class Idle:
    """Shows an optimizer or a scheduler, whose steps do nothing."""

    def __init__(self, real: Any, on_step: Callable[[], None]) -> None:
        """Stand in for ``real``; ``on_step`` is told of each step."""
        self._real = real
        self._on_step = on_step

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Call the closure, which contains the backward pass, and no more."""
        result = closure() if callable(closure) else None
        self._on_step()
        return result

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Do nothing: which parameters require gradients does not matter here."""
        yield

    def __getattr__(self, name: str) -> Any:
        """All else is that of the real one."""
        return getattr(self._real, name)


@contextmanager
def intercepted(
    module: pl.LightningModule, backward: Callable[[Tensor], None], on_step: Callable[[], None]
) -> Iterator[None]:
    """Have backward passes that are called inside do something else, and optimizers nothing.

    Args:
        module: Its ``optimizers()`` and so on are replaced.
        backward: Called with each loss, instead of ``manual_backward(loss)`` or ``loss.backward()``.
        on_step: Told of each step of an optimizer that has not been done.
    """

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        backward(loss)

    real_backward = torch.autograd.backward

    def autograd_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        if torch._C._current_autograd_node() is not None:  # part of a backward pass that is under way
            return real_backward(tensors, *args, **kwargs)
        for one in tensors if isinstance(tensors, (list, tuple)) else [tensors]:
            backward(one)

    def idle(real: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            found = real(*args, **kwargs)
            if isinstance(found, list):
                return [Idle(one, on_step) for one in found]
            return None if found is None else Idle(found, on_step)

        return stand_in

    with ExitStack() as stack:
        stack.enter_context(replaced(module, "manual_backward", manual_backward))
        for name in ("toggle_optimizer", "untoggle_optimizer", "clip_gradients"):
            stack.enter_context(replaced(module, name, lambda *args, **kwargs: None))
        for name in ("optimizers", "lr_schedulers"):
            stack.enter_context(replaced(module, name, idle(getattr(module, name))))
        stack.callback(setattr, torch.autograd, "backward", real_backward)
        torch.autograd.backward = autograd_backward
        yield


@contextmanager
def without_nested_backward() -> Iterator[None]:
    """Have reentrant checkpoints not begin a backward pass of their own.

    That would write ``.grad`` and run the hooks of DistributedDataParallel, and cannot be combined with
    ``torch.autograd.grad``. Torch's become ones that are not reentrant; fairscale's are not used at all.
    """

    class NotReentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)

    with ExitStack() as stack:
        stack.callback(setattr, torch_checkpoint, "CheckpointFunction", torch_checkpoint.CheckpointFunction)
        setattr(torch_checkpoint, "CheckpointFunction", NotReentrant)  # noqa: B010 - it is another class to mypy
        fairscale = sys.modules.get("fairscale.nn.checkpoint.checkpoint_activations")
        if fairscale is not None:
            stack.enter_context(fairscale.disable_checkpointing())
        yield
