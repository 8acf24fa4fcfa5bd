"""What tensors of any kind hold: plain, sparse, sharded, complex, of eight bits, or none that one may look at."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from danon_lightning.callbacks.nan_debugger.origin import TensorStatistics

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
# Subclasses with one of these are ordinary tensors with other methods.
_NO_DISPATCH = (Tensor.__torch_dispatch__, torch._C._disabled_torch_dispatch_impl)


class Badness(NamedTuple):
    """Whether a tensor holds any NaN, and any infinity."""

    nan: bool
    inf: bool

    def __bool__(self) -> bool:
        """Whether any of both."""
        return self.nan or self.inf


class StorageKey(NamedTuple):
    """The identity of a storage, what keeps that (but not the memory) from being used again, and its size in bytes."""

    key: int
    reference: StorageWeakRef
    size: int


def components(tensor: Tensor) -> Iterator[Tensor]:
    """The plain strided tensors in which the values of a tensor lie; none where they cannot be looked at.

    Those of a sparse tensor are its values, those of a DTensor or another wrapper its inner tensors. Tensors on the
    meta device, quantized ones, and subclasses that hide what they hold have none.
    """
    if type(tensor) not in _PLAIN:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            for inner in (getattr(tensor, name) for name in names):
                if isinstance(inner, Tensor):
                    yield from components(inner)
            return
        if type(tensor).__torch_dispatch__ not in _NO_DISPATCH:
            return
        tensor = tensor.as_subclass(Tensor)
    if tensor.device.type == "meta" or tensor.is_quantized:
        return
    if tensor.layout == torch.sparse_coo:
        yield tensor._values()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc) or tensor.is_nested:
        yield tensor.values()
    elif tensor.layout == torch.strided:
        yield tensor


def storages(tensor: Tensor) -> list[StorageKey]:
    """The storages of a tensor, as identities that are never used again for others while they are held."""
    found = []
    for part in components(tensor):
        storage = part.untyped_storage()
        found.append(StorageKey(storage._cdata, StorageWeakRef(storage), storage.nbytes()))
    return found


@torch.no_grad()
def badness(tensor: Tensor) -> Badness:
    """Whether a tensor holds anything that is not finite. One host read if not, at most three for each component."""
    nan = inf = False
    for part in _floating(tensor):
        # The sum is the fastest operation that no NaN and no infinity gets through unseen.
        total = part.sum(dtype=torch.float32 if part.dtype.itemsize < 4 else None)
        if math.isfinite(total.item()):
            continue
        nan = nan or bool(part.isnan().any())
        inf = inf or bool(part.isinf().any())
    return Badness(nan, inf)


@torch.no_grad()
def statistics_of(tensor: Tensor, name: str = "") -> TensorStatistics:
    """What a tensor holds, in numbers. Of integers, and where one cannot look, only shape and dtype."""
    shape = tuple(getattr(tensor, "_local_tensor", tensor).shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    parts = list(_floating(tensor))
    if not parts:
        return TensorStatistics(shape, dtype, None, None, None, 0, 0, tensor.numel(), name)
    finite = torch.cat([part[part.isfinite()].flatten() for part in parts])
    nans, infs = (sum(int(getattr(part, test)().sum()) for part in parts) for test in ("isnan", "isinf"))
    count = sum(part.numel() for part in parts)
    if not finite.numel():
        return TensorStatistics(shape, dtype, None, None, None, nans, infs, count, name)
    wide = finite if finite.device.type == "mps" else finite.double()
    return TensorStatistics(
        shape, dtype, float(finite.min()), float(finite.max()), float(wide.abs().mean()), nans, infs, count, name
    )


@torch.no_grad()
def like_a_mask(tensor: Tensor) -> bool:
    """Whether it holds nothing but zeros and minus infinities, as what is added to scores does."""
    parts = list(_floating(tensor))
    return bool(parts) and all(bool(((part == 0) | part.isneginf()).all()) for part in parts)


@torch.no_grad()
def only_negative_infinities(tensor: Tensor) -> bool:
    """Whether all that is not finite is minus infinity, as in a mask with biases in it."""
    return all(bool((part.isfinite() | part.isneginf()).all()) for part in _floating(tensor))


@torch.no_grad()
def bad_sample(tensor: Tensor, batch_size: int | None) -> int | None:
    """The first sample that is not finite, where the first dimension is that of the batch.

    Returns:
        None without that dimension, and where all of several samples are bad: then no single one is to blame.
    """
    parts = list(_floating(tensor))
    if batch_size is None or len(parts) != 1 or parts[0].ndim == 0 or len(parts[0]) != batch_size:
        return None
    bad = (~parts[0].isfinite()).flatten(1).any(1) if parts[0].ndim > 1 else ~parts[0].isfinite()
    found = bad.nonzero().flatten().tolist()
    return found[0] if found and (len(found) < batch_size or batch_size == 1) else None


def tensors_in(tree: Any, path: str = "batch", *, objects: bool = True, depth: int = 6) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested containers, with where they are: ``("batch['x'][0]", tensor)``.

    Args:
        tree: The containers.
        path: What it is called.
        objects: Whether to look into the attributes of other objects as well.
        depth: How many levels to look into.
    """
    if isinstance(tree, Tensor):
        yield path, tree
        return
    inner: list[tuple[str, Any]] = []
    if isinstance(tree, Mapping) or (objects and hasattr(tree, "keys") and hasattr(tree, "__getitem__")):
        inner = [(f'{path}["{key}"]' if isinstance(key, str) else f"{path}[{key!r}]", tree[key]) for key in tree.keys()]
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        inner = [(f"{path}.{name}", getattr(tree, name)) for name in tree._fields]
    elif isinstance(tree, (list, tuple)):
        inner = [(f"{path}[{index}]", one) for index, one in enumerate(tree)]
    elif objects and hasattr(tree, "__dict__") and not isinstance(tree, (type, nn.Module)):
        inner = [(f"{path}.{name}", one) for name, one in vars(tree).items()]
    if depth:
        for where, one in inner:
            yield from tensors_in(one, where, objects=objects, depth=depth - 1)


def batch_size_of(batch: Any) -> int | None:
    """The first dimension that most tensors of a batch have; None without any."""
    sizes = [len(tensor) for _, tensor in tensors_in(batch) if tensor.ndim]
    return max(sizes, key=sizes.count) if sizes else None


def _floating(tensor: Tensor) -> Iterator[Tensor]:
    """The components that may hold NaN or infinities, as real tensors on which comparisons are implemented."""
    for part in components(tensor):
        if part.is_complex():
            part = torch.view_as_real(part.detach().resolve_conj())
        if not part.is_floating_point() or not part.numel():
            continue
        part = part.detach()
        yield part.float() if part.dtype.itemsize == 1 else part
