"""Payloads of several regions in one row of bytes, one after another."""

from collections.abc import Callable, Sequence

from torch import Tensor

from danon_lightning.strategies.communication.collectives.exchange import Collected, Exchange, view
from danon_lightning.strategies.communication.compressors import Compressor
from danon_lightning.strategies.communication.messages import Piece

_ALIGNMENT = 8


def payload_bytes(exchange: Exchange, pieces: Sequence[Piece]) -> int:
    """Bytes of the pieces' payloads together."""
    return sum(padded(size) for size in _sizes(exchange, pieces))


def split_payloads(exchange: Exchange, pieces: Sequence[Piece], row: Tensor) -> list[Tensor]:
    """The payload of each piece, as views of ``row``."""
    payloads, offset = [], 0
    for size in _sizes(exchange, pieces):
        payloads.append(row[offset : offset + size])
        offset += padded(size)
    return payloads


def code(exchange: Exchange, collected: Collected, pieces: Sequence[Piece], row: Tensor) -> None:
    """Sum the next pieces over the node and code them into ``row``."""
    memory = exchange.memory
    assert memory is not None
    for piece, payload in zip(pieces, split_payloads(exchange, pieces, row), strict=True):
        assert piece.region is not None
        terms, share = collected.terms(piece, unscaled=True)
        exchange.note_finite(memory.encode_sum(piece.region, terms, share, payload))


def deliver_payloads(exchange: Exchange, pieces: Sequence[Piece], rows: Sequence[Tensor], bucket: Tensor) -> None:
    """Write to the bucket the sum of what several rows stand for, in their order."""
    compressor = exchange.compressor
    assert isinstance(compressor, Compressor)

    for piece, *payloads in zip(pieces, *(split_payloads(exchange, pieces, row) for row in rows), strict=True):
        exchange.deliver(view(piece, bucket), _decoding(exchange, compressor, payloads))


def _decoding(exchange: Exchange, compressor: Compressor, payloads: Sequence[Tensor]) -> Callable[[Tensor], None]:
    def decode(out: Tensor) -> None:
        for index, payload in enumerate(payloads):
            compressor.decode(payload, out, add=index > 0)
        if compressor.may_overflow:
            exchange.note_finite(out.sum().isfinite())  # several times faster than looking at each

    return decode


def _sizes(exchange: Exchange, pieces: Sequence[Piece]) -> list[int]:
    compressor, memory = exchange.compressor, exchange.memory
    assert isinstance(compressor, Compressor) and memory is not None
    return [compressor.payload_bytes(piece.numel, memory.step) for piece in pieces]


def padded(size: int) -> int:
    """What a payload of ``size`` bytes takes of its row."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
