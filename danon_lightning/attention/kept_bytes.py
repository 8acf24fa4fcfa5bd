"""How much memory a forward pass keeps for its backward pass."""

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["KeptBytes"]


class KeptBytes(saved_tensors_hooks):
    """A context that counts the bytes of what is saved for the backward pass, each storage once.

    Attributes:
        count: Bytes so far.

    Args:
        known: Tensors that do not count, such as inputs and parameters.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """Begin with what is known."""
        self.count = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        # Held on to: what is freed in between would make place for something else at the same address.
        self._held: list[Tensor] = []
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._held.append(tensor.detach())
            self.count += storage.nbytes()
        return tensor
