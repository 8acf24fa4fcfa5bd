"""Norms of gradients before they are averaged over ranks, or added to those of earlier micro-batches."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from danon_lightning.callbacks.gradient_monitor.tensors import sums, values_of


class LocalNorms:
    """Watches backward passes, from its making until :meth:`remove`.

    A hook on a leaf tensor sees what one backward pass brings to it, complete, before it is added to ``.grad`` and
    before DDP copies it into a bucket: so it works with every kind of exchange, and changes nothing. It costs one
    operation for each parameter and backward pass.

    Args:
        parameters: Name, index of the layer, and the parameter itself.
        guarded: Makes a context that takes errors: they must not come up in the middle of a backward pass.

    Attributes:
        names: Of the watched parameters.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, int, nn.Parameter]],
        guarded: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """See the class."""
        parameters = list(parameters)
        self.names = frozenset(name for name, _, _ in parameters)
        self._guarded = guarded
        self._norms: list[Tensor] = []
        self._layers: list[int] = []
        self._passes: Counter[int] = Counter()
        self._handles: list[RemovableHandle] = [
            parameter.register_hook(self._hook(index, layer)) for index, (_, layer, parameter) in enumerate(parameters)
        ]

    def _hook(self, index: int, layer: int) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            with self._guarded():
                values = values_of(gradient.detach())
                reduced = values.dtype in (torch.float16, torch.bfloat16)
                self._norms.append(torch.linalg.vector_norm(values, dtype=torch.float32 if reduced else None))
                self._layers.append(layer)
                self._passes[index] += 1

        return see

    @property
    def passes(self) -> int:
        """Number of backward passes so far: that of the parameter that took part in most."""
        return max(self._passes.values(), default=0)

    def squares(self, layers: int, device: torch.device) -> Tensor:
        """Sum over all passes of the squared norms.

        Args:
            layers: Their number.
            device: Where the result is wanted.

        Returns:
            [layers], float64.
        """
        return sums(self._norms, torch.tensor(self._layers, dtype=torch.int64, device=device), layers, squared=True)

    def remove(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
