"""A piece of the sequence: its queries, what they read, and the gradients of that.

Every set of keys comes down to the same batched products of queries, keys and values, ``[B, P, d]``, ``[B, w, d]`` and
``[B, w, d]``. Sinks, the window and the top of the tree are dense; what a query has chosen is gathered in tiles.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from danon_lightning.attention.dropout import dropout_factors
from danon_lightning.attention.merging import MASKED, AttentionPart, has_visible_keys, merge_parts
from danon_lightning.attention.ucsa.layout import Layout
from danon_lightning.attention.ucsa.products import attend, gradients
from danon_lightning.attention.ucsa.selection import best_cells, bound_query
from danon_lightning.attention.ucsa.sources import Level, Sources
from danon_lightning.attention.ucsa.tiles import Tiles
from danon_lightning.attention.ucsa.windows import Windows

__all__ = ["Found", "Piece"]


class Found(NamedTuple):
    """What a piece of M = R·m queries attended to.

    Attributes:
        output: ``[N, M, d]``, float32 or float64.
        lse: Log-sum-exp of all logits ``[N, M]``.
        near_lse: That of the sinks and the window alone.
        cells_lse: That of the cells alone.
        chosen: At each level from the top on, the candidates that were expanded ``[N, M, k]``, -1 for none.
        blocks: The blocks read token by token ``[N, M, k]``, -1 for none.
    """

    output: Tensor
    lse: Tensor
    near_lse: Tensor
    cells_lse: Tensor
    chosen: list[Tensor]
    blocks: Tensor


@dataclass
class _Set:
    """A set of keys.

    Args:
        kind: Whether its keys are near, cells, or selected blocks.
        pick: Finds keys and values, or where their gradients are added up, ``[N, w, d]``; with tiles
            ``[N, groups, w, d]``; in windows ``[N, blocks, S, d]``.
        bias: Gives what is added to the logits, of a shape that broadcasts with ``[B, P, w]``, or nothing.
        tiles: Which groups of keys the queries chose; ``None`` if all queries read the same.
        windows: Whether queries read the window of their block.
    """

    kind: str
    pick: Callable[[Sources], tuple[Tensor, Tensor]]
    bias: Callable[[Tiles | None], Tensor | None]
    tiles: Tiles | None = None
    windows: bool = False


class Piece:
    """Queries that follow one another, all of them sinks or none.

    Args:
        sources: What they may read.
        layout: Who sees what.
        query: Rotated and scaled ``[N, R, m, d]``.
        start: Position of the first of them.
        dropout_p: Probability of dropping an attention weight.
        seed: With the same seed, the same weights are dropped.
        chosen: What an earlier pass chose; ``None`` lets this one choose.
    """

    def __init__(
        self,
        sources: Sources,
        layout: Layout,
        query: Tensor,
        start: int,
        *,
        dropout_p: float = 0.0,
        seed: int = 0,
        chosen: list[Tensor] | None = None,
    ) -> None:
        """Find out what lies where."""
        self.sources, self.layout = sources, layout
        self.rows, self.repeats, self.length, self.width = query.shape
        # Contiguous, so that queries of all rows can be taken without copying everything.
        self.query = query.flatten(1, 2).contiguous()  # [N, M, d]
        self.start, self.device = start, query.device
        self.precise = torch.promote_types(query.dtype, torch.float32)
        positions = torch.arange(start, start + self.length, device=query.device)
        self.positions = positions.repeat(self.repeats)  # [M]
        self._keep = dropout_factors(dropout_p, seed, query.device) if dropout_p > 0.0 else None
        self.known = chosen
        self.chosen: list[Tensor] = []
        self.blocks = torch.empty(self.rows, self.query.shape[1], 0, dtype=torch.long, device=query.device)
        self.windows = Windows(sources, layout, query, start)
        self.last_block = self.windows.last_block

    def forward(self) -> Found:
        """Choose and attend."""
        parts: dict[str, list[AttentionPart]] = {"near": [], "cells": [], "blocks": []}
        for keys in self._sets():
            parts[keys.kind].append(self._attend_tiles(keys) if keys.tiles else self._attend_dense(keys))
        output, lse = merge_parts([part for kind in parts.values() for part in kind])
        output = output.masked_fill(~has_visible_keys(lse).unsqueeze(-1), 0.0)
        nothing = torch.full_like(lse, MASKED)
        near, cells = (
            torch.logsumexp(torch.stack([nothing, *(part.lse for part in parts[kind])]), dim=0)
            for kind in ("near", "cells")
        )
        return Found(output, lse, near, cells, self.chosen, self.blocks)

    def backward(self, grad: Tensor, output: Tensor, lse: Tensor, totals: Sources) -> Tensor:
        """Add up gradients.

        Args:
            grad: That of the output ``[N, R, m, d]``.
            output: What ``forward`` returned, likewise.
            lse: Likewise ``[N, R, m]``.
            totals: Where the gradients of the sources are added up.

        Returns:
            The gradient of the query ``[N, R, m, d]``.
        """
        grad, output, lse = (x.flatten(1, 2).contiguous() for x in (grad, output, lse))
        shift = (grad.to(lse.dtype) * output).sum(dim=-1)
        # Queries that see nothing give all weights the value exp(-inf).
        lse = lse.masked_fill(~has_visible_keys(lse), float("inf"))
        total = torch.zeros(self.query.shape, dtype=lse.dtype, device=self.device)
        for keys in self._sets():
            if keys.tiles:
                total += self._gradients_of_tiles(keys, grad, lse, shift, totals)
            else:
                total += self._gradients_of_dense(keys, grad, lse, shift, totals)
        return total.unflatten(1, (self.repeats, self.length))

    # What is read ----------------------------------------------------------------------------------------------------

    def _sets(self) -> Iterator[_Set]:
        """Yield all sets of keys, choosing on the way what to expand."""
        if self.sources.sink_keys.shape[1] > 0:
            yield _Set("near", lambda x: (x.sink_keys, x.sink_values), self._sink_bias)
        if self.sources.window_keys.shape[1] > 0:
            yield _Set("near", self.windows.pick, lambda tiles: self.windows.bias(), windows=True)
        expanded: Tensor | None = None
        for level in reversed(range(self.layout.tree_levels)):
            cells = self.sources.levels[level]
            if level == self.layout.tree_levels - 1:
                expanded, keys = self._top(cells, level)
            else:
                expanded, keys = self._children(cells, level, expanded)
            if keys is not None:
                yield keys
        assert expanded is not None
        self.blocks = expanded
        if self.sources.slots is not None and expanded.shape[-1] > 0:
            slots = self.sources.slots.gather(1, expanded.clamp(min=0).flatten(1)).view_as(expanded)
            expanded = torch.where(expanded < 0, -1, slots)
        tiles = self._tiles(expanded, self.sources.block_keys.shape[1])
        if tiles is not None:
            yield _Set("blocks", lambda x: (x.block_keys, x.block_values), self._token_bias, tiles)

    def _sink_bias(self, tiles: Tiles | None) -> Tensor | None:
        """Hide padding, and the future from queries that are sinks themselves."""
        hidden = None if self.sources.sink_hidden is None else self.sources.sink_hidden.unsqueeze(1)
        if self.layout.causal and self.start < self.layout.num_sinks:
            sinks = torch.arange(self.sources.sink_keys.shape[1], device=self.device)
            future = sinks > self.positions.unsqueeze(-1)
            hidden = future if hidden is None else hidden | future
        return None if hidden is None else self._hide(hidden)

    def _token_bias(self, tiles: Tiles | None) -> Tensor | None:
        """Hide padding in selected blocks."""
        if self.sources.block_hidden is None or tiles is None:
            return None
        return self._hide(tiles.take_groups(self.sources.block_hidden).unsqueeze(1))

    def _hide(self, hidden: Tensor) -> Tensor:
        """Return the bias of what is hidden."""
        return torch.zeros(hidden.shape, dtype=self.precise, device=self.device).masked_fill_(hidden, MASKED)

    # Choosing --------------------------------------------------------------------------------------------------------

    def _top(self, cells: Level, level: int) -> tuple[Tensor, _Set | None]:
        """Return the expanded cells of the uppermost level, and the set of all others."""
        count = cells.keys.shape[1]
        if self.layout.causal:
            seen = max(0, self.last_block - self.layout.window_blocks) // self.layout.tree_factor**level
            count = min(count, seen)
        if count == 0:
            return self.blocks, None
        indices = torch.arange(count, device=self.device)
        visible = self.layout.outside(indices, self.positions.unsqueeze(-1), level)  # [M, c]

        def score() -> Tensor:
            scores = _precise(torch.bmm(bound_query(self.query), cells.bounds[:, :count].mT))
            if cells.bias is not None:
                scores.unflatten(1, (self.repeats, self.length)).add_(cells.bias[:, :, None, :count])
            allowed = visible if cells.expandable is None else visible & cells.expandable[:, None, :count]
            return scores.masked_fill_(~allowed, MASKED)

        chosen = self._choose(score, lambda: indices)
        hidden = _mark(chosen, count).logical_or_(~visible)

        def bias(tiles: Tiles | None) -> Tensor:
            return torch.where(hidden, MASKED, cells.log_mass[:, None, :count])

        def pick(sources: Sources) -> tuple[Tensor, Tensor]:
            return sources.levels[level].keys[:, :count], sources.levels[level].values[:, :count]

        return chosen, _Set("cells", pick, bias)

    def _children(self, cells: Level, level: int, parents: Tensor | None) -> tuple[Tensor, _Set | None]:
        """Return the expanded ones of the children of ``parents`` and of the frontier, and the set of all others."""
        assert parents is not None
        factor = self.layout.tree_factor
        frontier = self.layout.frontier(self.positions, level).expand(self.rows, -1, -1)
        groups = cells.keys.shape[1] // factor
        # The window may lie beyond the end of the sequence.
        parents = torch.cat([parents, frontier.masked_fill(frontier >= groups, -1)], dim=-1)
        tiles = self._tiles(parents, groups)
        if tiles is None:
            return self.blocks, None
        visible = tiles.present.unsqueeze(-1).expand(-1, -1, -1, factor).contiguous()  # [N, M, s, r]
        # What was expanded lies outside of the window, all of it; of the frontier only a part does.
        cut = parents[:, :, -frontier.shape[-1] :].unsqueeze(-1) * factor + torch.arange(factor, device=self.device)
        visible[:, :, -frontier.shape[-1] :] &= self.layout.outside(cut, self.positions.view(-1, 1, 1), level)

        def children() -> Tensor:
            indices = parents.unsqueeze(-1) * factor + torch.arange(factor, device=self.device)
            return indices.clamp_(min=0).flatten(2)

        def score() -> Tensor:
            query, bounds = bound_query(self.query), cells.bounds.unflatten(1, (-1, factor))
            places = query.new_empty(*tiles.query.shape, factor)
            for some, place in tiles.split(factor, places):
                torch.bmm(some.take_queries(query), some.take_groups(bounds).mT, out=place)
            scores = _precise(tiles.to_pairs(places))
            allowed = visible
            if cells.bias is not None or cells.expandable is not None:
                row = torch.arange(self.rows, device=self.device).view(-1, 1, 1, 1)
                index = children().view_as(visible)
            if cells.bias is not None:
                heads = cells.bias.shape[1]
                head = torch.arange(self.repeats, device=self.device).repeat_interleave(self.length) % heads
                scores += cells.bias.flatten()[(row * heads + head.view(-1, 1, 1)) * cells.keys.shape[1] + index]
            if cells.expandable is not None:
                allowed = visible & cells.expandable.flatten()[row * cells.keys.shape[1] + index]
            return scores.masked_fill_(~allowed, MASKED).flatten(2)

        chosen = self._choose(score, children)
        hidden = _mark(chosen, parents.shape[-1] * factor).view_as(visible).logical_or_(~visible)
        log_mass = cells.log_mass.unflatten(1, (-1, factor))

        def bias(tiles: Tiles | None) -> Tensor:
            assert tiles is not None
            return torch.where(tiles.take_pairs(hidden), MASKED, tiles.take_groups(log_mass).unsqueeze(1))

        def pick(sources: Sources) -> tuple[Tensor, Tensor]:
            here = sources.levels[level]
            return here.keys.unflatten(1, (-1, factor)), here.values.unflatten(1, (-1, factor))

        candidates = chosen.clamp(min=0)
        expanded = parents.gather(-1, candidates // factor) * factor + candidates % factor
        return torch.where(chosen < 0, -1, expanded), _Set("cells", pick, bias, tiles)

    def _choose(self, score: Callable[[], Tensor], cells: Callable[[], Tensor]) -> Tensor:
        """Return the best candidates, or what an earlier pass took for them."""
        if self.known is not None:
            chosen = self.known[len(self.chosen)].long()
        elif self.layout.num_selected == 0:
            chosen = self.blocks
        else:
            chosen = best_cells(score(), cells, self.layout.num_selected)
        self.chosen.append(chosen)
        return chosen

    def _tiles(self, chosen: Tensor, groups: int) -> Tiles | None:
        """Return pairs as tiles, or nothing if there are no pairs."""
        if chosen.shape[-1] == 0 or groups == 0:
            return None
        tiles = Tiles.of(chosen, groups)
        return tiles if len(tiles.group) > 0 else None

    # Products --------------------------------------------------------------------------------------------------------

    def _attend_dense(self, keys: _Set) -> AttentionPart:
        """Attend to keys that queries share."""
        query, key, value = self._operands(keys)
        output, lse = attend(query, key, value, keys.bias(None), self._keep)
        if keys.windows:
            output, lse = self.windows.ungroup(output), self.windows.ungroup(lse)
        return AttentionPart(output, lse)

    def _attend_tiles(self, keys: _Set) -> AttentionPart:
        """Attend to keys that queries have chosen."""
        assert keys.tiles is not None
        all_keys, all_values = keys.pick(self.sources)
        outputs = self.query.new_empty(*keys.tiles.query.shape, self.width, dtype=self.precise)
        lses = self.query.new_empty(keys.tiles.query.shape, dtype=self.precise)
        for tiles, output, lse in keys.tiles.split(all_keys.shape[2], outputs, lses):
            key, value = tiles.take_groups(all_keys), tiles.take_groups(all_values)
            output[:], lse[:] = attend(tiles.take_queries(self.query), key, value, keys.bias(tiles), self._keep)
        lses = keys.tiles.to_pairs(lses).masked_fill_(~keys.tiles.present, MASKED)
        lse = torch.logsumexp(lses, dim=-1)
        shares = (lses - lse.unsqueeze(-1)).exp_().masked_fill_(~keys.tiles.present, 0.0)
        return AttentionPart(keys.tiles.sum_to_queries(outputs, shares), lse)

    def _gradients_of_dense(self, keys: _Set, grad: Tensor, lse: Tensor, shift: Tensor, totals: Sources) -> Tensor:
        """Add up gradients of keys and values; return that of the query."""
        query, key, value = self._operands(keys)
        if keys.windows:
            grad, lse, shift = (
                self.windows.group(grad),
                self.windows.group(lse, float("inf")),
                self.windows.group(shift),
            )
        grads = gradients(query, key, value, keys.bias(None), self._keep, grad, lse, shift)
        for total, own in zip(keys.pick(totals), grads[1:], strict=True):
            if keys.windows:
                self.windows.add(total, own)
            else:
                total += own
        return self.windows.ungroup(grads.query) if keys.windows else grads.query

    def _gradients_of_tiles(self, keys: _Set, grad: Tensor, lse: Tensor, shift: Tensor, totals: Sources) -> Tensor:
        """Add up gradients of keys and values; return that of the query."""
        assert keys.tiles is not None
        all_keys, all_values = keys.pick(self.sources)
        places = self.query.new_empty(*keys.tiles.query.shape, self.width)
        for tiles, place in keys.tiles.split(all_keys.shape[2], places):
            key, value = tiles.take_groups(all_keys), tiles.take_groups(all_values)
            grads = gradients(
                tiles.take_queries(self.query),
                key,
                value,
                keys.bias(tiles),
                self._keep,
                tiles.take_queries(grad),
                # Nobody is in an empty place.
                tiles.take_queries(lse).masked_fill_(tiles.empty, float("inf")),
                tiles.take_queries(shift),
                place,
            )
            for total, own in zip(keys.pick(totals), grads[1:], strict=True):
                tiles.add_to_groups(total, own)
        return keys.tiles.sum_to_queries(places.to(lse.dtype), keys.tiles.present.to(lse.dtype))

    def _operands(self, keys: _Set) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of a set without tiles, as batches of matrices."""
        key, value = keys.pick(self.sources)
        if not keys.windows:
            return self.query, key, value
        key, value = (self.windows.take(x).flatten(0, 1) for x in (key, value))
        return self.windows.group(self.query), key, value


def _mark(chosen: Tensor, count: int) -> Tensor:
    """Return which of ``count`` candidates were chosen, boolean ``[N, M, count]``."""
    marked = torch.zeros(*chosen.shape[:-1], count + 1, dtype=torch.bool, device=chosen.device)
    return marked.scatter_(-1, torch.where(chosen < 0, count, chosen), True)[..., :count].contiguous()


def _precise(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
