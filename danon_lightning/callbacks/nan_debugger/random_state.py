"""The states of all generators of random numbers that a step may draw from."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The states of the generators of torch (CPU and one accelerator), numpy and Python.

    Attributes:
        cpu: Of torch on the CPU, uint8.
        device: Of torch on the accelerator, uint8; None for the CPU.
        numpy: Of ``numpy.random``: keys as an int64 tensor [624], position, whether a Gaussian is held back, and it.
        python: Of ``random``: version, numbers, the Gaussian held back.
    """

    cpu: Tensor
    device: Tensor | None
    numpy: tuple[Tensor, int, int, float]
    python: tuple[int, tuple[int, ...], float | None]

    def to_dict(self) -> dict[str, Any]:
        """As tensors and plain containers, which ``torch.load(weights_only=True)`` reads."""
        return {"cpu": self.cpu, "device": self.device, "numpy": list(self.numpy), "python": list(self.python)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RandomState":
        """The inverse of :meth:`to_dict`."""
        version, numbers, gauss = data["python"]
        keys, position, has_gauss, cached = data["numpy"]
        return cls(data["cpu"], data["device"], (keys, position, has_gauss, cached), (version, tuple(numbers), gauss))


def random_state(device: torch.device | None = None) -> RandomState:
    """Take the states of all generators. Some tens of microseconds; the device is not waited for.

    Args:
        device: The accelerator whose generator counts besides that of the CPU.
    """
    _, keys, position, has_gauss, cached = cast(Any, numpy.random.get_state(legacy=True))
    return RandomState(
        torch.get_rng_state(),
        torch.get_device_module(device).get_rng_state(device) if _has_generator(device) else None,
        (torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(cached)),
        random.getstate(),
    )


def set_random_state(state: RandomState, device: torch.device | None = None) -> None:
    """Set all generators.

    Args:
        state: What :func:`random_state` has returned.
        device: The accelerator; its generator stays as it is if the state was taken without one.
    """
    torch.set_rng_state(state.cpu)
    if state.device is not None and _has_generator(device):
        torch.get_device_module(device).set_rng_state(state.device, device)
    keys, position, has_gauss, cached = state.numpy
    numpy.random.set_state(("MT19937", keys.numpy().astype("uint32"), position, has_gauss, cached))
    random.setstate(state.python)


@contextmanager
def restoring(state: RandomState | None = None, device: torch.device | None = None) -> Iterator[None]:
    """Put the generators into a state, and at the end back into the one that they had.

    Args:
        state: None leaves them as they are at the beginning.
        device: See :func:`random_state`.
    """
    before = random_state(device)
    if state is not None:
        set_random_state(state, device)
    try:
        yield
    finally:
        set_random_state(before, device)


def _has_generator(device: torch.device | None) -> bool:
    return device is not None and device.type not in ("cpu", "meta")
