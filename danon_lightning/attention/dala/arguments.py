"""What the functional cores of DALA accept."""

from torch import Tensor

from danon_lightning.attention.checks import check_dtypes, check_heads, check_mask, check_queries, check_shapes

__all__ = ["check_settings", "check_tensors"]


def check_settings(q: Tensor, block_size: int, memory_size: int, importance_threshold: float) -> None:
    """Raise ``ValueError`` unless there are queries and the settings are in range."""
    check_queries(q)
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size={block_size!r} must be an integer of at least 1")
    if not isinstance(memory_size, int) or memory_size < 0:
        raise ValueError(f"memory_size={memory_size!r} must be an integer of at least 0; 0 means no memory")
    if not 0.0 <= importance_threshold <= 1.0:
        raise ValueError(
            f"importance_threshold={importance_threshold} must be between 0 and 1: it is compared with the importance, "
            "not with its logarithm"
        )


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: int,
    *,
    log_importance: Tensor,
    distance_decay: Tensor,
    window_width: Tensor | float,
    memory_bias: Tensor | None,
    selection_bias: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    """Raise ``ValueError`` unless the tensors fit each other.

    Args:
        q: Queries; the other tensors are as in ``dala_attention``.
        k: Keys.
        v: Values.
        blocks: The number of blocks that the queries belong to.
        log_importance: ``[b, n]``.
        distance_decay: ``[H]``.
        window_width: A number or ``[]``, ``[H]`` or ``[H, blocks]``.
        memory_bias: ``[b, H, n]``.
        selection_bias: ``[b, n]``.
        key_padding_mask: ``[b, n]``, boolean.
    """
    batch, heads, length, width = q.shape
    check_heads(q, k)
    groups = k.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, (batch, groups, length, width)),
        "v": (v, (batch, groups, length, width)),
        "log_importance": (log_importance, (batch, length)),
        "distance_decay": (distance_decay, (heads,)),
        "memory_bias": (memory_bias, (batch, heads, length)),
        "selection_bias": (selection_bias, (batch, length)),
        "key_padding_mask": (key_padding_mask, (batch, length)),
    }
    check_shapes(expected, f"q has shape {list(q.shape)}")
    if isinstance(window_width, Tensor):
        if tuple(window_width.shape) not in ((), (heads,), (heads, blocks)):
            raise ValueError(
                f"window_width has shape {list(window_width.shape)}, but q has shape {list(q.shape)}, which is "
                f"{blocks} blocks; window_width must be a number or have shape [], [{heads}] or [{heads}, {blocks}]"
            )
    elif not window_width > 0:
        raise ValueError(f"window_width={window_width} must be positive; use a large one for no falling off")
    check_mask(key_padding_mask)
    check_dtypes(q, k, v)
