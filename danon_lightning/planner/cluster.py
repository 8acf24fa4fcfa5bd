"""What a plan is for: nodes, ranks, links and memory; and how they are written on a command line."""

import math
import re
from dataclasses import dataclass

from danon_lightning.strategies.communication.cost_model import Link, Links

# What is assumed where only a rate is known, as between machines of one rack.
INTER_LATENCY_SECONDS = 100e-6
INTRA_LATENCY_SECONDS = 20e-6
# Ranks of a node on one computer, whose memory is between them.
DEFAULT_INTRA_BITS = 40e9

_BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_BYTES = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Equal nodes with equal ranks.

    Args:
        links: How many there are, and what is between them.
        memory_bytes: What a rank may use; None for as much as it takes.
        speed: How many times as fast as the machine that plans a rank computes.
        assumptions: What was not measured, in words.

    Raises:
        ValueError: If memory or speed are not positive.
    """

    links: Links
    memory_bytes: float | None = None
    speed: float = 1.0
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.memory_bytes is not None and not 0 < self.memory_bytes < math.inf:
            raise ValueError(f"memory_bytes={self.memory_bytes} must be a finite number above 0, or None for no limit")
        if not 0 < self.speed < math.inf:
            raise ValueError(f"speed={self.speed} must be a finite number above 0: 2 for twice as fast as this machine")

    @classmethod
    def of(
        cls,
        nodes: int = 1,
        ranks_per_node: int = 1,
        *,
        inter: str | float | None = None,
        intra: str | float | None = None,
        memory: str | float | None = None,
        speed: float = 1.0,
    ) -> "Cluster":
        """A cluster that is known by its rates.

        Args:
            nodes: Number of nodes.
            ranks_per_node: Number of ranks on each.
            inter: Rate of a node's link to others, such as "1gbit", or in bits a second.
            intra: The same for what the ranks of a node exchange; None for what is usual in the memory of a computer.
            memory: Of a rank, such as "16GiB", or in bytes; None for as much as it takes.
            speed: How many times as fast as the machine that plans a rank computes.

        Raises:
            ValueError: If there are several nodes and ``inter`` is missing, or a value cannot be read.
        """
        if nodes > 1 and inter is None:
            raise ValueError(f"inter=None, but there are {nodes} nodes: say how fast the link of a node is, as '1gbit'")
        notes = []
        if nodes > 1:
            notes.append(
                f"links between nodes: {INTER_LATENCY_SECONDS * 1e6:.0f} µs until the first byte (not measured)"
            )
        if ranks_per_node > 1:
            rate = "" if intra is not None else f"{DEFAULT_INTRA_BITS / 1e9:.0f} Gbit/s, "
            notes.append(
                f"inside nodes: {rate}{INTRA_LATENCY_SECONDS * 1e6:.0f} µs until the first byte (not measured)"
            )
        links = Links(
            nodes,
            ranks_per_node,
            intra=Link(INTRA_LATENCY_SECONDS, read_rate(intra if intra is not None else DEFAULT_INTRA_BITS) / 8)
            if ranks_per_node > 1
            else None,
            inter=Link(INTER_LATENCY_SECONDS, read_rate(inter) / 8) if nodes > 1 and inter is not None else None,
        )
        return cls(links, None if memory is None else read_bytes(memory), speed, assumptions=tuple(notes))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.links.world_size


def read_rate(text: str | float) -> float:
    """Bits a second, from such as "1gbit", "100 Mbit/s" or a number.

    Raises:
        ValueError: If it is none.
    """
    return _read(text, _BITS, "a rate, such as 100mbit or 1gbit", ("/s", "ps"))


def read_bytes(text: str | float) -> float:
    """Bytes, from such as "16GiB", "800MB" or a number.

    Raises:
        ValueError: If it is none.
    """
    return _read(text, _BYTES, "an amount of memory, such as 16GiB", ())


def _read(text: str | float, units: dict[str, float] | dict[str, int], what: str, endings: tuple[str, ...]) -> float:
    if isinstance(text, str):
        plain = text.strip().lower()
        for ending in endings:
            plain = plain.removesuffix(ending)
        found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)", plain)
        try:
            value = float(found[1]) * units[found[2]] if found and found[2] else float(plain)
        except (KeyError, ValueError):
            raise ValueError(f"{text!r} is not {what}: units are {', '.join(units)}") from None
    else:
        value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(f"{text!r} is not {what}: it must be above 0")
    return value
