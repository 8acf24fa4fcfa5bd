"""Gated linear attention and the gated delta rule, in chunks: O(n) cost, and a state of constant size.

Inside a chunk everything is dense products of matrices; from chunk to chunk only the state is handed on. The results
are those of the recurrences token by token.

Reference:
    Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient Training" (chunks); Dao & Gu 2024,
    "Transformers are SSMs" (one decay a head); Yang et al. 2025, "Gated Delta Networks: Improving Mamba2 with Delta
    Rule" (the delta rule with decay, solved inside a chunk by the WY representation).
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.checks import check_heads, check_queries, check_shapes
from danon_lightning.attention.linear.chunks import Chunks, chunked, cumulated, decay_between, decay_to_end
from danon_lightning.attention.linear.delta import replace
from danon_lightning.attention.precision import without_autocast

__all__ = ["gated_delta_rule", "gated_linear_attention", "resumed_delta_rule"]


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read a memory that every token adds to and that fades: S_t = γ_t S_{t-1} + k_t v_tᵀ, out_t = S_tᵀ q_t.

    Nothing is scaled, normalised or rotated. A token with ``log_decay`` 0 and a key of zeros leaves the state as it is:
    this is how padding is passed.

    Args:
        q: Queries ``[b, H, n, d]``.
        k: Keys ``[b, G, n, d]``, H divisible by G.
        v: Values ``[b, G, n, dv]``.
        log_decay: ln γ, at most 0, minus infinity allowed ``[b, H, n]``.
        chunk_size: Tokens in a chunk; it decides about speed only.
        initial_state: The state before the first token ``[b, H, d, dv]``; ``None`` means zero.

    Returns:
        The output ``[b, H, n, dv]`` in the dtype of ``v``, and the state after the last token ``[b, H, d, dv]``, with
        which the sequence can be continued. The computation and the state are in float32 at least, under autocast too.

    Raises:
        ValueError: If shapes do not fit each other or ``chunk_size`` is out of range.
    """
    _check(q, k, v, {"log_decay": log_decay}, chunk_size, initial_state)
    return _run(q, k, v, log_decay, None, chunk_size, initial_state)[:2]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read a memory in which a token replaces what its key held: S_t = γ_t (I - η_t k_t k_tᵀ) S_{t-1} + η_t k_t v_tᵀ.

    The output is S_tᵀ q_t. Nothing is scaled, normalised or rotated: keys should have unit length, for the state grows
    without bounds where η_t |k_t|² exceeds 2. A token with ``log_decay`` 0 and ``beta`` 0 leaves the state as it is:
    this is how padding is passed.

    Args:
        q: Queries ``[b, H, n, d]``.
        k: Keys ``[b, G, n, d]``, H divisible by G.
        v: Values ``[b, G, n, dv]``.
        log_decay: ln γ, at most 0, minus infinity allowed ``[b, H, n]``.
        beta: The rates η of replacement, from 0 to 1 ``[b, H, n]``.
        chunk_size: Tokens in a chunk; it decides about speed only.
        initial_state: The state before the first token ``[b, H, d, dv]``; ``None`` means zero.

    Returns:
        The output ``[b, H, n, dv]`` in the dtype of ``v``, and the state after the last token ``[b, H, d, dv]``, with
        which the sequence can be continued. The computation and the state are in float32 at least, under autocast too.

    Raises:
        ValueError: If shapes do not fit each other or ``chunk_size`` is out of range.
    """
    _check(q, k, v, {"log_decay": log_decay, "beta": beta}, chunk_size, initial_state)
    return _run(q, k, v, log_decay, beta, chunk_size, initial_state)[:2]


def resumed_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    chunk_size: int,
    initial_state: Tensor,
    known: Sequence[Tensor],
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Do what ``gated_delta_rule`` does, and return also what makes it shorter the next time.

    Args:
        q: Queries ``[b, H, n, d]``.
        k: Keys ``[b, G, n, d]``.
        v: Values ``[b, G, n, dv]``.
        log_decay: ln γ ``[b, H, n]``.
        beta: The rates η ``[b, H, n]``.
        chunk_size: Tokens in a chunk.
        initial_state: The state before the first token ``[b, H, d, dv]``.
        known: What the same call has returned last, or nothing.
    """
    return _run(q, k, v, log_decay, beta, chunk_size, initial_state, known)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    chunk_size: int,
    initial_state: Tensor | None,
    known: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Hand the state on from chunks to chunks; with ``beta`` the delta rule, without it plain sums."""
    batch, heads, length, width = q.shape
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.promote_types(v.dtype, torch.float32))
    if initial_state is None:
        state = torch.zeros(batch * heads, width, v.shape[-1], dtype=dtype, device=q.device)
    else:
        state = initial_state.to(dtype).flatten(0, 1)
    outputs, kept, before = [], [], iter(known)
    with without_autocast(q.device):
        for chunks in chunked(q, k, v, log_decay, beta, min(chunk_size, length), dtype):
            if beta is None:
                output, state = _add_up(chunks, state)
            else:
                output, state, *keep = replace(chunks, state, *itertools.islice(before, 2))
                kept += keep
            outputs.append(output.flatten(1, 2).to(v.dtype))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output[:, :length].unflatten(0, (batch, heads)), state.unflatten(0, (batch, heads)), tuple(kept)


def _add_up(chunks: Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advance gated linear attention by T chunks.

    Args:
        chunks: The chunks.
        state: The state before them ``[N, d, dv]``.

    Returns:
        The output ``[N, T, C, dv]`` and the new state.
    """
    dtype, log_decay = state.dtype, chunks.log_decay
    within = (chunks.q @ chunks.k.mT * decay_between(log_decay, dtype)) @ chunks.v
    # What a chunk adds to the state by its end. The states between chunks are sums of these, decayed: one product.
    added = (chunks.k * decay_to_end(log_decay, dtype)).mT @ chunks.v  # [N, T, d, dv]
    by_chunk = F.pad(cumulated(log_decay[..., -1]), (1, 0))  # [N, T + 1]
    terms = torch.cat([state.unsqueeze(1), added], dim=1).flatten(-2)
    states = (decay_between(by_chunk, dtype) @ terms).unflatten(-1, state.shape[-2:])
    before = chunks.q * log_decay.exp().to(dtype).unsqueeze(-1) @ states[:, :-1]
    return within + before, states[:, -1]


def _check(
    q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], chunk_size: int, initial_state: Tensor | None
) -> None:
    """Raise unless the arguments fit each other."""
    check_queries(q)
    batch, heads, length, width = q.shape
    check_heads(q, k)
    if v.dim() != 4 or v.shape[-1] == 0:
        raise ValueError(f"v has shape {list(v.shape)}; it must be [batch, heads, tokens, width], none of them zero")
    groups = k.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, (batch, groups, length, width)),
        "v": (v, (batch, groups, length, v.shape[-1])),
        "initial_state": (initial_state, (batch, heads, width, v.shape[-1])),
    }
    expected |= {name: (gate, (batch, heads, length)) for name, gate in gates.items()}
    check_shapes(expected, f"q has shape {list(q.shape)} and v {list(v.shape)}")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r} must be an integer of at least 1")
