"""UCSA written as its definition reads: one softmax over an explicit matrix of n queries x (tokens and all cells).

It shares no code with the fast form, costs O(n²) and exists to check it, in float64.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ucsa_attention_reference"]


def ucsa_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    num_selected: int,
    window_blocks: int,
    num_sinks: int,
    tree_levels: int = 1,
    tree_factor: int = 16,
    rope_base: float | None = 10000.0,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    error_tolerance: float = 0.0,
    selection_bias: Tensor | Callable[[Tensor], Tensor] | None = None,
    unavailable: Tensor | None = None,
    reach: int | None = None,
    return_coverage: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``ucsa_attention`` naively; see there for the other arguments.

    Args:
        q: ``[b, H, n, d]``.
        k: ``[b, G, n, d]``.
        v: ``[b, G, n, d]``.
        block_size: S.
        num_selected: k.
        window_blocks: w.
        num_sinks: g.
        tree_levels: T.
        tree_factor: r.
        rope_base: Base of the rotary embedding.
        causal: Whether a query sees the past only.
        key_padding_mask: ``[b, n]``.
        error_tolerance: Least error of blocks that may be expanded.
        selection_bias: ``[b, G or H, blocks]``, or a function that makes it of the errors.
        unavailable: Blocks whose tokens are gone when a query comes, so that they can be read as summaries only
            ``[b, n, blocks]``, boolean; a cell all of whose blocks are gone is not expanded.
        reach: Most cells of the uppermost level before the window of a query; beyond it they are merged, as in a
            stream. ``None``: no limit.
        return_coverage: Whether to return also how often each query covers each token ``[b, H, n, n]``.

    Returns:
        ``[b, H, n, d]``.
    """
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    repeats = heads // groups
    real = torch.ones(batch, length, dtype=torch.bool) if key_padding_mask is None else key_padding_mask.cpu()
    # The tokens of each cell, level by level; children are neighbours.
    blocks = -(-max(0, length - num_sinks) // block_size)
    tokens = [[range(num_sinks + b * block_size, min(length, num_sinks + (b + 1) * block_size)) for b in range(blocks)]]
    # With a limited reach there are levels above the tree, as many as there can be.
    while len(tokens) < tree_levels or (reach is not None and len(tokens[-1]) > 1):
        below = tokens[-1]
        tokens.append(
            [
                range(x[0].start, x[-1].stop)
                for x in (below[j : j + tree_factor] for j in range(0, len(below), tree_factor))
            ]
        )
    rotated_q, rotated_k = (_rotate(x, [float(i) for i in range(length)], rope_base) for x in (q, k))

    # One column for every token and every cell.
    keys, values, masses = [rotated_k], [v], [torch.ones(batch, length)]
    highest, lowest, columns = [], [], [length]
    for level, cells in enumerate(tokens):
        columns.append(columns[-1] + len(cells))
        span = block_size * tree_factor**level
        means_k, means_v, mass, high, low = [], [], [], [], []
        for cell in cells:
            weight = real[:, None, cell.start : cell.stop, None].to(k)
            count = weight.sum(dim=2).clamp(min=1)
            means_k.append((weight * k[:, :, cell.start : cell.stop]).sum(dim=2) / count)
            means_v.append((weight * v[:, :, cell.start : cell.stop]).sum(dim=2) / count)
            mass.append(weight.sum(dim=(1, 2, 3)))
            inside, here = weight > 0, rotated_k[:, :, cell.start : cell.stop].detach()
            high.append(torch.where(inside, here, -torch.inf).amax(dim=2))
            low.append(torch.where(inside, here, torch.inf).amin(dim=2))
        if cells:
            centres = [num_sinks + j * span + (span - 1) / 2 for j in range(len(cells))]
            keys.append(_rotate(torch.stack(means_k, dim=2), centres, rope_base))
            values.append(torch.stack(means_v, dim=2))
            masses.append(torch.stack(mass, dim=1).cpu())
            highest.append(torch.stack(high, dim=2))
            lowest.append(torch.stack(low, dim=2))
    all_keys, all_values = (torch.cat(x, dim=2).repeat_interleave(repeats, dim=1) for x in (keys, values))
    log_mass = torch.cat(masses, dim=1).clamp(min=1).log().to(q)[:, None, None, :]
    logits = rotated_q @ all_keys.transpose(-1, -2) / width**0.5 + log_mass

    errors = torch.zeros(batch, groups, blocks, dtype=torch.float64)
    for index, cell in enumerate(tokens[0]):
        weight = real[:, None, cell.start : cell.stop, None].to(v)
        here, mean = v.detach()[:, :, cell.start : cell.stop], all_values[:, ::repeats, length + index].detach()
        rest = (weight * (here - mean.unsqueeze(2))).square().sum(dim=(2, 3)).sqrt()
        norm = (weight * here).square().sum(dim=(2, 3)).sqrt()
        errors[:, :, index] = torch.where(norm > 0, rest / norm, 0.0).cpu()
    bias = selection_bias(errors) if callable(selection_bias) else selection_bias
    bias = torch.zeros(batch, groups, blocks) if bias is None else bias.detach().cpu()
    bias = bias.repeat_interleave(heads // bias.shape[1], dim=1)

    positive, negative = rotated_q.detach().clamp(min=0), rotated_q.detach().clamp(max=0)
    scores = [
        (positive @ x.repeat_interleave(repeats, dim=1).mT + negative @ y.repeat_interleave(repeats, dim=1).mT).cpu()
        / width**0.5
        for x, y in zip(highest, lowest, strict=True)
    ]
    visible = torch.zeros(batch, heads, length, logits.shape[-1], dtype=torch.bool)
    coverage = torch.zeros(batch, heads, length, length, dtype=torch.int)
    for row, head in itertools.product(range(batch), range(heads)):
        full = [bool(real[row, cell.start : cell.stop].any()) for cell in tokens[0]]
        bounds = [x[row, head].tolist() for x in scores]
        for i in range(length):
            may = (errors[row, head // repeats] >= error_tolerance).tolist()
            if unavailable is not None:
                may = [held and not gone for held, gone in zip(may, unavailable[row, i].tolist(), strict=True)]
            read, summaries = _look(
                i,
                length,
                tokens,
                [x[i] for x in bounds],
                bias[row, head].tolist(),
                full,
                may,
                num_selected,
                block_size * window_blocks,
                num_sinks,
                tree_levels,
                tree_factor,
                reach,
                causal,
            )
            visible[row, head, i, read] = real[row, read]
            coverage[row, head, i, read] += 1
            for level, index in summaries:
                visible[row, head, i, columns[level] + index] = True
                coverage[row, head, i, tokens[level][index].start : tokens[level][index].stop] += 1
    visible = visible.to(q.device)
    blind = ~visible.any(dim=-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(~visible & ~blind, float("-inf")), dim=-1).masked_fill(blind, 0.0)
    output = weights @ all_values
    return (output, coverage) if return_coverage else output


def _look(
    i: int,
    length: int,
    tokens: list[list[range]],
    bounds: list[list[float]],
    bias: list[float],
    full: list[bool],
    may: list[bool],
    num_selected: int,
    margin: int,
    num_sinks: int,
    tree_levels: int,
    tree_factor: int,
    reach: int | None,
    causal: bool,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return which tokens query i reads, and which cells (of which level).

    Args:
        i: Position of the query.
        length: n.
        tokens: The tokens of each cell of each level.
        bounds: The bound of each cell of each level.
        bias: Added to the scores of blocks.
        full: Which blocks hold real tokens.
        may: Which blocks may be expanded.
        num_selected: k.
        margin: Tokens of the window beyond the own block.
        num_sinks: g.
        tree_levels: T.
        tree_factor: r.
        reach: Most cells of the uppermost level before the window.
        causal: Whether only the past is seen.
    """
    # Sinks have the window of the first block.
    own = next((cell for cell in tokens[0] if max(i, num_sinks) in cell), range(0))
    start, stop = own.start - margin, own.stop + margin

    def outside(cell: range) -> bool:
        return cell.stop <= start or (not causal and cell.start >= stop)

    inside = [j for cell in tokens[0] if not outside(cell) for j in cell]
    read = [j for j in [*range(min(num_sinks, length)), *inside] if j <= i or not causal]
    summaries: list[tuple[int, int]] = []
    expanded: list[int] = []
    merged = 0
    if reach is not None:
        # How many cells of a level there are, of which the oldest are merged, until none needs to be.
        level, most, there = tree_levels - 1, reach, sum(cell.stop <= start for cell in tokens[tree_levels - 1])
        while there > 0:
            gone = 0
            while there - gone > most:
                gone += tree_factor
            if level == tree_levels - 1:
                merged = gone
            else:
                held = [
                    j for j in range(gone, there) if any(full[j * tree_factor**level : (j + 1) * tree_factor**level])
                ]
                summaries += [(level, j) for j in held]
            level, most, there = level + 1, 2 * tree_factor, gone // tree_factor
    for level in reversed(range(tree_levels)):
        size = tree_factor**level
        blocks = [
            [b for b in range(j * size, (j + 1) * size) if b < len(full) and full[b]] for j in range(len(tokens[level]))
        ]
        candidates = []
        for j, cell in enumerate(tokens[level]):
            parent = j // tree_factor
            top = level == tree_levels - 1
            if top and j < merged:
                continue
            reached = top or parent in expanded or not outside(tokens[level + 1][parent])
            if outside(cell) and reached and blocks[j]:
                candidates.append(j)
        worth = {j: (bounds[level][j] + max(bias[b] for b in blocks[j]), j) for j in candidates}
        allowed = [j for j in candidates if any(may[b] for b in blocks[j])]
        expanded = sorted(allowed, key=worth.__getitem__, reverse=True)[:num_selected]
        summaries += [(level, j) for j in candidates if j not in expanded]
    return read + [j for b in expanded for j in tokens[0][b]], summaries


def _rotate(x: Tensor, positions: list[float], base: float | None) -> Tensor:
    """Rotate channel pairs (c, c + d/2) as complex numbers."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    frequencies = torch.tensor([base ** (-c / half) for c in range(half)], dtype=x.dtype, device=x.device)
    angles = torch.tensor(positions, dtype=x.dtype, device=x.device)[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
