"""Operators of which some tensors are known by shape only."""

from typing import Any

import torch
from torch import Tensor

from danon_lightning.strategies.pipeline.errors import AbsentDataError, user_location
from danon_lightning.strategies.pipeline.torch_internals import flatten, unflatten

aten = torch.ops.aten

# Operators whose result follows from shape and dtype alone, with what they fill it.
_CONSTANTS = {
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    # What is in there is anything; zeros are the same on every stage.
    aten.empty_like.default: 0,
    aten.new_empty.default: 0,
    aten.new_empty_strided.default: 0,
}
# The position of the value with which these fill.
_FILLED = {aten.full_like.default: 1, aten.new_full.default: 2}
# How many numbers these draw depends on the data.
_DRAWS_BY_DATA = {
    aten.poisson.default,
    aten.binomial.default,
    aten._standard_gamma.default,
    aten._sample_dirichlet.default,
}
# Operators whose second argument is a list of indices.
_INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}


def run(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], absent: type[Tensor]) -> Any:
    """Run an operator on the meta device.

    Args:
        func: The operator.
        args: Its arguments: absent, ordinary and no tensors.
        kwargs: The others.
        absent: The class of absent tensors.

    Returns:
        What it returns, on the meta device.

    Raises:
        AbsentDataError: If the operator needs data to know the shape of its result.
    """
    if func is aten.masked_select.default and not isinstance(args[1], absent):
        tensor, mask = args
        count = int(mask.expand(torch.broadcast_shapes(tensor.shape, mask.shape)).sum())
        return torch.empty(count, dtype=tensor.dtype, device="meta")
    args = _with_known_masks(func, args, absent)
    leaves, structure = flatten((args, kwargs))
    meta_args, meta_kwargs = unflatten([_to_meta(leaf, absent) for leaf in leaves], structure)
    try:
        return func(*meta_args, **meta_kwargs)
    except Exception as error:
        raise AbsentDataError(
            f"{func} cannot be run on shapes alone, as stages must that do not hold all parameters: {error} "
            f"({user_location()})"
        ) from error


def constant_like(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], shape: Any, device: torch.device
) -> Tensor | None:
    """The result of an operator that makes a constant like its argument; None for other operators.

    Args:
        func: The operator.
        args: Its arguments.
        kwargs: The others.
        shape: Its result on the meta device.
        device: Where the constant is to be.
    """
    if func in _CONSTANTS:
        value = _CONSTANTS[func]
    elif func in _FILLED:
        position = _FILLED[func]
        value = args[position] if position < len(args) else kwargs["fill_value"]
    else:
        return None
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device).fill_(value)


def random_like(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], absent: Tensor
) -> Tensor | None:
    """The result of an operator that draws numbers independent of data; None for other operators."""
    if func not in (aten.rand_like.default, aten.randn_like.default):
        return None
    dtype, device = kwargs.get("dtype") or absent.dtype, kwargs.get("device") or absent.device
    made = torch.empty_strided(absent.shape, absent.stride(), dtype=dtype, device=device)
    return made.uniform_() if func is aten.rand_like.default else made.normal_()


def check_draw(func: torch._ops.OpOverload) -> None:
    """Raise an AbsentDataError if how many numbers an operator draws depends on its data."""
    if func in _DRAWS_BY_DATA:
        raise AbsentDataError(
            f"{func} draws a number of random numbers that depends on data ({user_location()}): stages would get "
            "different ones. Do that inside a block or after the last one"
        )


def on_meta(tensor: Tensor) -> Tensor:
    """Shape, strides and dtype of an ordinary tensor, on the meta device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _to_meta(leaf: Any, absent: type[Tensor]) -> Any:
    if isinstance(leaf, absent):
        return leaf.meta  # type: ignore[attr-defined]
    if isinstance(leaf, Tensor):
        return on_meta(leaf)
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def _with_known_masks(func: torch._ops.OpOverload, args: tuple[Any, ...], absent: type[Tensor]) -> tuple[Any, ...]:
    """Replace masks whose data are known by indices, so that what they select has a known size."""
    if func in _INDEXING:
        indices: list[Any] = []
        for index in args[1]:
            known = isinstance(index, Tensor) and not isinstance(index, absent)
            indices += index.nonzero().unbind(1) if known and index.dtype in (torch.bool, torch.uint8) else [index]
        return args[0], indices, *args[2:]
    return args
