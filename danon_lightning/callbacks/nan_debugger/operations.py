"""What an operation of torch reads and writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isinf
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

# These do not care for what was in the memory that they write.
_OVERWRITING = {
    *("bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_", "log_normal_", "normal_", "random_"),
    *("set_", "uniform_", "zero_", "_foreach_copy_", "_foreach_zero_"),
}
# These give memory that holds anything.
_ALLOCATING = {
    *("empty", "empty_like", "empty_permuted", "empty_quantized", "empty_strided", "new_empty", "new_empty_strided"),
    *("resize_", "_efficientzerotensor", "_resize_output_"),
}
# Running statistics are changed in place, which the schemas of these do not say.
_RUNNING_STATISTICS = {"running_mean", "running_var"}


@dataclass(frozen=True)
class Operation:
    """One call of an operation, before it runs.

    Attributes:
        name: In full, such as ``"aten.log.default"``.
        taken: The tensors whose values it reads.
        written: Those that it writes, in place or as ``out=``.
        changed: Those of them whose old values it reads.
        fills: Whether it was given an infinity as a number, or makes a tensor of numbers in the code.
        allocates: Whether it gives memory without writing it.
        communicates: Whether it moves tensors between ranks; they may be written later.
        views: Whether it only gives another view of its first argument.
    """

    name: str
    taken: Sequence[Tensor]
    written: Sequence[Tensor]
    changed: Sequence[Tensor]
    fills: bool
    allocates: bool
    communicates: bool
    views: bool

    @classmethod
    def of(cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Operation":
        """Look at a call as ``__torch_dispatch__`` gets it."""
        traits = _traits(func)
        named = {**dict(zip(traits.arguments, args, strict=False)), **kwargs}
        written = _tensors([named.get(name) for name in traits.written])
        overwritten = _tensors([named.get(name) for name in traits.overwritten])
        numbers = tree_leaves([args, kwargs])
        constant = traits.base == "lift_fresh"
        taken = () if constant else [one for one in _tensors([args, kwargs]) if not _among(one, overwritten)]
        return cls(
            name=str(func),
            taken=taken,
            written=written,
            changed=[one for one in written if not _among(one, overwritten)],
            fills=constant or any(isinstance(one, float) and isinf(one) for one in numbers),
            allocates=traits.base in _ALLOCATING,
            communicates="c10d" in traits.namespace,
            views=traits.views and not constant,
        )


@dataclass(frozen=True)
class _Traits:
    namespace: str
    base: str
    arguments: tuple[str, ...]
    written: tuple[str, ...]
    overwritten: tuple[str, ...]
    views: bool


@cache
def _traits(func: Any) -> _Traits:
    schema = getattr(func, "_schema", None)
    if schema is None:  # operators of higher order: nothing is known of them
        return _Traits("", str(func), (), (), (), False)
    namespace, _, base = schema.name.partition("::")
    marked = [one for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    written = [one.name for one in marked]
    if "batch_norm" in base and "backward" not in base:
        written += [one.name for one in schema.arguments if one.name in _RUNNING_STATISTICS - set(written)]
    overwritten = [one.name for one in marked if one.kwarg_only or base in _OVERWRITING]
    views = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
    return _Traits(
        namespace,
        base,
        tuple(one.name for one in schema.arguments),
        tuple(written),
        tuple(overwritten),
        views and not written,
    )


def _tensors(tree: Any) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor)]


def _among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(tensor is other for other in others)
