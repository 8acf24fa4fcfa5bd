"""Making a model of which each rank gets its own part only, with the weights that a whole one would have."""

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from danon_lightning.strategies.pipeline.module_state import restored
from danon_lightning.strategies.pipeline.random_numbers import generators_restored
from danon_lightning.strategies.pipeline.torch_internals import (
    ASKS_FOR_DATA,
    draws_random_numbers,
    makes_tensors,
    storage_identity,
)
from danon_lightning.strategies.seeds import seed_from

_CPU = torch.device("cpu")
_CONSTANTS = {torch.arange, torch.linspace, torch.logspace, torch.tensor, torch.as_tensor, torch.asarray}


@contextmanager
def reproducible(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """In here, what is drawn for a tensor does not depend on whether others are real or on the meta device.

    Each draw has a seed of its own, which follows from the tensor that is drawn for: the n-th one that has been made.
    (Code that makes others only where there is data, as ``nn.init.sparse_`` does, spoils the count.) Afterwards the
    generator is as before.

    Args:
        seed: Where all the seeds come from.
        device: Where tensors are made.
    """
    with generators_restored(device), _Making() as making, _SeededDraws(seed, making):
        yield


class _Making(TorchFunctionMode):
    """Counts what is the same whichever tensors have data.

    Attributes:
        number: How many tensors have been made so far.
        events: The same, and how often it was asked whether a tensor has data: initializers do that before they draw.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = self.events = 0
        self._numbers: dict[int, int] = {}

    def number_of(self, tensor: Tensor) -> int | None:
        """Which of the tensors it is, or shares its data with; None if it was not counted."""
        return self._numbers.get(storage_identity(tensor))

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.events += func == ASKS_FOR_DATA
        if not makes_tensors(func):
            return func(*args, **(kwargs or {}))
        self.events += 1
        self.number += 1
        tensor = func(*args, **(kwargs or {}))
        identity = storage_identity(tensor)
        self._numbers[identity] = self.number
        # Another tensor may get the same one when this has been freed.
        weakref.finalize(tensor.untyped_storage(), self._numbers.pop, identity, None)
        return tensor


class _SeededDraws(TorchDispatchMode):
    def __init__(self, seed: int, making: _Making) -> None:
        super().__init__()
        self._seed, self._making = seed, making
        self._draws: Counter[tuple[str, int]] = Counter()

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if draws_random_numbers(func):
            target = args[0] if args and isinstance(args[0], Tensor) else None
            number = None if target is None else self._making.number_of(target)
            if number is not None:
                place = "tensor", number
            elif target is None:
                place = "new", self._making.number
            else:
                place = "between", self._making.events
            self._draws[place] += 1
            torch.manual_seed(seed_from(self._seed, place, self._draws[place]))
        return func(*args, **(kwargs or {}))


@contextmanager
def made_in_part(
    module: nn.Module, make: Callable[[], object], choose: Callable[[], Collection[str]], device: torch.device
) -> Iterator[None]:
    """In here nothing that is made has data. Afterwards it is forgotten, and a part is made with data.

    Args:
        module: What gets the submodules that are made.
        make: Makes the same once more.
        choose: Called when it is known what there is: returns the full names of the parameters that are wanted.
        device: Where these are to be made. All others stay on the meta device; what is no parameter is made in full.
    """
    kept: set[int] = set()
    unwanted: set[int] = set()
    with restored(module):
        shapes = _Placement(lambda number: torch.device("meta"))
        with shapes:
            yield
        made = {storage_identity(tensor): number for number, tensor in enumerate(shapes.made)}
        wanted = set(choose())
        for name, parameter in module.named_parameters(remove_duplicate=False):
            number = made.get(storage_identity(parameter))
            if number is not None:
                (kept if name in wanted else unwanted).add(number)
    absent = unwanted - kept
    with _Placement(lambda number: torch.device("meta") if number in absent else device):
        make()


class _Placement(TorchFunctionMode):
    """Counts the calls that make tensors, and chooses where each is made."""

    def __init__(self, place: Callable[[int], torch.device]) -> None:
        super().__init__()
        self._place = place
        self.made: list[Tensor] = []  # kept, or others could get their identity

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # What is made of given numbers is small, and code likes to read it.
        if func in _CONSTANTS or not makes_tensors(func) or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        tensor = func(*args, **{**kwargs, "device": self._place(len(self.made))})
        self.made.append(tensor if tensor.is_meta else tensor.new_empty(0))
        return tensor
