"""Compressors: what crosses the slow links in place of float32 gradients. One file each."""

from collections.abc import Callable

from danon_lightning.strategies.communication.compressors.base import Compressor, Context, LinearCompressor
from danon_lightning.strategies.communication.compressors.cast import Bf16Compressor, Fp16Compressor
from danon_lightning.strategies.communication.compressors.int4 import Int4Compressor
from danon_lightning.strategies.communication.compressors.int8 import Int8Compressor
from danon_lightning.strategies.communication.compressors.powersgd import PowerSGDCompressor
from danon_lightning.strategies.communication.compressors.randomk import RandomKCompressor
from danon_lightning.strategies.communication.compressors.sign import SignCompressor
from danon_lightning.strategies.communication.compressors.topk import TopKCompressor

_COMPRESSORS: dict[str, Callable[[], Compressor | LinearCompressor]] = {
    "bf16": Bf16Compressor,
    "fp16": Fp16Compressor,
    "int4": Int4Compressor,
    "int8": Int8Compressor,
    "powersgd": PowerSGDCompressor,
    "randomk": RandomKCompressor,
    "sign": SignCompressor,
    "topk": TopKCompressor,
}


def available_compressors() -> list[str]:
    """Names that ``compression=`` accepts, beside ``None`` for dense float gradients."""
    return sorted(_COMPRESSORS)


def get_compressor(compression: str | Compressor | LinearCompressor | None) -> Compressor | LinearCompressor | None:
    """Resolve what a user wrote as ``compression``.

    Args:
        compression: ``None`` (dense), a registered name, or a compressor of one's own.

    Raises:
        ValueError: For an unknown name; the message lists the valid ones.
        TypeError: For an object that is no compressor.
    """
    if compression is None or isinstance(compression, Compressor | LinearCompressor):
        return compression
    if not isinstance(compression, str):
        raise TypeError(
            f"compression must be None, a name or a compressor, got {type(compression).__name__}: {compression!r}"
        )
    if compression not in _COMPRESSORS:
        names = ", ".join(repr(name) for name in available_compressors())
        raise ValueError(f"compression={compression!r} is not known; choose None (dense) or one of: {names}")
    return _COMPRESSORS[compression]()


__all__ = [
    "Bf16Compressor",
    "Compressor",
    "Context",
    "Fp16Compressor",
    "Int4Compressor",
    "Int8Compressor",
    "LinearCompressor",
    "PowerSGDCompressor",
    "RandomKCompressor",
    "SignCompressor",
    "TopKCompressor",
    "available_compressors",
    "get_compressor",
]
