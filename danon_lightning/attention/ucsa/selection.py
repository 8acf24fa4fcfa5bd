"""Which cells a query expands: the best of a level by an upper bound of what they could hold."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.merging import MASKED

__all__ = ["best_cells", "bound_query"]

# Neighbours in memory are of different groups, so that a processor takes several maxima at once.
GROUP_SIZE = 8
# Rows filled up to whole vectors of a processor are reduced in a fraction of the time.
VECTOR = 16
# Beyond all scores, and beyond the distance to a masked one.
TAKEN = 3e38


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
    rows, candidates = scores.flatten(0, 1), scores.shape[-1]
    count = min(count, candidates)
    groups = candidates // GROUP_SIZE
    if groups >= 3 * count > 0:
        # As many scores as are wanted, that are no smaller than any other one, are in the groups with the best maxima.
        whole = groups * GROUP_SIZE
        best, tied = _largest(rows[:, :whole].unflatten(-1, (GROUP_SIZE, groups)).amax(dim=1), count)
        steps = torch.arange(0, whole, groups, device=scores.device)
        rest = torch.arange(whole, candidates, device=scores.device).expand(len(rows), -1)
        members = torch.cat([(best.clamp(min=0).unsqueeze(1) + steps.unsqueeze(-1)).flatten(1), rest], dim=-1)
        among = rows.gather(-1, members)
        among[:, : count * GROUP_SIZE].unflatten(-1, (GROUP_SIZE, count)).masked_fill_((best < 0).unsqueeze(1), MASKED)
        found, tied_too = _largest(among, count)
        chosen = members.gather(-1, found.clamp(min=0)).masked_fill_(found < 0, -1)
        tied = tied | tied_too
    else:
        chosen, tied = _largest(rows, count)
    unclear = tied.nonzero().squeeze(-1)
    if len(unclear) > 0:
        later_first = cells().expand_as(scores).flatten(0, 1)[unclear].argsort(dim=-1, descending=True)
        values, order = rows[unclear].gather(-1, later_first).sort(dim=-1, descending=True, stable=True)
        best = later_first.gather(-1, order[:, :count]).masked_fill_(values[:, :count] < MASKED / 2, -1)
        chosen.index_copy_(0, unclear, best)
    return chosen.view(*scores.shape[:-1], count)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return which scores of each row are the largest, and in which rows equal ones (or nearly so) do not let one tell.

    The best are taken one by one, from all rows at once: passes without a branch take less time than any sorting.

    Args:
        scores: ``[M, c]``.
        count: How many are wanted, k, at most c.

    Returns:
        ``[M, k]``, -1 where fewer are not masked, and boolean ``[M]``; the result of such a row means nothing.
    """
    candidates = scores.shape[1]
    width = -(-candidates // VECTOR) * VECTOR
    # How far each is behind the best that is left.
    behind = scores.new_full((len(scores), width), -MASKED)
    torch.neg(scores, out=behind[:, :candidates])
    for _ in range(count):
        # No step is so long that masked ones are reached.
        behind -= behind.amin(dim=-1, keepdim=True).clamp_(max=-MASKED / (2 * count))
        F.threshold(behind, 0.0, TAKEN, inplace=True)
    taken = behind > TAKEN / 2
    counts = taken.sum(dim=-1)
    tied = counts > count
    places = taken.view(-1).nonzero().squeeze(-1)
    row = torch.arange(len(scores), device=scores.device)
    if bool((counts == count).all()):
        return places.view(len(scores), count) - row.unsqueeze(-1) * width, tied
    row = row.repeat_interleave(counts, output_size=len(places))
    slot = torch.arange(len(places), device=scores.device) - (counts.cumsum(0) - counts)[row]
    chosen = torch.full((len(scores), count + 1), -1, device=scores.device)
    # Of rows with too many, what is too much goes to a column more.
    chosen[row, slot.clamp_(max=count)] = places - row * width
    return chosen[:, :count], tied
