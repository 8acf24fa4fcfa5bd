"""UCSA written as its definition reads: one softmax over an explicit matrix of n queries x (tokens and all cells).

It shares no code with the fast form, costs O(n²) and exists to check it, in float64.
"""

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
    for _ in range(1, tree_levels):
        below = tokens[-1]
        tokens.append(
            [range(x[0].start, x[-1].stop) for x in (below[j : j + tree_factor] for j in range(0, len(below), tree_factor))]
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
    for row in range(batch):
        for head in range(heads):
            bounds = [x[row, head].tolist() for x in scores]
            for i in range(length):
                gone = [False] * blocks if unavailable is None else unavailable[row, i].tolist()
                keeps = [
                    not gone[b] and errors[row, head // repeats, b].item() >= error_tolerance for b in range(blocks)
                ]
                own = max(0, i - num_sinks) // block_size
                first, last = own - window_blocks, own + (0 if causal else window_blocks)
                near = [j for j in range(min(num_sinks, length)) if j <= i or not causal]
                for block in range(max(0, first), min(blocks, last + 1)):
                    near += [j for j in tokens[0][block] if j <= i or not causal]

                def outside(cell: range, first: int = first, last: int = last) -> bool:
                    before = cell.stop <= num_sinks + first * block_size
                    return before or (not causal and cell.start >= num_sinks + (last + 1) * block_size)

                read, summaries, expanded = list(near), [], None
                for level in reversed(range(tree_levels)):
                    candidates = []
                    for index, cell in enumerate(tokens[level]):
                        parent = index // tree_factor
                        free = expanded is None or parent in expanded or not outside(tokens[level + 1][parent])
                        if outside(cell) and free and real[row, cell.start : cell.stop].any():
                            candidates.append(index)

                    def worth(index: int, level: int = level) -> tuple[float, int]:
                        width_in_blocks = tree_factor**level
                        mine = range(index * width_in_blocks, min(blocks, (index + 1) * width_in_blocks))
                        full = [b for b in mine if real[row, tokens[0][b].start : tokens[0][b].stop].any()]
                        return bounds[level][i][index] + max(bias[row, head, b].item() for b in full), index

                    allowed = [
                        x
                        for x in candidates
                        if any(
                            keeps[b] and bool(real[row, tokens[0][b].start : tokens[0][b].stop].any())
                            for b in range(x * tree_factor**level, min(blocks, (x + 1) * tree_factor**level))
                        )
                    ]
                    expanded = set(sorted(allowed, key=worth, reverse=True)[:num_selected])
                    summaries += [(level, x) for x in candidates if x not in expanded]
                for block in sorted(expanded or ()):
                    read += list(tokens[0][block])
                for level, index in summaries:
                    visible[row, head, i, columns[level] + index] = True
                    for j in tokens[level][index]:
                        coverage[row, head, i, j] += 1
                for j in read:
                    visible[row, head, i, j] = real[row, j]
                    coverage[row, head, i, j] += 1
    visible = visible.to(q.device)
    blind = ~visible.any(dim=-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(~visible & ~blind, float("-inf")), dim=-1).masked_fill(blind, 0.0)
    output = weights @ all_values
    return (output, coverage) if return_coverage else output


def _rotate(x: Tensor, positions: list[float], base: float | None) -> Tensor:
    """Rotate channel pairs (c, c + d/2) as complex numbers."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    frequencies = torch.tensor([base ** (-c / half) for c in range(half)], dtype=x.dtype, device=x.device)
    angles = torch.tensor(positions, dtype=x.dtype, device=x.device)[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
