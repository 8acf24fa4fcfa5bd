"""The softmax part of DALA without a graph, on CPUs: head by head, in memory that is used again and again.

What one head needs for a few blocks, logits and the rows of its memory, stays in the cache of the processor core, and
no memory is asked for that the system would first have to empty.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from danon_lightning.attention.dala.local import distance_powers
from danon_lightning.attention.exponential import exp_or_zero_
from danon_lightning.attention.joint import Joint, backward_terms, laid_out
from danon_lightning.attention.merging import MASKED, has_visible_keys
from danon_lightning.attention.scratch import Scratch

__all__ = ["Far", "Near", "attend_head_by_head", "gradients_head_by_head"]


class Near(NamedTuple):
    """The window.

    Attributes:
        query: Queries, already scaled ``[b, H, c, t, d]``.
        key: Keys ``[b, G, c, w, d]``.
        value: Values ``[b, G, c, w, d]``.
        mass: Logarithms of importance ``[b, 1, c, 1, w]``.
        distances: Positions of queries minus those of keys ``[t, w]``.
        coefficients: What powers of the distance are multiplied with ``[H, c or 1, 3]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mass: Tensor
    distances: Tensor
    coefficients: Tensor


class Far(NamedTuple):
    """The memory.

    Attributes:
        query: Queries, already scaled ``[b, H, c, t, d]``.
        keys: All keys ``[b, G, n, d]``.
        values: All values ``[b, G, n, d]``.
        tokens: The tokens that are remembered ``[b, c, m]``; negative ones are none.
        mass: Logarithms of their importance ``[b, 1, c, m]``, ``MASKED`` where there is none.
        preference: Added to all logits of a row ``[b, H, n]``; ``None`` means zero.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    tokens: Tensor
    mass: Tensor
    preference: Tensor | None


def attend_head_by_head(near: Near, far: Far | None, rows: int, scratch: Scratch) -> Joint:
    """Attend to window and memory in one softmax.

    Args:
        near: The window.
        far: The memory; ``None``: there is none.
        rows: Queries that there are; the others fill up the last block.
        scratch: Memory to work in.

    Returns:
        What ``joint_attention`` returns for the two sets.
    """
    query, key, value, mass, distances, coefficients = near
    powers = distance_powers(distances, coefficients.dtype)
    batch, heads, count, tokens, width = query.shape
    repeats = heads // key.shape[1]
    output = query.new_empty(batch, heads, count, tokens, width)
    peak = query.new_empty(batch, heads, count, tokens, 1)
    sums = query.new_empty(2 if far else 1, batch, heads, count, tokens, 1)
    shift = peak
    if far is not None and far.preference is not None:
        preference = query.new_zeros(batch, heads, count * tokens)
        preference[:, :, :rows] = far.preference
        preference = preference.view_as(peak)
        shift = torch.empty_like(peak)
    kind = query.dtype, query.device
    here = scratch.take("window", (count, tokens, key.shape[-2]), *kind)
    for b in range(batch):
        chosen = None if far is None else far.tokens[b].clamp(min=0).flatten()
        for h in range(heads):
            g = h // repeats
            out, top, to_take = output[b, h], peak[b, h], shift[b, h]
            torch.mm(coefficients[h].expand(count, -1), powers, out=here.view(count, -1))
            here.baddbmm_(query[b, h], key[b, g].mT).add_(mass[b, 0])
            torch.amax(here, dim=-1, keepdim=True, out=top)
            if far is not None and chosen is not None:
                there = scratch.take("memory", (count, tokens, far.mass.shape[-1]), *kind)
                taken = scratch.take("rows", (len(chosen), width), *kind)
                table = taken.view(count, -1, width)
                torch.index_select(far.keys[b, g], 0, chosen, out=taken)
                torch.bmm(far.query[b, h], table.mT, out=there).add_(far.mass[b, 0].unsqueeze(1))
                best = there.amax(dim=-1, keepdim=True)
                if far.preference is None:
                    torch.maximum(top, best, out=top)
                else:
                    torch.maximum(top, best.add_(preference[b, h]), out=top)
                    torch.sub(top, preference[b, h], out=to_take)
                exp_or_zero_(there.sub_(to_take))
                torch.sum(there, dim=-1, keepdim=True, out=sums[1, b, h])
                torch.index_select(far.values[b, g], 0, chosen, out=taken)
                torch.bmm(there, table, out=out)
            exp_or_zero_(here.sub_(top))
            torch.sum(here, dim=-1, keepdim=True, out=sums[0, b, h])
            if far is None:
                torch.bmm(here, value[b, g], out=out)
            else:
                out.baddbmm_(here, value[b, g])
            total = sums[:, b, h].sum(dim=0)
            # Of rows that see nothing, nothing is left.
            out.mul_(total.reciprocal_().masked_fill_(~has_visible_keys(top), 0.0))
    # Sets of which nothing counts have a sum of zero.
    lses = torch.where(sums > 0, peak + sums.clamp(min=torch.finfo(sums.dtype).tiny).log(), MASKED)
    lses = lses.view(len(sums), batch, heads, -1).movedim(0, -1)
    return Joint(output.flatten(2, 3)[:, :, :rows], lses[:, :, :rows])


def gradients_head_by_head(
    near: Near, far: Far | None, joint: Joint, grad: Tensor, totals: Sequence[Tensor], scratch: Scratch
) -> list[tuple[Tensor, Tensor]]:
    """Return the gradients of what ``attend_head_by_head`` was given.

    Args:
        near: The window.
        far: The memory; ``None``: there is none.
        joint: What came out.
        grad: Gradient of the output ``[b, H, n, d]``.
        totals: Gradients of all keys and of all values; those of the memory are added to them.
        scratch: Memory to work in.

    Returns:
        All other tensors, each with its gradient.
    """
    query, key, value, mass, distances, coefficients = near
    powers = distance_powers(distances, coefficients.dtype)
    batch, heads, count, tokens, _ = query.shape
    repeats = heads // key.shape[1]
    lse, shift = (x.unsqueeze(-1) for x in backward_terms(joint, grad))
    rows = grad.shape[2]
    grad, shift = (laid_out(x, (count, tokens)) for x in (grad, shift))
    lses = [laid_out(lse, (count, tokens), float("inf"))]
    found = [(x, torch.empty_like(x, memory_format=torch.contiguous_format)) for x in (query, key, value)]
    found += [(x, torch.zeros_like(x)) for x in (mass, coefficients)]
    (_, to_query), (_, to_key), (_, to_value), (_, to_mass), (_, to_coefficients) = found
    if far is not None:
        found += [(far.query, torch.empty_like(to_query)), (far.mass, torch.zeros_like(far.mass))]
        (_, to_far_query), (_, to_far_mass) = found[-2:]
        if far.preference is None:
            lses *= 2
        else:
            lses.append(laid_out(lse - far.preference.unsqueeze(-1), (count, tokens), float("inf")))
            to_preference = torch.empty_like(shift)
            found.append((far.preference, to_preference.view(batch, heads, -1)[:, :, :rows]))
    work = functools.partial(scratch.take, dtype=query.dtype, device=query.device)
    here, to_here = (work(name, (count, tokens, key.shape[-2])) for name in ("window", "gradient of the window"))
    for b in range(batch):
        chosen = None if far is None else far.tokens[b].clamp(min=0).flatten()
        for h in range(heads):
            g, beta = h // repeats, float(h % repeats > 0)
            torch.mm(coefficients[h].expand(count, -1), powers, out=here.view(count, -1))
            here.baddbmm_(query[b, h], key[b, g].mT).add_(mass[b, 0])
            exp_or_zero_(here.sub_(lses[0][b, h]))
            to_value[b, g].baddbmm_(here.mT, grad[b, h], beta=beta)
            torch.bmm(grad[b, h], value[b, g].mT, out=to_here)
            to_here.sub_(shift[b, h]).mul_(here)
            torch.bmm(to_here, key[b, g], out=to_query[b, h])
            to_key[b, g].baddbmm_(to_here.mT, query[b, h], beta=beta)
            to_mass[b, 0] += to_here.sum(dim=-2, keepdim=True)
            to_coefficients[h] += (to_here.view(count, -1) @ powers.mT).sum_to_size(coefficients.shape[1:])
            if far is None or chosen is None:
                continue
            there, to_there = (
                work(name, (count, tokens, far.mass.shape[-1])) for name in ("memory", "gradient of the memory")
            )
            keys, values, to_rows = (
                work(name, (count, far.mass.shape[-1], key.shape[-1])) for name in ("keys", "rows", "gradient of rows")
            )
            torch.index_select(far.keys[b, g], 0, chosen, out=keys.flatten(0, 1))
            torch.index_select(far.values[b, g], 0, chosen, out=values.flatten(0, 1))
            torch.bmm(far.query[b, h], keys.mT, out=there).add_(far.mass[b, 0].unsqueeze(1))
            exp_or_zero_(there.sub_(lses[1][b, h]))
            torch.bmm(there.mT, grad[b, h], out=to_rows)
            totals[1][b, g].index_add_(0, chosen, to_rows.flatten(0, 1))
            torch.bmm(grad[b, h], values.mT, out=to_there)
            to_there.sub_(shift[b, h]).mul_(there)
            torch.bmm(to_there, keys, out=to_far_query[b, h])
            torch.bmm(to_there.mT, far.query[b, h], out=to_rows)
            totals[0][b, g].index_add_(0, chosen, to_rows.flatten(0, 1))
            to_far_mass[b, 0] += to_there.sum(dim=-2)
            if far.preference is not None:
                torch.sum(to_there, dim=-1, keepdim=True, out=to_preference[b, h])
    return found
