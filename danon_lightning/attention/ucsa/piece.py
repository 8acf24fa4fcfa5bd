"""A piece of the sequence: its queries, what they read, and the gradients of that.

Every set of keys comes down to the same batched products of queries, keys and values, ``[B, P, d]``, ``[B, w, d]`` and
``[B, w, d]``. Sinks, the window and the top of the tree are dense; the children of what a query has chosen are gathered
in tiles. A piece is small, so that what it computes on the way stays in the cache of a processor core; the blocks that
its queries choose are read for many pieces at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.dropout import dropout_factors
from danon_lightning.attention.merging import MASKED, AttentionPart, has_visible_keys, merge_parts
from danon_lightning.attention.ucsa.gathered import attend_gathered, gradients_of_gathered
from danon_lightning.attention.ucsa.layout import Layout
from danon_lightning.attention.ucsa.products import attend, gradients
from danon_lightning.attention.ucsa.selection import best_cells, bound_query
from danon_lightning.attention.ucsa.sources import CELLS_ABREAST, Level, Sources
from danon_lightning.attention.ucsa.tiles import Tiles
from danon_lightning.attention.ucsa.windows import Windows

__all__ = ["Found", "Piece"]


class Found(NamedTuple):
    """What a piece of M = R·m queries attended to, before it reads blocks.

    Attributes:
        output: ``[N, M, d]``, float32 or float64.
        lse: Log-sum-exp of these logits ``[N, M]``.
        near_lses: Those of the sinks and of the window, each alone.
        cells_lses: Those of the cells of each level.
        chosen: At each level from the top on, the candidates that were expanded ``[N, M, k]``, -1 for none.
        blocks: The blocks to be read token by token ``[N, M, k]``, -1 for none.
    """

    output: Tensor
    lse: Tensor
    near_lses: list[Tensor]
    cells_lses: list[Tensor]
    chosen: list[Tensor]
    blocks: Tensor


@dataclass
class _Set:
    """A set of keys.

    Args:
        kind: Whether its keys are near or cells.
        pick: Finds keys and values, or where their gradients are added up, ``[N, w, d]``; with tiles
            ``[N, groups, w, d]``; in windows ``[N, blocks, S, d]``.
        bias: Gives what is added to the logits, of a shape that broadcasts with ``[B, P, w]``, or nothing.
        tiles: Which groups of keys the queries chose; ``None`` if all queries read the same.
        windows: Whether queries read the window of their block.
        part: Gives the result where there is a shorter way to it.
    """

    kind: str
    pick: Callable[[Sources], tuple[Tensor, Tensor]]
    bias: Callable[[Tiles | None], Tensor | None]
    tiles: Tiles | None = None
    windows: bool = False
    part: Callable[[], AttentionPart] | None = None


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
        parts: dict[str, list[AttentionPart]] = {"near": [], "cells": []}
        for keys in self._sets():
            if keys.part is not None:
                part = keys.part()
            else:
                part = self._attend_tiles(keys) if keys.tiles else self._attend_dense(keys)
            parts[keys.kind].append(part)
        output, lse = merge_parts([part for kind in parts.values() for part in kind])
        output = output.masked_fill(~has_visible_keys(lse).unsqueeze(-1), 0.0)
        near, cells = ([part.lse for part in parts[kind]] for kind in ("near", "cells"))
        return Found(output, lse, near, cells, self.chosen, self.blocks)

    def backward(self, grad: Tensor, lse: Tensor, shift: Tensor, totals: Sources) -> Tensor:
        """Add up gradients.

        Args:
            grad: That of the output ``[N, R, m, d]``.
            lse: That of all logits, those of blocks included ``[N, R, m]``; infinite where there is nothing to
                differentiate.
            shift: Product of output and gradient ``[N, R, m]``.
            totals: Where the gradients of the sources are added up.

        Returns:
            The gradient of the query ``[N, R, m, d]``.
        """
        grad, lse, shift = (x.flatten(1, 2).contiguous() for x in (grad, lse, shift))
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
        if self.layout.causal and self.start + self.length <= self.layout.num_sinks:
            # Sinks see each other alone.
            return
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

    def _sink_bias(self, tiles: Tiles | None) -> Tensor | None:
        """Hide padding, and the future from queries that are sinks themselves."""
        hidden = None if self.sources.sink_hidden is None else self.sources.sink_hidden.unsqueeze(1)
        if self.layout.causal and self.start < self.layout.num_sinks:
            sinks = torch.arange(self.sources.sink_keys.shape[1], device=self.device)
            future = sinks > self.positions.unsqueeze(-1)
            hidden = future if hidden is None else hidden | future
        return None if hidden is None else self._hide(hidden)

    def _hide(self, hidden: Tensor) -> Tensor:
        """Return the bias of what is hidden."""
        return torch.zeros(hidden.shape, dtype=self.precise, device=self.device).masked_fill_(hidden, MASKED)

    # Choosing --------------------------------------------------------------------------------------------------------

    def _top(self, cells: Level, level: int) -> tuple[Tensor, _Set | None]:
        """Return the expanded cells of the uppermost level, and the set of all others."""
        count = cells.keys.shape[1]
        if self.layout.causal:
            seen = max(0, self.last_block - self.layout.window_blocks) // self.layout.tree_factor**level
            count = min(count, -(-seen // CELLS_ABREAST) * CELLS_ABREAST)
        if count == 0:
            return self.blocks, None
        # The first cells are seen by all queries: nothing needs to be hidden there.
        common = max(0, self.windows.first_block - self.layout.window_blocks) // self.layout.tree_factor**level
        common = min(common, count) if self.layout.causal else 0
        indices = torch.arange(count, device=self.device)
        hidden = self._hide(~self.layout.outside(indices[common:], self.positions.unsqueeze(-1), level))

        def score() -> Tensor:
            scores = _precise(torch.bmm(bound_query(self.query), cells.bounds[:, :count].mT))
            if cells.bias is not None:
                scores.unflatten(1, (self.repeats, self.length)).add_(cells.bias[:, :, None, :count])
            if cells.expandable is not None:
                scores.masked_fill_(~cells.expandable[:, None, :count], MASKED)
            scores[:, :, common:] += hidden  # [M, c - common]
            return scores

        chosen = self._choose(score, lambda: indices)

        def bias(tiles: Tiles | None) -> Tensor:
            masses = cells.log_mass[:, None, :count]
            # Columns more, where those go that have chosen nothing.
            biases = masses.new_empty(self.rows, len(self.positions), count + CELLS_ABREAST)
            biases[:, :, :common] = masses[:, :, :common]
            torch.add(masses[:, :, common:], hidden, out=biases[:, :, common:count])
            return biases.scatter_(-1, torch.where(chosen < 0, count, chosen), MASKED)[:, :, :count]

        def pick(sources: Sources) -> tuple[Tensor, Tensor]:
            return sources.levels[level].keys[:, :count], sources.levels[level].values[:, :count]

        return chosen, _Set("cells", pick, bias)

    def _children(self, cells: Level, level: int, parents: Tensor | None) -> tuple[Tensor, _Set | None]:
        """Return the expanded ones of the children of ``parents`` and of the frontier, and the set of all others."""
        assert parents is not None
        factor = self.layout.tree_factor
        frontier = self.layout.frontier(self.positions, level).expand(self.rows, -1, -1)
        first, groups = cells.first // factor, cells.keys.shape[1] // factor
        # The window may lie beyond the end of the sequence.
        parents = torch.cat([parents, frontier.masked_fill(frontier >= first + groups, -1)], dim=-1)
        if first > 0:
            parents = torch.where(parents < 0, -1, parents - first)
        tiles = self._tiles(parents, groups)
        if tiles is None:
            return self.blocks, None
        # What was expanded lies outside of the window, all of it; of the frontier only a part does.
        edge = slice(parents.shape[-1] - frontier.shape[-1], None)
        cut = (parents[:, :, edge] + first).unsqueeze(-1) * factor + torch.arange(factor, device=self.device)
        outside = self.layout.outside(cut, self.positions.view(-1, 1, 1), level) & tiles.present[:, :, edge, None]

        def children() -> Tensor:
            indices = parents.unsqueeze(-1) * factor + torch.arange(factor, device=self.device)
            return indices.clamp_(min=0).flatten(2)

        products = None if self.known is not None else self._judge_children(tiles, cells)  # [N, M, s, 2r]
        if products is not None:
            if not bool(tiles.present[:, :, : edge.start].all()):
                products.masked_fill_(~tiles.present.unsqueeze(-1), MASKED)
            products[:, :, edge].unflatten(-1, (2, factor)).add_(self._hide(~outside).unsqueeze(-2))

        def score() -> Tensor:
            assert products is not None
            scores = products[..., :factor]
            if cells.bias is not None or cells.expandable is not None:
                row = torch.arange(self.rows, device=self.device).view(-1, 1, 1, 1)
                index = children().view_as(scores)
            if cells.bias is not None:
                heads = cells.bias.shape[1]
                head = torch.arange(self.repeats, device=self.device).repeat_interleave(self.length) % heads
                scores += cells.bias.flatten()[(row * heads + head.view(-1, 1, 1)) * cells.keys.shape[1] + index]
            if cells.expandable is not None:
                scores.masked_fill_(~cells.expandable.flatten()[row * cells.keys.shape[1] + index], MASKED)
            return scores.flatten(2)

        chosen = self._choose(score, children)
        log_mass = cells.log_mass.unflatten(1, (-1, factor))

        @cache
        def hidden() -> Tensor:
            marked = _mark(chosen, parents.shape[-1] * factor).unflatten(-1, (-1, factor))
            marked[:, :, edge] |= ~outside
            return marked

        def bias(tiles: Tiles | None) -> Tensor:
            assert tiles is not None
            return torch.where(tiles.take_pairs(hidden()), MASKED, tiles.take_groups(log_mass).unsqueeze(1))

        def pick(sources: Sources) -> tuple[Tensor, Tensor]:
            here = sources.levels[level]
            return here.keys.unflatten(1, (-1, factor)), here.values.unflatten(1, (-1, factor))

        def part() -> AttentionPart:
            assert products is not None
            # Where nothing was chosen, a bound goes, which nobody needs any more.
            logits = torch.where(chosen < 0, 0, (chosen // factor * 2 + 1) * factor + chosen % factor)
            products.flatten(2).scatter_(-1, logits, MASKED)
            return self._read_children(products[..., factor:].flatten(2), children(), cells)

        candidates = chosen.clamp(min=0)
        expanded = (parents.gather(-1, candidates // factor) + first) * factor + candidates % factor
        shorter = part if products is not None and self._keep is None else None
        return torch.where(chosen < 0, -1, expanded), _Set("cells", pick, bias, tiles, part=shorter)

    def _judge_children(self, tiles: Tiles, cells: Level) -> Tensor:
        """Return bounds of all children in tiles, and behind them their logits as summaries ``[N, M, s, 2r]``."""
        assert cells.judges is not None
        places = self.query.new_empty(*tiles.query.shape, cells.judges.shape[2], dtype=self.precise)
        query, factor = bound_query(self.query), self.layout.tree_factor
        masses = cells.log_mass.unflatten(1, (-1, factor))
        for some, place in tiles.split(2 * factor, places):
            asking, judges = some.take_queries(query), some.take_groups(cells.judges).mT
            if query.dtype == self.precise:
                torch.bmm(asking, judges, out=place)
            else:
                place.copy_(torch.bmm(asking, judges))
            place[..., factor:] += some.take_groups(masses).unsqueeze(1)
        return tiles.to_pairs(places)

    def _read_children(self, logits: Tensor, children: Tensor, cells: Level) -> AttentionPart:
        """Return what queries read of children ``[N, M, s·r]`` of known logits."""
        weights = torch.softmax(logits, dim=-1)
        # As in ``attend``.
        lse = logits.amax(dim=-1) - weights.amax(dim=-1).log()
        if self.rows > 1:
            children = children + torch.arange(self.rows, device=self.device).view(-1, 1, 1) * cells.values.shape[1]
        output = F.embedding_bag(
            children.flatten(0, 1),
            _precise(cells.values).flatten(0, 1),
            mode="sum",
            per_sample_weights=weights.flatten(0, 1),
        )
        return AttentionPart(output.view(self.rows, -1, self.width), lse)

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
        outputs, lses = attend_gathered(keys.tiles, self.query, *keys.pick(self.sources), keys.bias, self._keep)
        lse = torch.logsumexp(lses, dim=-1)
        shares = (lses - lse.unsqueeze(-1)).exp_().masked_fill_(~keys.tiles.present, 0.0)
        return AttentionPart(keys.tiles.sum_places(outputs, keys.tiles.place, shares), lse)

    def _gradients_of_dense(self, keys: _Set, grad: Tensor, lse: Tensor, shift: Tensor, totals: Sources) -> Tensor:
        """Add up gradients of keys and values; return that of the query."""
        query, key, value = self._operands(keys)
        bias = keys.bias(None)
        if not keys.windows:
            grads = gradients(query, key, value, bias, self._keep, grad, lse, shift)
            for total, own in zip(keys.pick(totals), grads[1:], strict=True):
                total += own
            return grads.query
        windows, groups = self.windows, query.shape[:2]
        operands = [query, key, value, windows.group(grad), windows.group(lse, float("inf")), windows.group(shift)]
        query, key, value, grad, lse, shift = (x.flatten(0, 1) for x in operands)
        bias = bias if bias is None or bias.shape[:2].numel() == 1 else bias.expand(*groups, -1, -1)
        hidden = None if bias is None else bias.flatten(0, 1)
        grads = gradients(query, key, value, hidden, self._keep, grad, lse, shift)
        for total, own in zip(keys.pick(totals), grads[1:], strict=True):
            windows.add(total, own.unflatten(0, groups))
        return windows.ungroup(grads.query.unflatten(0, groups))

    def _gradients_of_tiles(self, keys: _Set, grad: Tensor, lse: Tensor, shift: Tensor, totals: Sources) -> Tensor:
        """Add up gradients of keys and values; return that of the query."""
        assert keys.tiles is not None
        sources, sums = keys.pick(self.sources), keys.pick(totals)
        return gradients_of_gathered(keys.tiles, self.query, sources, keys.bias, self._keep, (grad, lse, shift), sums)

    def _operands(self, keys: _Set) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of a set without tiles, as batches of matrices, two deep in windows."""
        key, value = keys.pick(self.sources)
        if not keys.windows:
            return self.query, key, value
        return self.windows.group(self.query), self.windows.take(key), self.windows.take(value)


def _mark(chosen: Tensor, count: int) -> Tensor:
    """Return which of ``count`` candidates were chosen, boolean ``[N, M, count]``."""
    marked = torch.zeros(*chosen.shape[:-1], count + 1, dtype=torch.bool, device=chosen.device)
    return marked.scatter_(-1, torch.where(chosen < 0, count, chosen), True)[..., :count].contiguous()


def _precise(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
