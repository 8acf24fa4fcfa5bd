"""Dynamic adaptive long-range attention (DALA), the softmax part, in its fast, parallel form.

Queries of one block share a window of two blocks and one set of remembered tokens, so both are batched products of
dense tiles. The cost is O(n·(2B + M)); the work goes on a few blocks at a time, so that logits never take more memory
than those of a few blocks where no gradient is wanted.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from danon_lightning.attention.dala.arguments import check_settings, check_tensors
from danon_lightning.attention.dala.blocks import Blocks, with_block_before
from danon_lightning.attention.dala.local import distance_coefficients, local_bias
from danon_lightning.attention.dala.memory import memory_scores, select_memory, take_tokens
from danon_lightning.attention.merging import MASKED, AttentionPart, attention_part, has_visible_keys, merge_parts

__all__ = ["DALAStats", "dala_attention"]


class DALAStats(NamedTuple):
    """What a query attended to; detached.

    Attributes:
        memory_weight: Share of the attention mass on the importance memory ``[b, H, n]``.
        lse: Log-sum-exp of all visible logits ``[b, H, n]``.
        memory_tokens: The tokens that the queries of each block remember, -1 where there are fewer ``[b, blocks, m]``.
    """

    memory_weight: Tensor
    lse: Tensor
    memory_tokens: Tensor


@overload
def dala_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_importance: Tensor,
    block_size: int,
    memory_size: int,
    distance_decay: Tensor,
    window_width: Tensor | float,
    importance_threshold: float = ...,
    recency: float = ...,
    memory_bias: Tensor | None = ...,
    rope_base: float | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def dala_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_importance: Tensor,
    block_size: int,
    memory_size: int,
    distance_decay: Tensor,
    window_width: Tensor | float,
    importance_threshold: float = ...,
    recency: float = ...,
    memory_bias: Tensor | None = ...,
    rope_base: float | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, DALAStats]: ...


def dala_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_importance: Tensor,
    block_size: int,
    memory_size: int,
    distance_decay: Tensor,
    window_width: Tensor | float,
    importance_threshold: float = 0.0,
    recency: float = 1e-3,
    memory_bias: Tensor | None = None,
    rope_base: float | None = 10000.0,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DALAStats]:
    """Attend, causally, to a local window and to the most important tokens before it, in one softmax.

    Query i of block c = ⌊i/B⌋ sees the tokens j <= i of blocks c - 1 and c with the logit
    q·k/√d + ℓ_j - λ(i - j) - (i - j)²/(2w²), q and k rotated; and of the tokens before block c - 1 the M with the
    largest ℓ_j + ρ·j, of equal ones the later, with the logit q·k/√d + ℓ_j + bias_i, q and k not rotated. The selection
    has no gradient, ℓ has one through the logits.

    Args:
        q: Queries ``[b, H, n, d]``, neither rotated nor scaled.
        k: Keys ``[b, G, n, d]``, H divisible by G.
        v: Values ``[b, G, n, d]``.
        log_importance: ℓ, the logarithm of an importance between 0 and 1, shared by the heads ``[b, n]``.
        block_size: Tokens B in a block.
        memory_size: Tokens M in the memory; 0 leaves the local window alone.
        distance_decay: λ ``[H]``.
        window_width: w, positive: a number or of shape ``[]``, ``[H]`` or ``[H, blocks]``, blocks = ⌈n/B⌉.
        importance_threshold: Tokens of less importance are not remembered; from 0 to 1.
        recency: ρ, what a position adds to the score of a token in the selection.
        memory_bias: Added to all logits of the memory ``[b, H, n]``; ``None`` means zero.
        rope_base: Base of the rotary embedding in the window; ``None`` means no rotation.
        key_padding_mask: True for real tokens ``[b, n]``, boolean; ``None`` means that all are.
        dropout_p: Probability of dropping an attention weight.
        return_stats: Whether to return statistics too.

    Returns:
        The output ``[b, H, n, d]`` in the dtype of ``v``, zero in rows that see no real token; with ``return_stats``
        also a ``DALAStats``.

    Raises:
        ValueError: If shapes do not fit each other or a setting is out of range.
    """
    check_settings(q, block_size, memory_size, importance_threshold)
    blocks = Blocks.of(q.shape[-2], block_size, q.device)
    check_tensors(
        q,
        k,
        v,
        blocks.count,
        log_importance=log_importance,
        distance_decay=distance_decay,
        window_width=window_width,
        memory_bias=memory_bias,
        key_padding_mask=key_padding_mask,
    )
    dtype = torch.promote_types(q.dtype, torch.float32)
    importance = log_importance.to(dtype)
    if key_padding_mask is not None:
        importance = importance.masked_fill(~key_padding_mask, MASKED)
    scores = memory_scores(importance, 0, importance_threshold=importance_threshold, recency=recency)
    memory_tokens = select_memory(scores, block_size, memory_size)
    coefficients = distance_coefficients(distance_decay, window_width, dtype)

    windows = _attend_windows(q, k, v, importance, coefficients, blocks, rope_base, dropout_p)
    memories = _attend_memories(q, k, v, importance, memory_bias, memory_tokens, blocks, dropout_p)
    outputs, lses, weights = [], [], []
    for parts in zip(windows, memories, strict=True) if memory_tokens.shape[-1] else zip(windows, strict=True):
        output, lse = merge_parts(parts)
        if key_padding_mask is not None:
            output = output.masked_fill(~has_visible_keys(lse).unsqueeze(-1), 0.0)
        outputs.append(output)
        if return_stats:
            lses.append(lse.detach())
            weights.append((parts[-1].lse.detach() - lses[-1]).exp() if len(parts) > 1 else torch.zeros_like(lses[-1]))
    joined = blocks.join(outputs, dim=2)
    if not return_stats:
        return joined
    return joined, DALAStats(blocks.join(weights, dim=2), blocks.join(lses, dim=2), memory_tokens)


def _attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    importance: Tensor,
    coefficients: Tensor,
    blocks: Blocks,
    rope_base: float | None,
    dropout_p: float,
) -> Iterator[AttentionPart]:
    """Yield, piece by piece, attention to the own block and the one before; outputs ``[b, H, g, B, d]``."""
    heads, width = q.shape[1], q.shape[-1]
    keys, values = blocks.cut_rotated(k, rope_base), iter(blocks.cut(v))
    masses = iter(blocks.cut(importance[:, None, :, None], MASKED))  # [b, 1, g, B, 1]
    if blocks.count > 1:
        keys, values, masses = with_block_before(keys), with_block_before(values), with_block_before(masses, MASKED)
    tokens = torch.arange(blocks.size * min(blocks.count, 2), device=q.device)
    distances = tokens[-blocks.size :].unsqueeze(-1) - tokens
    slopes = blocks.split(coefficients.expand(-1, blocks.count, -1), dim=1)
    queries = blocks.cut_rotated(q, rope_base)
    for query, key, value, mass, slope in zip(queries, keys, values, masses, slopes, strict=True):
        if key.shape[1] != heads:
            key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        bias = local_bias(slope, distances) + mass.mT  # [b, H, g, B, 2B]
        yield attention_part(query * width**-0.5, key, value, bias, dropout_p=dropout_p)


def _attend_memories(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    importance: Tensor,
    memory_bias: Tensor | None,
    memory_tokens: Tensor,
    blocks: Blocks,
    dropout_p: float,
) -> Iterator[AttentionPart]:
    """Yield, piece by piece, attention to the remembered tokens; outputs ``[b, H, g, B, d]``."""
    heads, width = q.shape[1], q.shape[-1]
    masses = importance.gather(1, memory_tokens.clamp(min=0).flatten(1)).view(memory_tokens.shape)
    masses = masses.masked_fill(memory_tokens < 0, MASKED)[:, None, :, None, :]  # [b, 1, blocks, 1, m]
    keys, values = (_take_pieces(x, memory_tokens, heads, blocks) for x in (k, v))
    queries = blocks.cut(q)
    biases = [None] * len(queries) if memory_bias is None else blocks.cut(memory_bias.unsqueeze(-1))
    for query, key, value, mass, bias in zip(queries, keys, values, blocks.split(masses, dim=2), biases, strict=True):
        # Expanded, so that it is added in place.
        part = attention_part(
            query * width**-0.5, key, value, mass.expand(-1, -1, -1, blocks.size, -1), dropout_p=dropout_p
        )
        yield part if bias is None else part._replace(lse=part.lse + bias.squeeze(-1))


def _take_pieces(x: Tensor, tokens: Tensor, heads: int, blocks: Blocks) -> Iterator[Tensor]:
    """Yield, piece by piece, the rows of the given tokens ``[b, blocks, m]``; see ``take_tokens``."""
    if torch.is_grad_enabled() and x.requires_grad:
        # The backward pass keeps these anyway, and adds up their gradients once instead of once a piece.
        yield from blocks.split(take_tokens(x, tokens, heads), dim=2)
    else:
        for piece in blocks.split(tokens, dim=1):
            yield take_tokens(x, piece, heads)
