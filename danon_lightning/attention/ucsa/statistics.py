"""How much the queries of UCSA read."""

import torch
from torch import Tensor

from danon_lightning.attention.statistics import count_real
from danon_lightning.attention.ucsa.layout import Layout

__all__ = ["count_read"]


def count_read(selected: Tensor, layout: Layout, real: Tensor) -> dict[str, Tensor]:
    """Count what each query reads; queries that are padding read nothing.

    Args:
        selected: The blocks that each query has read token by token beyond the window ``[b, H, n, k]``, -1 for none.
        layout: Who sees what.
        real: True for real tokens ``[b, n]``, boolean.

    Returns:
        ``tokens_read``, those read one by one ``[b, H, n]``; and, if summaries are of one level, ``keys_read``:
        tokens and summaries.
    """
    length, size, sinks = real.shape[1], layout.block_size, layout.num_sinks
    blocks = layout.num_blocks(length)
    queries = torch.arange(length, device=real.device)
    zero, last = torch.zeros_like(queries), torch.full_like(queries, length)
    before, after = layout.cells_before(queries, 0), torch.full_like(queries, blocks)
    if layout.causal:
        last = queries + 1
    else:
        after = layout.cells_after(queries, 0).clamp(max=blocks)
    near = count_real(zero, last.clamp(max=sinks), real)
    start, stop = ((border * size + sinks).clamp(max=length) for border in (before, after))
    near += count_real(start, stop.minimum(last), real)
    starts = (torch.arange(blocks, device=real.device) * size + sinks).clamp(max=length)
    tokens = count_real(starts, (starts + size).clamp(max=length), real)  # [b, blocks]
    chosen = selected >= 0
    read = near.unsqueeze(1).expand(selected.shape[:3])
    if blocks:
        of_blocks = tokens[:, None, None].expand(*selected.shape[:3], -1)
        read = read + of_blocks.gather(-1, selected.clamp(min=0)).masked_fill(~chosen, 0).sum(dim=-1)
    asking = real.unsqueeze(1)
    found = {"tokens_read": read * asking}
    if layout.tree_levels == 1:
        filled = tokens > 0
        outside = count_real(zero, before, filled) + count_real(after, torch.full_like(after, blocks), filled)
        summaries = outside.unsqueeze(1) - chosen.sum(dim=-1)
        found["keys_read"] = (read + summaries) * asking
    return found
