"""Puts back what a step that is left out has written to buffers, such as running means."""

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
        restored = []
        for name, buffer in module.named_buffers():
            known = self._copies.get(name)
            if known is not None and known[0] is buffer and known[1] != buffer._version:
                buffer.copy_(known[2])
                self._copies[name] = (buffer, buffer._version, known[2])
                restored.append(name)
        return restored

    def clear(self) -> None:
        """Let go of all copies."""
        self._copies.clear()
