"""Codes that can be summed in place of values."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from danon_lightning.strategies.communication.collectives.exchange import Exchange, Steps, copying
from danon_lightning.strategies.communication.compressors import LinearCompressor
from danon_lightning.strategies.communication.compressors.base import Context, Region
from danon_lightning.strategies.communication.levels import LARGEST_MESSAGE_BYTES
from danon_lightning.strategies.communication.messages import LinearMessage


def average_linear(exchange: Exchange, message: LinearMessage, bucket: Tensor) -> Steps[None]:
    """Sum the values inside the node, their codes between nodes, and hand the sum of codes round inside the node.

    With c bytes of code in all, a node sends 2·c·(M−1)/M bytes to others.
    """
    compressor, memory, own = exchange.compressor, exchange.memory, exchange.inner.index
    assert isinstance(compressor, LinearCompressor) and memory is not None
    values = {region: memory.workspace(region, shape, bucket.device) for region, shape in message.regions[own]}
    for rows in message.fragments:
        collected = yield from exchange.collect(rows, bucket)
        for piece in rows[own]:
            assert piece.region is not None
            whole = values[piece.region].view(-1)
            target = whole[piece.region_offset : piece.region_offset + piece.numel]
            collected.sum(piece, target, unscaled=True)
        collected.release()
        exchange.count_dense(sum(piece.numel for piece in rows[own]))

    flushes = memory.flushes
    if flushes:
        for region, region_values in values.items():
            memory.compensate("worker", region, region_values.view(-1))
        mine = _join(list(values.values()), bucket.device)
        code = torch.empty_like(mine)
        yield from exchange.sum_across(mine, code)
        lengths = [[region.numel for region, _ in row] for row in message.regions]
    else:
        code = yield from _sum_codes(exchange, values, bucket.device)
        lengths = [[compressor.code_numel(shape) or 0 for _, shape in row] for row in message.regions]

    codes = yield from _hand_round(exchange, code, [sum(row) for row in lengths])
    starts = _bucket_offsets(message)
    for row, row_code, row_lengths in zip(message.regions, codes, lengths, strict=True):
        for (region, shape), region_code in zip(row, row_code.split(row_lengths), strict=True):
            target = bucket[starts[region] : starts[region] + region.numel].view(shape)
            if flushes:
                exchange.deliver(target, copying(region_code.view(shape)))
            else:
                exchange.deliver(target, _decoding(compressor, region_code, memory.decoding_context(region)))


def _decoding(compressor: LinearCompressor, code: Tensor, context: Context) -> Callable[[Tensor], None]:
    def decode(out: Tensor) -> None:
        compressor.decode(code, out, context)

    return decode


def _sum_codes(exchange: Exchange, values: dict[Region, Tensor], device: torch.device) -> Steps[Tensor]:
    """Run the rounds of all regions side by side; returns their codes, joined."""
    compressor, memory = exchange.compressor, exchange.memory
    assert isinstance(compressor, LinearCompressor) and memory is not None
    rounds = [memory.rounds(region, region_values) for region, region_values in values.items()]
    terms = [one.start() for one in rounds]
    for _ in range(compressor.num_rounds):  # also where this rank has no region, or ranks would get out of step
        joined = _join(terms, device)
        total = torch.empty_like(joined)
        yield from exchange.sum_across(joined, total)
        sums = total.split([term.numel() for term in terms])
        following = [one.resume(s.view_as(t)) for one, s, t in zip(rounds, sums, terms, strict=True)]
        terms = [term for term in following if term is not None]
    return _join([one.code for one in rounds if one.code is not None], device)


def _hand_round(exchange: Exchange, code: Tensor, lengths: Sequence[int]) -> Steps[list[Tensor]]:
    """Everybody's code of the node, in portions that fit a box."""
    own = exchange.inner.index
    codes = [code if rank == own else torch.empty(n, device=code.device) for rank, n in enumerate(lengths)]
    portion = LARGEST_MESSAGE_BYTES // 4
    for start in range(0, max(lengths), portion):
        parts = [each[start : start + portion] for each in codes]
        box = exchange.inner.all_gather([part.nbytes for part in parts])
        box.outgoing[own].view(torch.float32).copy_(parts[own])
        yield from exchange.hand_round(box)
        for part, row in zip(parts, box.incoming, strict=True):
            if part is not parts[own]:
                part.copy_(row.view(torch.float32))
        box.release()
    return codes


def _bucket_offsets(message: LinearMessage) -> dict[Region, int]:
    return {
        piece.region: piece.bucket_offset - piece.region_offset
        for rows in message.fragments
        for row in rows
        for piece in row
        if piece.region is not None
    }


def _join(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]) if tensors else torch.empty(0, device=device)
