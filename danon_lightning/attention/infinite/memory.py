"""A linear memory of the whole past, in constant space.

Reference:
    Katharopoulos et al. 2020, "Transformers are RNNs" (linear attention); Munkhdalai et al. 2024, "Leave No Context
    Behind: Efficient Infinite Context Transformers with Infini-attention" (as a memory beside local attention).
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.linear.functional import gated_linear_attention
from danon_lightning.attention.pieces import tokens_at_once
from danon_lightning.attention.recompute import Scan, in_pieces

__all__ = ["linear_memory"]


def linear_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the mean of all values so far, weighted by φ(q)·φ(k) with φ = elu + 1.

    Args:
        q: Queries ``[b, H, n, m]``, neither rotated nor scaled.
        k: Keys ``[b, G, n, m]``, H divisible by G.
        v: Values ``[b, G, n, d]``.
        key_padding_mask: True for real tokens ``[b, n]``, boolean; ``None`` means that all are.
        chunk_size: Tokens in a chunk; it decides about speed only.
        initial_state: The state before the first token ``[b, H, m, d + 1]``; ``None`` means empty.

    Returns:
        The output ``[b, H, n, d]`` in the dtype of ``v``, zero as long as no real token has been seen, and the state
        after the last token: Σ φ(k)vᵀ, and Σ φ(k) in the last column.
    """
    precise = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    if initial_state is None:
        initial_state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1] + 1, dtype=precise, device=q.device)
    sequences = [q, k, v]
    if key_padding_mask is not None:
        sequences.append(key_padding_mask.unsqueeze(1).to(precise))
    work = Scan(partial(_advance, chunk_size=chunk_size), len(sequences))
    (output,), state = in_pieces(work, sequences, q.shape[2], tokens_at_once(q.device), initial_state)
    assert state is not None
    return output, state


def _advance(
    state: Tensor,
    _: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None = None,
    *,
    chunk_size: int,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Read for some tokens, and take them in."""
    query, key = (F.elu(x.to(state.dtype)) + 1 for x in (q, k))
    if real is not None:
        key = key.masked_fill(real.unsqueeze(-1) == 0, 0.0)
    values = torch.cat([v.to(key.dtype), torch.ones_like(v[..., :1], dtype=key.dtype)], dim=-1)
    never = query.new_zeros(query.shape[:-1])
    read, state = gated_linear_attention(query, key, values, never, chunk_size=chunk_size, initial_state=state)
    total = read[..., -1:]
    # Every φ is positive, so that only an empty memory has no mass.
    return (read[..., :-1] / total.masked_fill(total == 0, 1.0)).to(v.dtype), state, ()
