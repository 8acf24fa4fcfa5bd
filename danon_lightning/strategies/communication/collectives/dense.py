"""Dense values: exact up to rounding."""

import torch
from torch import Tensor

from danon_lightning.strategies.communication import kernels
from danon_lightning.strategies.communication.collectives.exchange import Exchange, Steps, along, count, view
from danon_lightning.strategies.communication.messages import Message


def average_dense(exchange: Exchange, message: Message, bucket: Tensor) -> Steps[None]:
    """Sum inside the node, then between nodes, and share the result inside the node.

    A node sends 2·n·(M−1)/M elements to others.
    """
    rows, own = message.rows, exchange.inner.index
    collected = yield from exchange.collect(rows, bucket)
    shared = exchange.inner.all_gather([count(row) * bucket.element_size() for row in rows])
    result = shared.outgoing[own].view(bucket.dtype)
    node_sum = result if exchange.outer.size == 1 else torch.empty_like(result)
    for piece, values in along(rows[own], node_sum):
        collected.sum(piece, values, unscaled=False)
    collected.release()
    exchange.count_dense(count(rows[own]))
    yield from exchange.sum_across(node_sum, result)
    yield from exchange.hand_round(shared)
    looks = exchange.looks_at_averages and exchange.memory is None
    for row, payload in zip(rows, shared.incoming, strict=True):
        averages = payload.view(bucket.dtype)
        if looks:
            exchange.note_finite(kernels.all_finite(averages))
        for piece, values in along(row, averages):
            kernels.copy(view(piece, bucket), values)
    shared.release()
