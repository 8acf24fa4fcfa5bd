"""The network that a measurement runs on: emulated hosts where that is permitted, this machine's loopback elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from danon_lightning.testing import EmulatedHosts


def format_rate(mbit: float | None) -> str:
    """A rate in words: ``100 Mbit/s``, ``2.5 Gbit/s`` or ``unshaped``."""
    if mbit is None:
        return "unshaped"
    return f"{mbit:.3g} Mbit/s" if round(mbit) < 1000 else f"{mbit / 1000:.3g} Gbit/s"


def loopback_reason(nodes: int) -> str | None:
    """Why hosts are not emulated for so many nodes, or None if they are."""
    return "there is only one node" if nodes == 1 else EmulatedHosts.unavailable_reason()


@contextmanager
def open_network(nodes: int) -> Iterator[EmulatedHosts | None]:
    """One emulated host a node, unshaped at first and gone at the end; None for loopback."""
    if loopback_reason(nodes) is not None:
        yield None
    else:
        with EmulatedHosts(nodes) as hosts:
            yield hosts
