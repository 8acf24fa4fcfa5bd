"""What all functional cores expect of queries, keys and masks."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["check_heads", "check_mask", "check_queries", "check_shapes"]


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
