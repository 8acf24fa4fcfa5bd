"""An exchange of gradients that goes on during the next forward pass, which waits for each weight where it uses it."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.optim import Optimizer

from danon_lightning.strategies.communication import GradientCommunicator
from danon_lightning.strategies.overlap.due_step import DueStep
from danon_lightning.strategies.overlap.parameter_use import first_uses, modules_to_watch
from danon_lightning.strategies.overlap.send_order import Departure, SendOrder


class ForwardOverlap:
    """Lets the backward pass return before its gradients are averaged, and takes the optimizer's step in parts.

    What the optimizer is asked to do is kept (:class:`DueStep`). The next forward pass, in front of each module, waits
    for the buckets with the parameters that are first used there, and has the optimizer move these. So every weight
    that is used is the one that it would have been ("cross-barrier": ByteScheduler, Peng et al., SOSP 2019).

    Which parameters a module uses is watched in the first training step, during which nothing is under way. Parameters
    that are used outside of all modules' forward passes, or were not seen, are waited for at the start of the step. In
    front of any module that runs outside of a training step everything is waited for, and whenever weights are asked
    for as a state dictionary. :meth:`finish` does so at other times.

    Register ``hook`` on the DistributedDataParallel, which must have ``gradient_as_bucket_view=True``.
    """

    def __init__(self, communicator: GradientCommunicator, root: nn.Module, *, reorders: bool = True) -> None:
        """Watch nothing yet.

        Args:
            communicator: Averages gradients, dense.
            root: What is trained.
            reorders: Whether buckets that cannot leave before the backward pass ends leave in the order in which the
                forward pass needs them.
        """
        self._communicator, self._root = communicator, root
        self._order = SendOrder(communicator, reorders=reorders)
        self._buckets: dict[int, Departure] = {}  # by the id of each parameter that is still to be moved
        self._due: DueStep | None = None
        self._needs: dict[nn.Module, frozenset[int]] | None = None
        self._at_start: frozenset[int] = frozenset()
        self._in_training_step = False
        self._handles: list[Any] = []

    # DDP checks the name and the annotation of `bucket`, and that of the result.
    @staticmethod
    def hook(state: "ForwardOverlap", bucket: GradBucket) -> Future[Tensor]:
        """The function to register with ``register_comm_hook``; its state is this."""
        return state._submit(bucket)

    def attach(self) -> None:
        """Wait in front of modules, and of state dictionaries, from now on."""
        wait = _Hook(self._before)
        self._handles = [module.register_forward_pre_hook(wait) for module in modules_to_watch(self._root)]
        read = _Hook(self._before_reading)
        self._handles += [module.register_state_dict_pre_hook(read) for module in self._root.modules()]

    def detach(self) -> None:
        """Take the hooks away, and give up what is still under way."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._due is not None:
            rank_zero_warn("training has ended in the middle of a step: some weights have been moved, others have not")
        self._buckets, self._due = {}, None

    @contextmanager
    def training_step(self, *, waits_first: bool = False) -> Iterator[None]:
        """Run a training step inside of this, forward pass only. At its end nothing is under way any more.

        Args:
            waits_first: Whether to wait for everything at its start.
        """
        if self._due is None:
            self._buckets = {}  # of a step that was not taken
        elif waits_first:
            self.finish()
        else:
            self._finish(self._at_start)
        self._in_training_step = True
        try:
            if self._needs is None:
                self.finish()
                self._needs = yield from self._watched()
            else:
                yield
        finally:
            self._in_training_step = False
        self.finish()
        self._order.agree()

    def _watched(self) -> Generator[None, None, dict[nn.Module, frozenset[int]]]:
        modules = modules_to_watch(self._root)
        parameters = list(self._root.parameters())
        with first_uses(modules, parameters) as found:
            yield
        needs = {module: frozenset(ids) for module, ids in found.items()}
        self._at_start = frozenset(map(id, parameters)).difference(*needs.values())
        return needs

    @contextmanager
    def deferred(self, optimizer: Optimizer) -> Iterator[None]:
        """Keep what ``optimizer.step(closure)`` shall do, inside of this, instead of doing it; the closure is run."""
        own = vars(optimizer).get("step")
        step = optimizer.step

        def later(closure: Callable[[], Any] | None = None, **options: Any) -> Any:
            result = None
            if closure is not None:
                with torch.enable_grad():
                    result = closure()
            self._defer(optimizer, step, options)
            return result

        optimizer.step = later  # type: ignore[method-assign]
        try:
            yield
        finally:
            if own is None:
                del optimizer.step
            else:
                optimizer.step = own  # type: ignore[method-assign]

    def _defer(self, optimizer: Optimizer, step: Callable[..., Any], options: dict[str, Any]) -> None:
        if _has_hooks(optimizer):  # which would be run for each part
            self.wait()
        if not self._buckets:
            step(**options)
            return
        self._due = DueStep(optimizer, step, options)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask
        elsewhere = self._due.gradients.keys() - self._buckets.keys()
        if elsewhere:  # what is no part of the model that is trained here
            self._due.take(elsewhere)

    def wait(self) -> None:
        """Wait for all gradients, so that they may be read. The step after that is taken at once, as a whole.

        Raises:
            RuntimeError: If the exchange has failed.
        """
        self._wait(self._buckets.values())
        if self._due is None:
            self._buckets = {}

    def finish(self) -> None:
        """Have all weights be what they are after the optimizer's last step. Not collective.

        Raises:
            RuntimeError: If the exchange has failed.
        """
        if self._due is not None:
            self._finish(self._buckets.keys())

    def _finish(self, ids: Iterable[int]) -> None:
        buckets = dict.fromkeys(self._buckets[one] for one in ids if one in self._buckets)
        if not buckets:
            return
        assert self._due is not None
        self._wait(buckets)
        moved = {id(parameter) for bucket in buckets for parameter in bucket.parameters}
        # A step in which an optimizer fails must not be tried again.
        self._buckets = {one: bucket for one, bucket in self._buckets.items() if one not in moved}
        due = self._due
        if not self._buckets:
            self._due = None
        due.take(moved)

    def _wait(self, buckets: Iterable[Departure]) -> None:
        start = time.perf_counter()
        try:
            for bucket in buckets:
                assert bucket.future is not None
                bucket.future.wait()
        except RuntimeError:
            error = self._communicator.error
            if error is not None:
                raise error from error.__cause__
            raise
        finally:
            self._communicator.add_exposed(time.perf_counter() - start)

    def _submit(self, bucket: GradBucket) -> Future[Tensor]:
        if bucket.index() == 0:
            self._buckets = {}
        departure = Departure(bucket.buffer(), bucket.parameters())
        self._buckets.update({id(parameter): departure for parameter in departure.parameters})
        self._order.add(departure, last=bucket.is_last())
        # DDP finds the buffer as the result, in which gradients are now, and where averages will be.
        device = departure.buffer.device
        future: Future[Tensor] = Future() if device.type == "cpu" else Future(devices=[device])
        future.set_result(departure.buffer)
        return future

    def _before(self, module: nn.Module) -> None:
        """A module is about to run."""
        # Without a step to take weights are as they should be. (During the backward pass checkpointed modules run.)
        if self._due is None:
            return
        if self._in_training_step and self._needs is not None:
            self._finish(self._needs.get(module, ()))
        else:
            self.finish()

    def _before_reading(self, module: nn.Module) -> None:
        self.finish()


def _has_hooks(optimizer: Optimizer) -> bool:
    """Whether functions run with each step, other than those of callbacks that look at nothing in this one."""
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    return any(not hasattr(getattr(hook, "__self__", None), "reads_between_steps") for hook in hooks)


class _Hook:
    """Calls a function with the module; copies of the module have nothing to wait for."""

    def __init__(self, function: Callable[[nn.Module], None]) -> None:
        self._function = function

    def __call__(self, module: nn.Module, *_: Any) -> None:
        self._function(module)

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


def _nothing(module: nn.Module) -> None:
    pass
