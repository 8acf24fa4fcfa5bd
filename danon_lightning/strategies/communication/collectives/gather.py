"""Sparse codes: everybody gets everybody's, and sums them."""

from torch import Tensor

from danon_lightning.strategies.communication.collectives.exchange import Exchange, Steps, count
from danon_lightning.strategies.communication.collectives.payloads import code, deliver_payloads, payload_bytes
from danon_lightning.strategies.communication.levels import row_offsets, split_rows
from danon_lightning.strategies.communication.messages import Message


def average_gathered(exchange: Exchange, message: Message, bucket: Tensor) -> Steps[None]:
    """Each node codes the whole message, and all codes go everywhere.

    With c bytes of code in all, a node sends c·(M−1) bytes to others.
    """
    own, nodes = exchange.inner.index, exchange.outer.size
    rows = message.rows
    collected = yield from exchange.collect(rows, bucket)
    sizes = [[payload_bytes(exchange, row)] * nodes for row in rows]
    shared = exchange.inner.all_gather([row_offsets(row)[-1] for row in sizes])
    across = exchange.outer.all_gather(sizes[own], split_rows(shared.outgoing[own], sizes[own]))

    code(exchange, collected, rows[own], across.outgoing[exchange.outer.index])
    collected.release()
    exchange.count_sent(sizes[own][0] * (nodes - 1))
    exchange.count_dense(count(rows[own]))
    across.post()
    yield from exchange.lag()
    across.wait()

    yield from exchange.hand_round(shared)
    for row, row_sizes, payloads in zip(rows, sizes, shared.incoming, strict=True):
        deliver_payloads(exchange, row, split_rows(payloads, row_sizes), bucket)
    shared.release()
