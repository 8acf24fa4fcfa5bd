"""The exchanges whose scaling is compared."""

from collections.abc import Callable
from functools import partial

from danon_lightning.benchmark.communication.variants import Attach, attach_communicator, attach_default
from danon_lightning.strategies import available_compressors

DDP, DENSE = "ddp", "dense"
DEFAULT = [DDP, DENSE, "int8"]


def exchange_names() -> list[str]:
    """All there are: plain DistributedDataParallel, this package's dense exchange, and its compressors."""
    return [DDP, DENSE, *available_compressors()]


def compression_of(exchange: str) -> str | None:
    """What to give the communicator as ``compression``; None for dense gradients."""
    return None if exchange in (DDP, DENSE) else exchange


def attach(exchange: str) -> Attach:
    """What sets the exchange up on a model."""
    attached: Callable[..., object] = attach_default
    if exchange != DDP:
        attached = partial(attach_communicator, compression_of(exchange))
    return attached  # type: ignore[return-value]
