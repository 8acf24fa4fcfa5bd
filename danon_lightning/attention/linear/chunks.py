"""What the chunked forms of the gated recurrences have in common: chunks, and the decay between their tokens.

Only differences of cumulated logarithms are ever exponentiated, and only those from an earlier token to a later one,
which are at most zero. So a decay of any strength underflows to zero and nothing overflows, unlike with the ratio
exp(G_i) / exp(G_j).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.exponential import exp_or_zero_

__all__ = ["Chunks", "chunked", "cumulated", "decay_between", "decay_to_end"]

# Its exponential is zero in every dtype, and so is the gradient there: raising stronger decays to this changes nothing,
# keeps minus infinity, that is forgetting everything, out of the differences, and bounds their rounding errors.
STRONGEST_LOG_DECAY = -1000.0
# Chunks worked on at once: few enough for their matrices to stay in the cache of a processor core.
CHUNKS_AT_ONCE = 16


class Chunks(NamedTuple):
    """Consecutive chunks of all sequences and heads, N = b·H of them, T chunks of C tokens each.

    Attributes:
        q: Queries ``[N, T, C, d]``, like all but ``log_decay`` in the dtype of the computation.
        k: Keys ``[N, T, C, d]``.
        v: Values ``[N, T, C, dv]``.
        log_decay: Logarithm of the decay from the token before a chunk to each of its tokens ``[N, T, C]``, float64
            (float32 on devices without it): sums of many terms, of which small differences matter.
        beta: Learning rates ``[N, T, C, 1]``, or ``None``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, chunk_size: int, dtype: torch.dtype
) -> Iterator[Chunks]:
    """Cut sequences in chunks and yield these a few at a time, in order.

    Args:
        q: Queries ``[b, H, n, d]``.
        k: Keys ``[b, G, n, d]``.
        v: Values ``[b, G, n, dv]``.
        log_decay: ``[b, H, n]``.
        beta: ``[b, H, n]``, or ``None``.
        chunk_size: Tokens C in a chunk; the last one is filled up with tokens that leave the state as it is.
        dtype: Dtype of the computation.
    """
    heads, length = q.shape[1], q.shape[2]
    chunks = -(-length // chunk_size)
    missing = chunks * chunk_size - length

    def cut(x: Tensor) -> tuple[Tensor, ...]:
        if x.shape[1] != heads:
            x = x.repeat_interleave(heads // x.shape[1], dim=1)
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        # A split and not slices: each of many slices would fill up its gradient with zeros to the whole length.
        return x.flatten(0, 1).unflatten(1, (chunks, chunk_size)).split(CHUNKS_AT_ONCE, dim=1)

    precise = dtype if log_decay.device.type == "mps" else torch.float64
    decays = log_decay.unsqueeze(-1).to(precise).clamp(min=STRONGEST_LOG_DECAY)
    rates = [None] * chunks if beta is None else cut(beta.unsqueeze(-1).to(dtype))
    for piece in zip(cut(q.to(dtype)), cut(k.to(dtype)), cut(v.to(dtype)), cut(decays), rates, strict=False):
        yield Chunks(*piece[:3], cumulated(piece[3].squeeze(-1)), piece[4])


def cumulated(log_decay: Tensor) -> Tensor:
    """Return the sums of the first 1 to m of the m entries of the last dimension, ``[..., m]``."""
    # As a product, for torch.cumsum has no deterministic form on CUDA.
    moments = log_decay.shape[-1]
    return log_decay @ torch.ones(moments, moments, dtype=log_decay.dtype, device=log_decay.device).triu()


def decay_between(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the decay from each moment j to each moment i >= j, and zero for i < j.

    Args:
        log_decay: Logarithm of the decay from some moment before to each of m moments ``[..., m]``.
        dtype: Dtype of the result.

    Returns:
        exp(G_i - G_j), ``[..., m, m]``.
    """
    moments = log_decay.shape[-1]
    future = torch.full((moments, moments), float("-inf"), dtype=dtype, device=log_decay.device).triu_(1)
    # The difference of what is rounded off on top of that of what is left: as precise, and faster than to round later.
    coarse = log_decay.to(dtype)
    fine = (log_decay - coarse).to(dtype)
    differences = coarse.unsqueeze(-1) - coarse.unsqueeze(-2)
    return exp_or_zero_(differences.add_(fine.unsqueeze(-1) - fine.unsqueeze(-2)).add_(future))


def decay_to_end(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the decay from each token to the end of its chunk ``[..., C, 1]``."""
    return (log_decay[..., -1:] - log_decay).exp().to(dtype).unsqueeze(-1)
