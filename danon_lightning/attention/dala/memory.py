"""Which tokens of the past the importance memory holds.

A token's score is its log-importance plus a bonus that grows with its position, and noise if there is any. The score
never changes, so that what has once dropped out of the best M never returns, and the memory can be kept block by block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.merging import MASKED

__all__ = ["add_to_tokens", "gumbel_noise", "memory_scores", "select_memory", "take_tokens"]

# Blocks whose memories are selected at once: fewer steps after one another, against more candidates a step.
BLOCKS_AT_ONCE = 8


def memory_scores(
    log_importance: Tensor,
    first: int,
    *,
    importance_threshold: float,
    recency: float,
    selection_bias: Tensor | None = None,
) -> Tensor:
    """Return how much each token deserves its place in the memory, detached.

    Args:
        log_importance: ``[b, n]``, ``MASKED`` for padding.
        first: Position of the first of the n tokens.
        importance_threshold: Least importance of a token that may be remembered.
        recency: What a position adds to the score.
        selection_bias: Added to the scores ``[b, n]``; ``None`` means zero.

    Returns:
        Scores ``[b, n]``, minus infinity for what must not be remembered; float64 (float32 on devices without it), for
        the bonus of one position is small beside the position.
    """
    dtype = torch.float32 if log_importance.device.type == "mps" else torch.float64
    importance = log_importance.detach().to(dtype)
    positions = torch.arange(first, first + importance.shape[-1], device=importance.device, dtype=dtype)
    eligible = (importance > MASKED / 2) & (importance.exp() >= importance_threshold)
    scores = importance + recency * positions
    if selection_bias is not None:
        scores = scores + selection_bias.detach().to(dtype)
    return scores.masked_fill(~eligible, float("-inf"))


def gumbel_noise(like: Tensor, scale: float) -> Tensor | None:
    """Return noise in the shape of a tensor, ``None`` for a scale of zero.

    The M tokens with the best scores are then drawn one by one, each with a probability in proportion to
    exp(score / scale).

    Reference:
        Kool, van Hoof & Welling 2019, "Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick for Sampling
        Sequences Without Replacement", ICML 2019.
    """
    if scale == 0:
        return None
    tiny = torch.finfo(torch.float32).tiny
    exponential = torch.empty(like.shape, dtype=torch.float32, device=like.device).exponential_()
    return exponential.clamp_(min=tiny).log_().mul_(-scale)


def select_memory(scores: Tensor, block_size: int, memory_size: int) -> Tensor:
    """Return for each block c the best tokens before block c - 1; of equal ones the later.

    Args:
        scores: As ``memory_scores`` gives them ``[b, n]``.
        block_size: Tokens B in a block.
        memory_size: Number of tokens M.

    Returns:
        Indices of tokens ``[b, blocks, m]`` in no particular order, m at most M and at most the number of tokens that
        any block can remember; -1 where there are fewer.
    """
    batch, length = scores.shape
    blocks = -(-length // block_size)
    size = min(memory_size, max(0, blocks - 2) * block_size)
    if size == 0:
        return torch.full((batch, blocks, 0), -1, device=scores.device)
    # Among ranks there are no ties, and the rank leads back to the token.
    order = torch.argsort(scores, dim=-1, stable=True)
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(length, device=scores.device).expand(batch, -1))
    ranks.masked_fill_(scores == float("-inf"), -1)

    steps = -(-(blocks - 1) // BLOCKS_AT_ONCE)
    span = BLOCKS_AT_ONCE * block_size
    leaving = F.pad(ranks[:, : steps * span], (0, max(0, steps * span - length)), value=-1).unflatten(1, (steps, span))
    # In the i-th block of a step, the first i blocks that leave the window during the step are there to be remembered.
    too_new = torch.arange(span, device=scores.device) // block_size >= torch.arange(
        1, BLOCKS_AT_ONCE + 1, device=scores.device
    ).unsqueeze(-1)
    memory = torch.full((batch, size), -1, device=scores.device)
    # Nothing has left the window before blocks 0 and 1.
    selected = [memory.unsqueeze(1).expand(-1, 2, -1)]
    for step in range(steps):
        candidates = leaving[:, step].unsqueeze(1).expand(-1, BLOCKS_AT_ONCE, -1).masked_fill(too_new, -1)
        candidates = torch.cat([memory.unsqueeze(1).expand(-1, BLOCKS_AT_ONCE, -1), candidates], dim=-1)
        best = candidates.topk(size, dim=-1, sorted=False).values
        memory = best[:, -1]
        selected.append(best)
    chosen = torch.cat(selected, dim=1)[:, :blocks]
    tokens = order.gather(-1, chosen.clamp(min=0).flatten(1)).view_as(chosen)
    return tokens.masked_fill_(chosen < 0, -1)


def take_tokens(x: Tensor, tokens: Tensor, heads: int) -> Tensor:
    """Return the rows of the given tokens for every query head.

    Args:
        x: Keys or values ``[b, G, n, d]``, contiguous.
        tokens: Indices of tokens ``[b, ..., m]``, the same for all heads; negative ones give some row.
        heads: Number of query heads H, a multiple of G.

    Returns:
        ``[b, H, ..., m, d]``.
    """
    rows = _rows(x, tokens, heads)
    # Rows of one matrix: copied whole, unlike by gather.
    return x.view(-1, x.shape[-1]).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])


def add_to_tokens(total: Tensor, tokens: Tensor, x: Tensor) -> None:
    """Add ``x [b, H, ..., m, d]`` to the rows of ``total [b, G, n, d]`` from which ``take_tokens`` takes."""
    rows = _rows(total, tokens, x.shape[1])
    total.view(-1, total.shape[-1]).index_add_(0, rows.flatten(), x.to(total.dtype).reshape(-1, x.shape[-1]))


def _rows(x: Tensor, tokens: Tensor, heads: int) -> Tensor:
    """Return the rows of ``x`` as a matrix in which tokens are, ``[b, H, ..., m]``."""
    batch, groups, length, _ = x.shape
    row = torch.arange(batch * groups, device=x.device).view(batch, groups) * length
    row = row.repeat_interleave(heads // groups, dim=1).view(batch, heads, *[1] * (tokens.dim() - 1))
    return row + tokens.clamp(min=0).unsqueeze(1)
