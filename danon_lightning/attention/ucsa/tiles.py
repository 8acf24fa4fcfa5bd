"""Pairs of a query and a group of keys that it chose, gathered in tiles that share the group.

Every query reads other keys. Gathering them for each query alone moves as much memory as it computes; sorted by what
they read, pairs form small dense products instead.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.scratch import Scratch

__all__ = ["Tiles"]

# Tiles worked on at once hold about this many logits: few enough to stay in the cache of a processor core.
LOGITS_AT_ONCE = 1 << 17
LOGITS_AT_ONCE_ON_ACCELERATORS = 1 << 26


class Tiles(NamedTuple):
    """Pairs of queries ``[N, M]`` and one of s slots each, T tiles of P of them.

    Attributes:
        group: The group of keys that a tile reads, among those of all N rows ``[T]``.
        query: The query of each place in a tile, among those of all N rows ``[T, P]``; any where the place is empty.
        pair: The pair of query and slot likewise ``[T, P]``.
        empty: Which places in a tile hold no pair ``[T, P]``.
        place: Where the pair of a query and a slot lies, among all places ``[N, M, s]``; zero where it is absent.
        present: Which pairs there are ``[N, M, s]``.
    """

    group: Tensor
    query: Tensor
    pair: Tensor
    empty: Tensor
    place: Tensor
    present: Tensor

    @classmethod
    def of(cls, chosen: Tensor, num_groups: int) -> "Tiles":
        """Sort pairs.

        Args:
            chosen: Groups that each query reads, among those of its row ``[N, M, s]``; -1 where there is none.
            num_groups: Groups of keys in a row.
        """
        rows, _, slots = chosen.shape
        present = chosen >= 0
        row = torch.arange(rows, device=chosen.device).view(-1, 1, 1) * num_groups
        groups = rows * num_groups
        keys = torch.where(present, chosen + row, groups).flatten()
        # Stable, so that runs do not differ; narrow keys are sorted in less time.
        keys, order = keys.to(torch.int32).sort(stable=True)
        counts = torch.bincount(keys, minlength=groups + 1)
        pairs = keys.numel() - int(counts[groups])
        counts, keys, order = counts[:groups], keys[:pairs].long(), order[:pairs]
        size = _tile_size(pairs, int((counts > 0).sum()))
        tiles = (counts + size - 1) // size
        group = torch.repeat_interleave(torch.arange(groups, device=chosen.device), tiles)
        # A pair lies as far behind the first place of its group as it does in the sorted order.
        shift = (tiles.cumsum(0) - tiles) * size - (counts.cumsum(0) - counts)
        where = torch.arange(pairs, device=chosen.device) + shift[keys]
        pair = torch.full((group.numel() * size,), -1, device=chosen.device).scatter_(0, where, order)
        place = torch.zeros_like(present, dtype=torch.long).flatten().scatter_(0, order, where)
        empty, pair = pair < 0, pair.clamp_(min=0)
        return cls(
            group,
            (pair // slots).view(-1, size),
            pair.view(-1, size),
            empty.view(-1, size),
            place.view_as(chosen),
            present,
        )

    def split(self, width: int, *buffers: Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield a few tiles at a time, such that logits of ``width`` keys fit the cache; ``place`` stays whole.

        Args:
            width: Keys in a group.
            buffers: What each tile has ``[T, ...]``; views of the same tiles are yielded along.
        """
        budget = LOGITS_AT_ONCE if self.group.device.type == "cpu" else LOGITS_AT_ONCE_ON_ACCELERATORS
        count = max(1, budget // (self.query.shape[1] * width))
        for start in range(0, len(self.group), count):
            group, query, pair, empty = (x[start : start + count] for x in self[:4])
            tiles = Tiles(group, query, pair, empty, self.place, self.present)
            yield tiles, *(x[start : start + count] for x in buffers)

    def take_queries(self, x: Tensor, held: tuple[Scratch, str] | None = None) -> Tensor:
        """Return ``[T, P, ...]`` of what each query has ``[N, M, ...]``, in memory ``held`` under a name."""
        return _rows(x.flatten(0, 1), self.query.flatten(), held).unflatten(0, self.query.shape)

    def take_pairs(self, x: Tensor) -> Tensor:
        """Return ``[T, P, ...]`` of what each pair has ``[N, M, s, ...]``."""
        return x.flatten(0, 2).index_select(0, self.pair.flatten()).unflatten(0, self.pair.shape)

    def take_groups(self, x: Tensor, held: tuple[Scratch, str] | None = None) -> Tensor:
        """Return ``[T, ...]`` of what each group of keys has ``[N, groups, ...]``, in memory ``held`` under a name."""
        return _rows(x.flatten(0, 1), self.group, held)

    def to_pairs(self, x: Tensor) -> Tensor:
        """Return ``[N, M, s, ...]`` of what each place has ``[T, P, ...]``; something finite where pairs are absent."""
        return x.flatten(0, 1).index_select(0, self.place.flatten()).unflatten(0, self.place.shape)

    @staticmethod
    def sum_places(x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum over the slots of queries.

        Args:
            x: What each place has ``[T, P, d]``, float32 or float64.
            places: Where pairs lie, all of ``place`` or a part of it ``[..., s]``.
            weights: ``[..., s]``, zero where pairs are absent.

        Returns:
            ``[..., d]``.
        """
        # One pass over memory, unlike gathering and summing.
        total = F.embedding_bag(
            places.flatten(0, -2), x.flatten(0, 1), mode="sum", per_sample_weights=weights.flatten(0, -2)
        )
        return total.unflatten(0, places.shape[:-1])

    def add_to_groups(self, total: Tensor, x: Tensor) -> None:
        """Add what each tile has ``[T, ...]`` to the total of its group of keys ``[N, groups, ...]``, contiguous."""
        total.view(-1, *total.shape[2:]).index_add_(0, self.group, x.to(total.dtype))


def _rows(x: Tensor, index: Tensor, held: tuple[Scratch, str] | None) -> Tensor:
    """Return rows ``[len(index), ...]`` of ``x``."""
    if held is None:
        return x.index_select(0, index)
    scratch, name = held
    return torch.index_select(x, 0, index, out=scratch.take(name, (len(index), *x.shape[1:]), x.dtype, x.device))


def _tile_size(pairs: int, groups: int) -> int:
    """Return P: tiles of popular groups are to be full, and rare groups not to leave most of theirs empty."""
    size = 8
    while size < 64 and 4 * size * groups < pairs:
        size *= 2
    return size
