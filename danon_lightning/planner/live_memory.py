"""How many bytes of tensors live, by parts of a step."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Sees all tensors that operators make, and how many bytes of them live.

    Attributes:
        live: At this moment.
        peak: The most since :meth:`begin_part`.
    """

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def begin_part(self) -> int:
        """Look for the peak of a new part from now on; returns that of the part before."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note storages that are new: those of no argument."""
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if _has_data(x)}
        for tensor in tree_leaves(result):
            if _has_data(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given:
                    self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._sizes:
            return
        self._sizes[address] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.live -= self._sizes.pop(address, 0)


def _has_data(tensor: object) -> bool:
    # What another rank holds is of a class of its own.
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"  # type: ignore[attr-defined]
