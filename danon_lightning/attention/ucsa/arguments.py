"""What the functional cores of UCSA accept."""

import torch
from torch import Tensor

from danon_lightning.attention.ucsa.cells import SelectionBias

__all__ = ["check_tensors"]


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: int,
    *,
    key_padding_mask: Tensor | None,
    selection_bias: SelectionBias,
    error_tolerance: float,
) -> None:
    """Raise ``ValueError`` unless the tensors fit each other.

    Args:
        q: Queries ``[b, H, n, d]``.
        k: Keys ``[b, G, n, d]``.
        v: Values ``[b, G, n, d]``.
        blocks: The number of blocks of the sequence.
        key_padding_mask: ``[b, n]``, boolean.
        selection_bias: ``[b, G or H, blocks]`` if a tensor.
        error_tolerance: At least 0.
    """
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q has shape {list(q.shape)}; it must be [batch, heads, tokens, width], none of them zero")
    batch, heads, length, width = q.shape
    if k.dim() != 4 or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"k has shape {list(k.shape)}, but q has shape {list(q.shape)}; k must have a number of heads that divides "
            "that of q"
        )
    groups = k.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, (batch, groups, length, width)),
        "v": (v, (batch, groups, length, width)),
        "key_padding_mask": (key_padding_mask, (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but q has shape {list(q.shape)}; {name} must have shape "
                f"{list(shape)}"
            )
    if isinstance(selection_bias, Tensor):
        shapes = [[batch, groups, blocks], [batch, heads, blocks]]
        if list(selection_bias.shape) not in shapes:
            raise ValueError(
                f"selection_bias has shape {list(selection_bias.shape)}, but q has shape {list(q.shape)}, which is "
                f"{blocks} blocks after the sinks; selection_bias must have shape {shapes[0]} or {shapes[1]}"
            )
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise ValueError(f"key_padding_mask has dtype {key_padding_mask.dtype}; it must be torch.bool, True for tokens")
    if not error_tolerance >= 0.0:
        raise ValueError(f"error_tolerance={error_tolerance} must be at least 0; 0 lets every block be expanded")
