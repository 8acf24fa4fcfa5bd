"""Puts back what a bad step has written to buffers, such as running means."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class BufferCopies:
    """Copies of the buffers that change in training, as they were after the last finite step.

    A buffer counts as changing once it has been written to; what never changes, such as a mask, is copied but once.
    """

    def __init__(self) -> None:
        """Nothing is copied yet."""
        self._copies: dict[str, tuple[Tensor, int, Tensor]] = {}

    @torch.no_grad()
    def take(self, module: nn.Module) -> None:
        """Copy what has changed since the last time."""
        for name, buffer in module.named_buffers():
            if buffer.is_meta or buffer.is_inference() or type(buffer) is not Tensor:
                continue
            known = self._copies.get(name)
            if known is None or known[0] is not buffer:
                self._copies[name] = (buffer, buffer._version, buffer.clone())
            elif known[1] != buffer._version:
                known[2].copy_(buffer)
                self._copies[name] = (buffer, buffer._version, known[2])

    @torch.no_grad()
    def put_back(self, module: nn.Module) -> list[str]:
        """Undo what has changed since; names of what was put back."""
        changed = self._changed(module)
        for name in changed:
            buffer, _, copy = self._copies[name]
            buffer.copy_(copy)
            self._copies[name] = (buffer, buffer._version, copy)
        return changed

    @contextmanager
    def as_before(self, module: nn.Module) -> Iterator[None]:
        """In here, buffers are as they were before the step: it may have spoilt them, and must be run on good ones."""
        now = {name: self._copies[name][0].clone() for name in self._changed(module)}
        with torch.no_grad():
            for name in now:
                self._copies[name][0].copy_(self._copies[name][2])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in now.items():
                    self._copies[name][0].copy_(value)

    def _changed(self, module: nn.Module) -> list[str]:
        known = {name: self._copies[name] for name, _ in module.named_buffers() if name in self._copies}
        current = dict(module.named_buffers())
        return [name for name, one in known.items() if one[0] is current[name] and one[1] != one[0]._version]

    def clear(self) -> None:
        """Let go of all copies."""
        self._copies.clear()
