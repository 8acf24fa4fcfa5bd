"""The windows of a piece: queries of one block read the same blocks around it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.merging import MASKED
from danon_lightning.attention.ucsa.layout import Layout
from danon_lightning.attention.ucsa.sources import Sources

__all__ = ["Windows"]


class Windows:
    """C groups of P queries, each with a window of W blocks.

    A piece that lies in one block is a group of its own length; otherwise groups are the blocks of the sequence, the
    first and the last filled up.

    Args:
        sources: Where the blocks are.
        layout: How far windows reach.
        query: ``[N, R, m, d]``.
        start: Position of the first query.
    """

    def __init__(self, sources: Sources, layout: Layout, query: Tensor, start: int) -> None:
        """Find out what lies where."""
        self.sources, self.layout, self.start = sources, layout, start
        self.rows, self.repeats, self.length, _ = query.shape
        self.device, self.precise = query.device, torch.promote_types(query.dtype, torch.float32)
        self.first_block, self.last_block = layout.own_block(start), layout.own_block(start + self.length - 1)
        self.groups = self.last_block - self.first_block + 1
        self.group_length = layout.block_size if self.groups > 1 else self.length
        self.missing_before = (start - layout.num_sinks) % layout.block_size if self.groups > 1 else 0

    def pick(self, sources: Sources) -> tuple[Tensor, Tensor]:
        """Return the blocks that windows of the piece lie in, without those beyond either end."""
        first, last = self._range()
        return sources.window_keys[:, first:last], sources.window_values[:, first:last]

    def _range(self) -> tuple[int, int]:
        """Return where these blocks lie among those of the sources."""
        first = self.first_block - self.layout.window_blocks - self.sources.window_first
        last = first + self.groups + self.layout.blocks_in_window - 1
        return max(0, first), min(last, self.sources.window_keys.shape[1])

    def take(self, x: Tensor) -> Tensor:
        """Return of blocks ``[N, w, S, ...]`` the windows of all groups ``[N, C, W·S, ...]``, filled up with zeros."""
        first = self.first_block - self.layout.window_blocks - self.sources.window_first
        before = max(0, -first)
        after = self.groups + self.layout.blocks_in_window - 1 - before - x.shape[1]
        if before or after:
            ends = [x.new_zeros(x.shape[0], count, *x.shape[2:]) for count in (before, after)]
            x = torch.cat([ends[0], x, ends[1]], dim=1)
        if self.groups == 1:
            return x.flatten(1, 2).unsqueeze(1)
        if x[:1].is_contiguous():
            # Windows of a row overlap in memory and need no copy.
            shape = (x.shape[0], self.groups, self.layout.blocks_in_window * self.layout.block_size, *x.shape[3:])
            return x.as_strided(shape, x.stride())
        shifts = [x[:, shift : shift + self.groups] for shift in range(self.layout.blocks_in_window)]
        return torch.cat(shifts, dim=2)

    def bias(self) -> Tensor:
        """Return what hides the future, what is beyond either end, and padding ``[N or 1, C or 1, R·P or 1, W·S]``."""
        layout, sources, size = self.layout, self.sources, self.layout.block_size
        inside = self.first_block - layout.window_blocks >= sources.window_first and (
            layout.causal
            or self.last_block + layout.window_blocks < sources.window_first + sources.window_keys.shape[1]
        )
        # Away from the ends the pattern is the same in all groups.
        groups = torch.arange(1 if inside else self.groups, device=self.device).view(-1, 1, 1) * size
        start = layout.num_sinks + self.first_block * size
        keys = start - layout.window_blocks * size + groups
        keys = keys + torch.arange(layout.blocks_in_window * size, device=self.device)
        queries = groups + self.start - self.missing_before
        queries = queries + torch.arange(self.group_length, device=self.device).unsqueeze(-1)
        begin = layout.num_sinks + sources.window_first * size
        # [C or 1, R·P or 1, W·S]
        hidden = (keys < begin) | (keys >= begin + sources.window_keys.shape[1] * size)
        if layout.causal:
            hidden = (hidden | (keys > queries)).repeat(1, self.repeats, 1)
        if sources.window_hidden is not None:
            first, last = self._range()
            hidden = hidden | self.take(sources.window_hidden[:, first:last]).unsqueeze(2)
        hidden = hidden if hidden.dim() == 4 else hidden.unsqueeze(0)
        return torch.zeros(hidden.shape, dtype=self.precise, device=self.device).masked_fill_(hidden, MASKED)

    def group(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Return ``[N, C, R·P, ...]`` of what each query has ``[N, R·m, ...]``, groups filled up with ``fill``."""
        if self.groups == 1:
            return x.unsqueeze(1)
        x = x.unflatten(1, (self.repeats, self.length))
        after = self.groups * self.group_length - self.length - self.missing_before
        if self.missing_before or after:
            x = F.pad(x, (0, 0) * (x.dim() - 3) + (self.missing_before, after), value=fill)
        return x.unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(2, 3)

    def ungroup(self, x: Tensor) -> Tensor:
        """Undo ``group``."""
        if self.groups == 1:
            return x.squeeze(1)
        x = x.unflatten(2, (self.repeats, -1)).transpose(1, 2).flatten(2, 3)
        return x[:, :, self.missing_before : self.missing_before + self.length].flatten(1, 2)

    def add(self, total: Tensor, grad: Tensor) -> None:
        """Add gradients of windows ``[N, C, W·S, d]`` to those of their blocks ``[N, w, S, d]``."""
        pieces = grad.unflatten(2, (self.layout.blocks_in_window, -1))
        first = self.first_block - self.layout.window_blocks - self.sources.window_first
        offset = min(0, first)  # of the first window, from the first block that exists
        for shift in range(self.layout.blocks_in_window):
            start = offset + shift
            skip, stop = max(0, -start), min(self.groups, total.shape[1] - start)
            if skip < stop:
                total[:, start + skip : start + stop] += pieces[:, skip:stop, shift]
