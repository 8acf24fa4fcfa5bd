"""Dynamic adaptive long-range attention (DALA), the softmax part, in its fast, parallel form.

Queries of one block share a window of two blocks and one set of remembered tokens, so both are batched products of
dense tiles. The cost is O(n·(2B + M)); the work goes on a few blocks at a time, so that logits never take more memory
than those of a few blocks where no gradient is wanted.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from danon_lightning.attention.checks import check_rotation
from danon_lightning.attention.dala.arguments import check_settings, check_tensors
from danon_lightning.attention.dala.blocks import Blocks
from danon_lightning.attention.dala.local import distance_coefficients
from danon_lightning.attention.dala.memory import memory_scores, select_memory
from danon_lightning.attention.dala.work import SoftmaxWork
from danon_lightning.attention.joint import Joint
from danon_lightning.attention.merging import MASKED
from danon_lightning.attention.recompute import in_pieces

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
    selection_bias: Tensor | None = ...,
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
    selection_bias: Tensor | None = ...,
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
    selection_bias: Tensor | None = None,
    rope_base: float | None = 10000.0,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DALAStats]:
    """Attend, causally, to a local window and to the most important tokens before it, in one softmax.

    Query i of block c = ⌊i/B⌋ sees the tokens j <= i of blocks c - 1 and c with the logit
    q·k/√d + ℓ_j - λ(i - j) - (i - j)²/(2w²), q and k rotated; and of the tokens before block c - 1 the M with the
    largest ℓ_j + ρ·j + ε_j, of equal ones the later, with the logit q·k/√d + ℓ_j + bias_i, q and k not rotated. The
    selection has no gradient, ℓ has one through the logits.

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
        selection_bias: ε, added to the scores in the selection alone ``[b, n]``, such as noise; ``None`` means zero.
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
    check_rotation(q, rope_base)
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
        selection_bias=selection_bias,
        key_padding_mask=key_padding_mask,
    )
    dtype = torch.promote_types(q.dtype, torch.float32)
    importance = log_importance.to(dtype)
    if key_padding_mask is not None:
        importance = importance.masked_fill(~key_padding_mask, MASKED)
    scores = memory_scores(
        importance, 0, importance_threshold=importance_threshold, recency=recency, selection_bias=selection_bias
    )
    memory_tokens = select_memory(scores, block_size, memory_size)
    coefficients = distance_coefficients(distance_decay, window_width, dtype)

    remembered = memory_tokens.shape[-1] > 0
    if remembered:
        # Whole rows are taken of them.
        k, v = k.contiguous(), v.contiguous()
    tensors = [q, k, v, importance.unsqueeze(1), coefficients]
    if memory_bias is not None:
        tensors.append(memory_bias)
    if remembered:
        masses = importance.gather(1, memory_tokens.clamp(min=0).flatten(1)).view(memory_tokens.shape)
        tensors.append(masses.masked_fill(memory_tokens < 0, MASKED).unsqueeze(1))
    seed = int(torch.randint(2**31, ())) if dropout_p > 0.0 else 0
    work = SoftmaxWork(
        blocks, memory_tokens if remembered else None, memory_bias is not None, rope_base, dropout_p, seed
    )
    (output, lses), _ = in_pieces(work, tensors, blocks.length, blocks.at_once * blocks.size)
    if not return_stats:
        return output
    joint = Joint(output, lses.detach())
    weight = (joint.lses[..., -1] - joint.lse).exp() if remembered else torch.zeros_like(joint.lse)
    return output, DALAStats(weight, joint.lse, memory_tokens)
