"""What is expected of queries, keys, tokens and masks, by all that take them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from danon_lightning.attention.recompute import is_traced

__all__ = [
    "check_dtypes",
    "check_heads",
    "check_like",
    "check_mask",
    "check_queries",
    "check_range",
    "check_rotation",
    "check_shapes",
    "check_tokens",
]


def check_queries(q: Tensor) -> None:
    """Raise ``ValueError`` unless there are queries ``[b, H, n, d]``."""
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q has shape {list(q.shape)}; it must be [batch, heads, tokens, width], none of them zero")


def check_heads(q: Tensor, k: Tensor) -> None:
    """Raise ``ValueError`` unless heads of queries can share those of the keys ``[b, G, n, d]``."""
    if k.dim() != 4 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k has shape {list(k.shape)}, but q has shape {list(q.shape)}; k must have a number of heads that divides "
            "that of q"
        )


def check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ``ValueError`` unless keys and values have the dtype of the queries."""
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, but q has dtype {q.dtype}; convert one of them")


def check_rotation(q: Tensor, rope_base: float | None) -> None:
    """Raise ``ValueError`` unless queries have an even width, or are not rotated."""
    if rope_base is not None and q.shape[-1] % 2:
        raise ValueError(
            f"q has shape {list(q.shape)}, of odd width {q.shape[-1]}, which cannot be rotated in pairs; use an even "
            "width, or rope_base=None"
        )


def check_tokens(x: Tensor, width: int) -> None:
    """Raise ``ValueError`` unless there are tokens ``[b, n, D]`` of that width."""
    if x.dim() != 3 or x.shape[-1] != width or 0 in x.shape:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [batch, tokens, {width}], none of them zero")


def check_shapes(expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]], given: str) -> None:
    """Raise ``ValueError`` unless tensors have the shapes that follow from others.

    Args:
        expected: Tensors and their shapes by name; ``None`` passes.
        given: What the shapes follow from, for the message.
    """
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but {given}; {name} must have shape {list(shape)}"
            )


def check_mask(key_padding_mask: Tensor | None) -> None:
    """Raise ``ValueError`` unless the mask is boolean."""
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise ValueError(f"key_padding_mask has dtype {key_padding_mask.dtype}; it must be torch.bool, True for tokens")


def check_like(name: str, value: Tensor | None, input_ids: Tensor, *, may_lack_batch: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is ``None``, or boolean or integer in the shape of ``input_ids``."""
    if value is None:
        return
    shapes = [input_ids.shape] + ([input_ids.shape[1:]] if may_lack_batch else [])
    if value.shape not in shapes:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, but input_ids has shape {list(input_ids.shape)}; "
            f"{name} must be {' or '.join(str(list(shape)) for shape in shapes)}"
        )
    if value.is_floating_point() or value.is_complex():
        raise ValueError(f"{name} has dtype {value.dtype}; it must be boolean or integer")


def check_range(name: str, indices: Tensor, setting: str, limit: int) -> None:
    """Raise ``ValueError`` unless all indices lie from 0 up to, but not including, the value of a setting.

    Only on CPUs: elsewhere this would wait for the device.
    """
    if indices.device.type != "cpu" or is_traced(indices):
        return
    least, most = (int(bound) for bound in indices.aminmax())
    if least < 0 or most >= limit:
        raise ValueError(
            f"{name} holds {least if least < 0 else most}, but {setting}={limit}; it must lie between 0 and "
            f"{limit - 1}, or the model be built with a larger {setting}"
        )
