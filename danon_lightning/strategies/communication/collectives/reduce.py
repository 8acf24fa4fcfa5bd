"""Codes of constant size: coded, exchanged, summed, coded again, collected."""

import torch
from torch import Tensor

from danon_lightning.strategies.communication.collectives.exchange import Exchange, Steps, count
from danon_lightning.strategies.communication.collectives.payloads import (
    code,
    deliver_payloads,
    payload_bytes,
    split_payloads,
)
from danon_lightning.strategies.communication.compressors import Compressor
from danon_lightning.strategies.communication.levels import row_offsets, split_rows
from danon_lightning.strategies.communication.messages import Message


def average_reduced(exchange: Exchange, message: Message, bucket: Tensor) -> Steps[None]:
    """Each node sums one part of the message for all.

    Every rank decodes the same bytes, its own included, so all end with the same bits. With c bytes of code an element,
    a node sends 2·c·n·(M−1)/M bytes to others. The coded result is what is handed round inside the node.
    """
    compressor, memory = exchange.compressor, exchange.memory
    assert isinstance(compressor, Compressor) and memory is not None
    own, node = exchange.inner.index, exchange.outer.index
    collected = yield from exchange.collect(message.rows, bucket)
    sizes = [[payload_bytes(exchange, part) for part in row] for row in message.parts]
    mine, my_sizes = message.parts[own], sizes[own]
    shared = exchange.inner.all_gather([row_offsets(row)[-1] for row in sizes])
    across = exchange.outer.all_to_all(my_sizes)
    back = exchange.outer.all_gather(my_sizes, split_rows(shared.outgoing[own], my_sizes))

    for part, row in zip(mine, across.outgoing, strict=True):
        code(exchange, collected, part, row)
    collected.release()
    sent = sum(my_sizes) - my_sizes[node] + my_sizes[node] * (exchange.outer.size - 1)
    exchange.count_sent(sent)
    exchange.count_dense(sum(count(part) for part in mine))
    across.post()
    yield from exchange.lag()
    across.wait()

    payloads = [split_payloads(exchange, mine[node], row) for row in across.incoming]
    results = split_payloads(exchange, mine[node], back.outgoing[node])
    for piece, result, *contributions in zip(mine[node], results, *payloads, strict=True):
        assert piece.region is not None
        total = torch.empty(piece.numel, device=bucket.device)
        for index, contribution in enumerate(contributions):
            compressor.decode(contribution, total, add=index > 0)
        memory.encode("server", piece.region, total, result)
    back.post()
    yield from exchange.lag()
    back.wait()

    yield from exchange.hand_round(shared)
    for row_parts, row_sizes, rows in zip(message.parts, sizes, shared.incoming, strict=True):
        for part, payload in zip(row_parts, split_rows(rows, row_sizes), strict=True):
            deliver_payloads(exchange, part, [payload], bucket)
    shared.release()
