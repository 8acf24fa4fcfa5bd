"""What was there before a step: the batch, parameters, buffers, and tensors that modules hold otherwise."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from danon_lightning.callbacks.nan_debugger.values import (
    StorageKey,
    like_a_mask,
    only_negative_infinities,
    storages,
    tensors_in,
)


@dataclass(frozen=True)
class Source:
    """A tensor from before the step.

    Attributes:
        kind: ``"constant"``: a module holds it as an ordinary attribute, or nobody known does.
        name: The name of the parameter, buffer or attribute; where it is in the batch; empty if it is not known.
        tensor: As a whole; None if it is not known.
    """

    kind: Literal["input", "parameter", "buffer", "constant"]
    name: str = ""
    tensor: Tensor | None = None

    def meant(self, tensor: Tensor, *, nan: bool) -> bool:
        """Whether what is bad in it was meant so: a mask with minus infinities, a single infinite number.

        Args:
            tensor: What an operation has taken of it.
            nan: Whether a NaN is in it.
        """
        if nan or self.kind == "parameter":
            return False
        if tensor.numel() == 1 and self.kind == "constant":
            return True
        return like_a_mask(tensor) if self.kind == "input" else only_negative_infinities(tensor)


class Sources:
    """Finds by its storage to what a tensor belongs."""

    def __init__(self, module: nn.Module, batch: Any = None) -> None:
        """Learn what is there.

        Args:
            module: With its parameters, buffers and attributes.
            batch: Nested containers of tensors.
        """
        self._found: dict[int, tuple[StorageKey, Source]] = {}
        for name, parameter in module.named_parameters():
            self._learn("parameter", name, parameter)
        for name, buffer in module.named_buffers():
            self._learn("buffer", name, buffer)
        for name, tensor in tensors_in(batch):
            self._learn("input", name, tensor)
        for name, tensor in attributes(module):
            self._learn("constant", name, tensor)

    def find(self, tensor: Tensor) -> Source:
        """What a tensor from before the step is."""
        for storage in storages(tensor):
            if storage.key in self._found:
                return self._found[storage.key][1]
        return Source("constant")

    def _learn(self, kind: Literal["input", "parameter", "buffer", "constant"], name: str, tensor: Tensor) -> None:
        for storage in storages(tensor):
            self._found.setdefault(storage.key, (storage, Source(kind, name, tensor)))


def attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that modules hold as ordinary attributes, also in containers: states of metrics, caches, masks."""
    for prefix, one in module.named_modules():
        for name, value in vars(one).items():
            if name not in ("_parameters", "_buffers", "_modules") and isinstance(value, (Tensor, list, tuple, dict)):
                yield from tensors_in(value, f"{prefix}.{name}" if prefix else name, objects=False)
