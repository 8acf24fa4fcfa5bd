"""What the functional cores of UCSA accept."""

from torch import Tensor

from danon_lightning.attention.checks import check_heads, check_mask, check_queries, check_shapes
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
    check_queries(q)
    batch, heads, length, width = q.shape
    check_heads(q, k)
    groups = k.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, (batch, groups, length, width)),
        "v": (v, (batch, groups, length, width)),
        "key_padding_mask": (key_padding_mask, (batch, length)),
    }
    check_shapes(expected, f"q has shape {list(q.shape)}")
    if isinstance(selection_bias, Tensor):
        shapes = [[batch, groups, blocks], [batch, heads, blocks]]
        if list(selection_bias.shape) not in shapes:
            raise ValueError(
                f"selection_bias has shape {list(selection_bias.shape)}, but q has shape {list(q.shape)}, which is "
                f"{blocks} blocks after the sinks; selection_bias must have shape {shapes[0]} or {shapes[1]}"
            )
    check_mask(key_padding_mask)
    if not error_tolerance >= 0.0:
        raise ValueError(f"error_tolerance={error_tolerance} must be at least 0; 0 lets every block be expanded")
