"""Tensors that are known by shape, dtype and device only, because another process holds their data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from danon_lightning.strategies.pipeline import shape_operations
from danon_lightning.strategies.pipeline.errors import AbsentDataError, user_location
from danon_lightning.strategies.pipeline.observer import current_observer
from danon_lightning.strategies.pipeline.torch_internals import (
    draws_random_numbers,
    flatten,
    make_wrapper,
    mark_as_parameter,
    returns_written_arguments,
    unflatten,
    without_torch_function,
    written_arguments,
)

# These reach for the data without going through an operator that could be refused.
_READING_FUNCTIONS = {
    Tensor.numpy,
    Tensor.tolist,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
    Tensor.untyped_storage,
}


class Absent(Tensor):
    """A tensor without data.

    Operations on it give absent results of the right shape, dtype, device and ``requires_grad``. What does not depend
    on data is real: sizes, and constants made like it (``zeros_like``, ``rand_like``, ...). What needs the data is
    refused. Its value may come later (:meth:`arrive`): whatever is then done with it is done with the value.
    """

    meta: Tensor
    full_name: str | None
    value: Tensor | None

    @staticmethod
    def __new__(
        cls,
        meta: Tensor,
        device: torch.device,
        *,
        requires_grad: bool = False,
        name: str | None = None,
    ) -> "Absent":
        """Make one.

        Args:
            meta: Shape, strides and dtype: a tensor on the meta device.
            device: Where it claims to be.
            requires_grad: Whether it is a leaf whose gradient is wanted.
            name: Its full name if it stands for a parameter or a buffer.
        """
        absent = make_wrapper(cls, meta, device, requires_grad)
        absent.meta, absent.full_name, absent.value = meta, name, None
        return absent

    @classmethod
    def like(cls, tensor: Tensor, *, name: str | None = None, device: torch.device | None = None) -> "Absent":
        """One that stands for ``tensor``, there or elsewhere; for a parameter, it passes for a parameter."""
        absent = cls(meta_of(tensor), device or tensor.device, requires_grad=tensor.requires_grad, name=name)
        if isinstance(tensor, torch.nn.Parameter):
            mark_as_parameter(absent)
        return absent

    def arrive(self, value: Tensor) -> None:
        """Give it its value.

        From then on its gradient is that of the value. Should one come for itself, it is an error.
        """
        with without_torch_function():
            if self.requires_grad:
                self.register_hook(_refuse_gradient)
        self.value = value

    def arrived(self) -> Tensor:
        """Its value, if that has come; else the absent tensor itself."""
        return self if self.value is None else self.value

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Shape and dtype."""
        name = "" if self.full_name is None else f"{self.full_name}, "
        return f"Absent({name}shape={tuple(self.meta.shape)}, dtype={self.meta.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Absent":
        """Another one, still without data."""
        copied = Absent.like(self, name=self.full_name)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse to be saved.

        Raises:
            AbsentDataError: Always.
        """
        raise AbsentDataError(f"{self!r} cannot be saved or sent: another pipeline stage holds its data")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Put values that have come in the place of absent tensors; refuse what would reach for missing data."""
        leaves, structure = flatten((args, kwargs or {}))
        leaves = [x.arrived() if isinstance(x, Absent) else x for x in leaves]
        args, kwargs = unflatten(leaves, structure)
        absent = next((x for x in leaves if isinstance(x, Absent)), None)
        if absent is None:
            return func(*args, **kwargs)
        if func is Tensor.backward:
            current_observer().backward()
        if func is Tensor.__format__ and absent.dim() == 0 and args[1]:
            return format(absent.item(), args[1])
        if func in _READING_FUNCTIONS:
            with _refusals_noted():
                current_observer().read(absent)
            args, kwargs = _made_up((args, kwargs), 1)
            return func(*args, **kwargs)
        with without_torch_function():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator on shapes alone."""
        with _refusals_noted():
            return _dispatch(func, args, kwargs or {})


@contextmanager
def _refusals_noted() -> Iterator[None]:
    try:
        yield
    except AbsentDataError as error:
        current_observer().refused(error)
        raise


def _dispatch(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    absents = [x for x in flatten((args, kwargs))[0] if isinstance(x, Absent)]
    for absent in absents:
        current_observer().used(absent)
    if func is torch.ops.aten._local_scalar_dense.default:
        current_observer().read(absents[0])
        return torch.ones((), dtype=absents[0].dtype).item()
    written = written_arguments(func, args, kwargs)
    for target in written:
        if not isinstance(target, Absent):
            current_observer().write(func, target)
    if draws_random_numbers(func):
        random = shape_operations.random_like(func, args, kwargs, absents[0])
        if random is not None:
            return random
        if current_observer().draws:
            # Every stage must draw as many numbers as the one that has the data.
            shape_operations.check_draw(func)
            real_args, real_kwargs = _made_up((args, kwargs), 0.5)
            func(*real_args, **real_kwargs)
    shapes = shape_operations.run(func, args, kwargs, Absent)
    device = kwargs.get("device") or absents[0].device
    constant = shape_operations.constant_like(func, args, kwargs, shapes, device)
    if constant is not None:
        return constant
    for target in written:
        if isinstance(target, Absent) and target.meta.shape != target.shape:
            raise AbsentDataError(f"{func} changes the shape of an absent tensor in place ({user_location()})")
    if returns_written_arguments(func):
        return written[0] if len(written) == 1 else tuple(written)
    if isinstance(shapes, Tensor):
        return _noted(Absent(shapes, device))
    leaves, structure = flatten(shapes)
    return unflatten([_noted(Absent(x, device)) if isinstance(x, Tensor) else x for x in leaves], structure)


def _refuse_gradient(gradient: Tensor) -> None:
    """Of what torch functions do not see: it would be lost, silently."""
    raise AbsentDataError(
        "a torch.autograd.Function was applied, outside of a block, to a tensor that another stage has made, and its "
        "gradient cannot be sent there: call it inside a block, or give it a clone of the tensor"
    )


def meta_of(tensor: Tensor) -> Tensor:
    """Shape, strides and dtype of a tensor, on the meta device."""
    return tensor.meta if isinstance(tensor, Absent) else shape_operations.on_meta(tensor)


def with_arrived(tree: Any) -> Any:
    """Nested containers, with the values of absent tensors that have come in their places."""
    leaves, structure = flatten(tree)
    return unflatten([x.arrived() if isinstance(x, Absent) else x for x in leaves], structure)


def find_absent(tree: object) -> Absent | None:
    """An absent tensor in nested containers, if there is one whose value has not come."""
    for leaf in flatten(tree)[0]:
        if isinstance(leaf, Absent) and leaf.value is None:
            return leaf
    return None


def _noted(absent: Absent) -> Absent:
    current_observer().made(absent)
    return absent


def _made_up(tree: Any, value: float) -> Any:
    """Nested containers, with tensors full of ``value`` for absent ones."""
    leaves, structure = flatten(tree)
    return unflatten(
        [
            torch.full(x.shape, value, dtype=torch.float32, device=x.device).to(x.dtype) if isinstance(x, Absent) else x
            for x in leaves
        ],
        structure,
    )
