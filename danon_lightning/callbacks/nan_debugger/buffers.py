"""Puts back what a bad step has written to buffers, such as running means."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Larger buffers are copied only when they count as written to. (Batch normalisation writes without being counted.)
_ALWAYS = 1 << 16


@dataclass
class _Copy:
    buffer: Tensor
    version: int
    value: Tensor

    def is_due(self) -> bool:
        return self.buffer.numel() <= _ALWAYS or self.version != self.buffer._version


class BufferCopies:
    """Copies of all buffers as they were after the last finite step."""

    def __init__(self) -> None:
        """Nothing is copied yet."""
        self._copies: dict[str, _Copy] = {}

    @torch.no_grad()
    def take(self, module: nn.Module) -> None:
        """Copy what may have changed since the last time."""
        current = {name: buffer for name, buffer in module.named_buffers() if _is_plain(buffer)}
        self._copies = {
            name: one
            for name, one in self._copies.items()
            if current.get(name) is one.buffer and one.value.shape == one.buffer.shape
        }
        due = [one for one in self._copies.values() if one.is_due()]
        if due:
            torch._foreach_copy_([one.value for one in due], [one.buffer for one in due])
            for one in due:
                one.version = one.buffer._version
        for name, buffer in current.items():
            if name not in self._copies:
                self._copies[name] = _Copy(buffer, buffer._version, buffer.clone())

    @torch.no_grad()
    def put_back(self, module: nn.Module) -> list[str]:
        """Undo what has changed since; names of what was put back."""
        changed = self._changed(module)
        for one in changed.values():
            one.buffer.copy_(one.value)
            one.version = one.buffer._version
        return list(changed)

    @contextmanager
    def as_before(self, module: nn.Module) -> Iterator[None]:
        """In here, buffers are as they were before the step: it may have spoilt them, and must be run on good ones."""
        now = [(one, one.buffer.clone()) for one in self._changed(module).values()]
        with torch.no_grad():
            for one, _ in now:
                one.buffer.copy_(one.value)
        try:
            yield
        finally:
            with torch.no_grad():
                for one, value in now:
                    one.buffer.copy_(value)

    def clear(self) -> None:
        """Let go of all copies."""
        self._copies.clear()

    def _changed(self, module: nn.Module) -> dict[str, _Copy]:
        current = dict(module.named_buffers())
        due = {name: one for name, one in self._copies.items() if current.get(name) is one.buffer and one.is_due()}
        return {name: one for name, one in due.items() if not torch.equal(one.buffer, one.value)}


def _is_plain(buffer: Tensor) -> bool:
    return not (buffer.is_meta or buffer.is_inference()) and type(buffer) is Tensor
