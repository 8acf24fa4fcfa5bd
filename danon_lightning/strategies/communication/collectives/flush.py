"""A step in which what is compressed otherwise travels dense, with everything that is owed."""

import torch
from torch import Tensor

from danon_lightning.strategies.communication.collectives.exchange import Exchange, Steps, along, copying, count, view
from danon_lightning.strategies.communication.messages import Message


def average_flushed(exchange: Exchange, message: Message, bucket: Tensor) -> Steps[None]:
    """Like a dense message, but residuals are added on the way, and are empty afterwards."""
    memory = exchange.memory
    assert memory is not None
    own, rows = exchange.inner.index, message.rows
    collected = yield from exchange.collect(rows, bucket)
    owed = torch.empty(count(rows[own]), device=bucket.device)
    summed_here = message.parts[own][exchange.outer.index] if message.kind == "reduce" else ()
    for piece, values in along(rows[own], owed):
        assert piece.region is not None
        collected.sum(piece, values, unscaled=True)
        memory.compensate("worker", piece.region, values)
        if piece in summed_here:
            memory.compensate("server", piece.region, values)
    collected.release()
    exchange.count_dense(count(rows[own]))
    shared = exchange.inner.all_gather([4 * count(row) for row in rows])
    yield from exchange.sum_across(owed, shared.outgoing[own].view(torch.float32))
    yield from exchange.hand_round(shared)
    for row, payload in zip(rows, shared.incoming, strict=True):
        for piece, values in along(row, payload.view(torch.float32)):
            exchange.deliver(view(piece, bucket), copying(values))
    shared.release()
