"""Attention to groups of keys that queries have chosen, tile by tile."""

from collections.abc import Callable

import torch
from torch import Tensor

from danon_lightning.attention.dropout import Keep
from danon_lightning.attention.merging import MASKED
from danon_lightning.attention.scratch import Scratch
from danon_lightning.attention.ucsa.products import attend, biased_logits, gradients
from danon_lightning.attention.ucsa.tiles import Tiles

__all__ = ["attend_gathered", "gradients_of_gathered"]


def attend_gathered(
    tiles: Tiles,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Callable[[Tiles], Tensor | None],
    keep: Keep | None,
    scratch: Scratch | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to each group apart.

    Args:
        tiles: Who chose what.
        query: ``[N, M, d]``, contiguous.
        keys: Those of each group ``[N, groups, w, d]``.
        values: ``[N, groups, w, d]``.
        bias: Gives what is added to the logits of some tiles, of a shape that broadcasts with ``[T, P, w]``.
        keep: Gives the factors of dropout.
        scratch: Memory for the outputs.

    Returns:
        The output of each place ``[T, P, d]``, and the log-sum-exp of each pair ``[N, M, s]``, ``MASKED`` for those
        that are absent; float32 or float64.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    scratch = scratch or Scratch()
    outputs = scratch.take("places", (*tiles.query.shape, query.shape[-1]), precise, query.device)
    lses = query.new_empty(tiles.query.shape, dtype=precise)
    for some, output, lse in tiles.split(keys.shape[2], outputs, lses):
        key, value = some.take_groups(keys, (scratch, "keys")), some.take_groups(values, (scratch, "values"))
        asking = some.take_queries(query, (scratch, "queries"))
        if keep is None and query.dtype == precise:
            # There are too few keys for a fused kernel to gain anything.
            logits = biased_logits(asking, key, bias(some))
            weights = torch.softmax(logits, dim=-1)
            torch.bmm(weights, value, out=output)
            torch.sub(logits.amax(dim=-1), weights.amax(dim=-1).log_(), out=lse)
        else:
            output[:], lse[:] = attend(asking, key, value, bias(some), keep)
    return outputs, tiles.to_pairs(lses).masked_fill_(~tiles.present, MASKED)


def gradients_of_gathered(
    tiles: Tiles,
    query: Tensor,
    sources: tuple[Tensor, Tensor],
    bias: Callable[[Tiles], Tensor | None],
    keep: Keep | None,
    upstream: tuple[Tensor, Tensor, Tensor],
    totals: tuple[Tensor, Tensor],
    scratch: Scratch | None = None,
) -> Tensor:
    """Add up gradients of keys and values, and return that of the query ``[N, M, d]``, float32 or float64.

    Args:
        tiles: As in ``attend_gathered``, like the next four.
        query: ``[N, M, d]``, contiguous.
        sources: Keys and values of each group ``[N, groups, w, d]``.
        bias: Gives what is added to the logits.
        keep: Gives the factors of dropout.
        upstream: Gradient of the output of all sets ``[N, M, d]``, contiguous; log-sum-exp of all sets ``[N, M]``,
            infinite where there is nothing to differentiate; product of output and gradient ``[N, M]``.
        totals: Where the gradients of keys and values are added up ``[N, groups, w, d]``.
        scratch: Memory for what is computed on the way.
    """
    grad, lse, shift = upstream
    places = (scratch or Scratch()).take("places", (*tiles.query.shape, query.shape[-1]), query.dtype, query.device)
    for some, place in tiles.split(sources[0].shape[2], places):
        grads = gradients(
            some.take_queries(query),
            some.take_groups(sources[0]),
            some.take_groups(sources[1]),
            bias(some),
            keep,
            some.take_queries(grad),
            # Nobody is in an empty place.
            some.take_queries(lse).masked_fill_(some.empty, float("inf")),
            some.take_queries(shift),
            place,
        )
        for total, own in zip(totals, grads[1:], strict=True):
            some.add_to_groups(total, own)
    return tiles.sum_places(places.to(lse.dtype), tiles.place, tiles.present.to(lse.dtype))
