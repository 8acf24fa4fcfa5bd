"""What cores tell of what they attend to, in numbers that can be compared between variants.

Weights of single tokens come out of every mechanism in the same way: values that each name their token are attended
to in place of the real ones, and come back as its weight, also where tokens were read as part of a summary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LONGEST_MAP", "count_real", "has_past", "token_weights", "visible_keys"]

# Weights of pairs of tokens take quadratic space: they are told of so many first tokens.
LONGEST_MAP = 1024


def token_weights(attend: Callable[[Tensor], Tensor], v: Tensor, at_once: int | None = None) -> Tensor:
    """Return the weight of each token in what each query reads.

    Args:
        attend: Gives the output ``[b, H, n, w]`` for values ``[b, G, n, w]``, in which it is linear.
        v: The real values ``[b, G, n, d]``, for their shape and dtype.
        at_once: The width w that values must have; ``None``: any.

    Returns:
        ``[b, H, n, n]``.
    """
    length = v.shape[-2]
    names = torch.eye(length, dtype=v.dtype, device=v.device)
    pieces = []
    for columns in names.split(at_once or length, dim=-1):
        missing = (at_once or length) - columns.shape[-1]
        values = F.pad(columns, (0, missing)).expand(*v.shape[:2], -1, -1)
        pieces.append(attend(values)[..., : columns.shape[-1]])
    return torch.cat(pieces, dim=-1)


def visible_keys(q: Tensor, *, causal: bool, key_padding_mask: Tensor | None) -> Tensor:
    """Return how many real tokens each query may see ``[b, 1, n]``, none where the query itself is padding.

    Args:
        q: Queries ``[b, H, n, d]``.
        causal: Whether a query sees the past only.
        key_padding_mask: True for real tokens ``[b, n]``, boolean; ``None`` means that all are.
    """
    first = torch.zeros(q.shape[-2], dtype=torch.long, device=q.device)
    last = torch.arange(1, q.shape[-2] + 1, device=q.device) if causal else torch.full_like(first, q.shape[-2])
    seen = count_real(first, last, _real(q, key_padding_mask))
    return (seen if key_padding_mask is None else seen * key_padding_mask).unsqueeze(1)


def _real(q: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    everything = torch.ones(q.shape[0], q.shape[-2], dtype=torch.bool, device=q.device)
    return everything if key_padding_mask is None else key_padding_mask


def count_real(start: Tensor, stop: Tensor, real: Tensor) -> Tensor:
    """Count what is real from ``start`` up to, but not including, ``stop``.

    Args:
        start: ``[...]``, integer, between 0 and n.
        stop: ``[...]``, integer, between 0 and n; nothing is counted where it is not beyond ``start``.
        real: ``[b, n]``, boolean.

    Returns:
        ``[b, ...]``.
    """
    before = F.pad(real.long().cumsum(dim=-1), (1, 0))
    return before[:, stop.maximum(start)] - before[:, start]


def has_past(state: Any) -> bool:
    """Tell whether a streaming state has seen tokens."""
    if not isinstance(state, dict):
        return False
    if "position" in state:
        return bool(state["position"] > 0)
    if "key_padding_mask" in state:
        return bool(state["key_padding_mask"].shape[-1] > 0)
    return any(has_past(part) for part in state.values())
