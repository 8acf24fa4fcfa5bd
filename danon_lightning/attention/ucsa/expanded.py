"""The blocks that queries have chosen, read token by token: most of the work of UCSA, for many queries at a time."""

from functools import partial

import torch
from torch import Tensor

from danon_lightning.attention.dropout import dropout_factors
from danon_lightning.attention.merging import MASKED
from danon_lightning.attention.scratch import Scratch
from danon_lightning.attention.ucsa.gathered import attend_gathered, gradients_of_gathered
from danon_lightning.attention.ucsa.sources import Sources
from danon_lightning.attention.ucsa.tiles import Tiles

__all__ = ["ExpandedBlocks"]

# Queries merged at once: few enough for what they have read to stay in the cache of a processor core.
MERGED_AT_ONCE = 2048
MERGED_AT_ONCE_ON_ACCELERATORS = 1 << 20


class ExpandedBlocks:
    """Blocks chosen by M = R·m queries of each row.

    Args:
        sources: What they may read.
        query: Rotated and scaled ``[N, R, m, d]``.
        blocks: The blocks that each of them chose ``[N, R, m, k]``, -1 for none.
        dropout_p: Probability of dropping an attention weight.
        seed: With the same seed, the same weights are dropped.
    """

    def __init__(
        self, sources: Sources, query: Tensor, blocks: Tensor, *, dropout_p: float = 0.0, seed: int = 0
    ) -> None:
        """Sort queries by what they have chosen."""
        self.sources, self.heads = sources, query.shape[1:3]
        # Contiguous, so that queries of all rows can be taken without copying everything.
        self.query = query.flatten(1, 2).contiguous()  # [N, M, d]
        self._keep = dropout_factors(dropout_p, seed, query.device) if dropout_p > 0.0 else None
        slots, groups = blocks.flatten(1, 2), sources.block_keys.shape[1]
        self.tiles: Tiles | None = None
        if slots.shape[-1] == 0 or groups == 0:
            return
        if sources.slots is not None:
            held = sources.slots.gather(1, slots.clamp(min=0).flatten(1).long()).view_as(slots)
            slots = torch.where(slots < 0, -1, held)
        tiles = Tiles.of(slots, groups)
        self.tiles = tiles if len(tiles.group) > 0 else None

    def merge(self, output: Tensor, lse: Tensor, scratch: Scratch) -> None:
        """Merge what the queries read here with what they have read elsewhere, in place.

        Args:
            output: ``[N, R, m, d]``, float32 or float64, zero for queries that have seen nothing.
            lse: Its log-sum-exp ``[N, R, m]``.
            scratch: Memory for what has been read.
        """
        if self.tiles is None:
            return
        bias = partial(_padding_bias, self.sources, lse.dtype)
        outputs, lses = attend_gathered(self.tiles, self.query, *self._blocks(), bias, self._keep, scratch)
        total = torch.logsumexp(torch.cat([lse.flatten(1, 2).unsqueeze(-1), lses], dim=-1), dim=-1)
        weights = (lses - total.unsqueeze(-1)).exp_().masked_fill_(~self.tiles.present, 0.0)
        others = (lse - total.unflatten(1, self.heads)).exp_().unsqueeze(-1)
        lse.copy_(total.unflatten(1, self.heads))
        count = MERGED_AT_ONCE if output.device.type == "cpu" else MERGED_AT_ONCE_ON_ACCELERATORS
        count = max(1, count // (output.shape[0] * self.heads[0]))
        places, weights = (x.unflatten(1, self.heads) for x in (self.tiles.place, weights))
        for start in range(0, self.heads[1], count):
            here = slice(start, start + count)
            read = self.tiles.sum_places(outputs, places[:, :, here], weights[:, :, here])
            output[:, :, here].mul_(others[:, :, here]).add_(read)

    def backward(self, grad: Tensor, lse: Tensor, shift: Tensor, totals: Sources, scratch: Scratch) -> Tensor | None:
        """Add up gradients of keys and values.

        Args:
            grad: That of the output ``[N, R, m, d]``.
            lse: That of all logits ``[N, R, m]``, infinite where there is nothing to differentiate.
            shift: Product of output and gradient ``[N, R, m]``.
            totals: Where the gradients of the sources are added up.
            scratch: Memory for what is computed on the way.

        Returns:
            The gradient of the query ``[N, R, m, d]``; nothing if nothing was chosen.
        """
        if self.tiles is None:
            return None
        found = gradients_of_gathered(
            self.tiles,
            self.query,
            self._blocks(),
            partial(_padding_bias, self.sources, lse.dtype),
            self._keep,
            (grad.flatten(1, 2).contiguous(), lse.flatten(1, 2), shift.flatten(1, 2)),
            (totals.block_keys, totals.block_values),
            scratch,
        )
        return found.unflatten(1, self.heads)

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all blocks; contiguous, so that some can be taken without copying everything."""
        return self.sources.block_keys.contiguous(), self.sources.block_values.contiguous()


def _padding_bias(sources: Sources, dtype: torch.dtype, tiles: Tiles) -> Tensor | None:
    """Hide padding in selected blocks."""
    if sources.block_hidden is None:
        return None
    hidden = tiles.take_groups(sources.block_hidden).unsqueeze(1)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, MASKED)
