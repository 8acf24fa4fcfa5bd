"""Which cells a query expands: the best of a level by an upper bound of what they could hold."""

from collections.abc import Callable

import torch
from torch import Tensor

from danon_lightning.attention.merging import MASKED

__all__ = ["best_cells", "bound_query"]

# Neighbours in memory are of different groups, so that a processor takes several maxima at once.
GROUP_SIZE = 8


def bound_query(query: Tensor) -> Tensor:
    """Return queries ``[..., 2d]`` whose product with the extremes of a cell's keys bounds the logits of its tokens."""
    return torch.cat([query.clamp(min=0.0), query.clamp(max=0.0)], dim=-1)


def best_cells(scores: Tensor, cells: Callable[[], Tensor], count: int) -> Tensor:
    """Return which candidates of each query are the best; of equal ones those that come later in the sequence.

    Args:
        scores: ``[N, M, c]``, ``MASKED`` for cells that must not be chosen.
        cells: Gives the index of the cell that a candidate is, of a shape that broadcasts with ``scores``.
        count: How many are wanted, k.

    Returns:
        Candidates ``[N, M, min(k, c)]`` in no particular order, -1 where there are fewer.
    """
    candidates = scores.shape[-1]
    count = min(count, candidates)
    if count == 0:
        return torch.empty(*scores.shape[:-1], 0, dtype=torch.long, device=scores.device)
    best_values, best_candidates = _top(scores, min(count + 1, candidates))
    values, chosen = best_values[..., :count], best_candidates[..., :count]
    if candidates > count:
        # Of candidates that are equal topk takes any.
        tied = (values[..., -1] == best_values[..., -1]) & (values[..., -1] > MASKED / 2)
        rows = tied.flatten().nonzero().squeeze(-1)
        if len(rows) > 0:
            later_first = cells().expand_as(scores).flatten(0, 1)[rows].argsort(dim=-1, descending=True)
            order = scores.flatten(0, 1)[rows].gather(-1, later_first).sort(dim=-1, descending=True, stable=True)
            chosen = chosen.flatten(0, 1).index_copy(0, rows, later_first.gather(-1, order.indices[..., :count]))
            values = values.flatten(0, 1).index_copy(0, rows, order.values[..., :count])
            chosen, values = chosen.view(*scores.shape[:-1], count), values.view(*scores.shape[:-1], count)
    return chosen.masked_fill(values < MASKED / 2, -1)


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest scores of each query and which candidates have them, the largest first.

    Of many candidates only those are looked at one by one that belong to one of the ``count`` groups with the largest
    maxima: there are as many scores in these groups as are wanted that are no smaller than any other one.
    """
    candidates = scores.shape[-1]
    groups = candidates // GROUP_SIZE
    if scores.device.type != "cpu" or groups < 3 * count:
        values, chosen = scores.topk(count, dim=-1)
        return values, chosen
    grouped = scores[..., : groups * GROUP_SIZE].unflatten(-1, (GROUP_SIZE, groups))
    best = grouped.amax(dim=-2).topk(count, dim=-1, sorted=False).indices
    members = torch.arange(GROUP_SIZE, device=scores.device).unsqueeze(-1) * groups + best.unsqueeze(-2)
    rest = torch.arange(groups * GROUP_SIZE, candidates, device=scores.device)
    members = torch.cat([members.flatten(-2), rest.expand(*scores.shape[:-1], -1)], dim=-1)
    values, chosen = scores.gather(-1, members).topk(count, dim=-1)
    return values, members.gather(-1, chosen)
