"""What a cluster's links can do: latency and bandwidth of each level."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

SCHEMA = "danon-links"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Link:
    """The α-β model of a link: b bytes take α + b/β seconds. Overheads count where a thread has more to do than send.

    Bandwidth is that of a whole node, all its ranks sending at once while they receive as much: they share a network
    card, or the memory.

    Args:
        latency_seconds: α, from the moment of sending until the first byte can be used, software included.
        bytes_per_second: β, of payload, in each direction.
        overhead_seconds: What a transfer, however short, keeps the thread busy for that sends and receives it.
        overhead_seconds_per_byte: What a byte keeps it busy for: the system copies it.

    Raises:
        ValueError: If a number is not finite, a time is negative, or the bandwidth is not positive.

    Reference:
        Hockney, "The communication challenge for MPP", Parallel Computing 20(3), 1994; for overheads: Alexandrov et
        al., "LogGP: Incorporating Long Messages into the LogP Model", SPAA 1995.
    """

    latency_seconds: float
    bytes_per_second: float
    overhead_seconds: float = 0.0
    overhead_seconds_per_byte: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("overhead_seconds", "overhead_seconds_per_byte"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number, not negative")
        if not 0 <= self.latency_seconds < math.inf:
            raise ValueError(f"latency_seconds={self.latency_seconds} must be a finite number of seconds, not negative")
        if not 0 < self.bytes_per_second < math.inf:
            raise ValueError(f"bytes_per_second={self.bytes_per_second} must be a finite number above 0")

    def seconds(self, num_bytes: float, steps: float = 1) -> float:
        """Time for ``num_bytes`` that follow one another in so many dependent steps: steps·α + b/β."""
        return steps * self.latency_seconds + num_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Links:
    """The links of a cluster of equal nodes. All ranks of a job hold the same numbers.

    Args:
        nodes: Number of nodes, M.
        ranks_per_node: Number of ranks on each, L.
        intra: Between ranks of a node; None with one rank on each.
        inter: Between nodes, the slowest of them; None with one node.
        shared_memory: Whether ranks of a node hand bytes over in memory. Such a transfer costs processor time, and what
            one rank has written all others may read.
        pairwise: ``pairwise[i][j]``: bytes a second from node i to node j while no other nodes send, where they have
            been measured one by one; 0 on the diagonal.

    Raises:
        ValueError: If a size is not positive, a link that there must be is missing, or ``pairwise`` is not a matrix of
            positive numbers for all nodes.
    """

    nodes: int
    ranks_per_node: int
    intra: Link | None = None
    inter: Link | None = None
    shared_memory: bool = False
    pairwise: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        """Check that it is complete."""
        if self.nodes < 1 or self.ranks_per_node < 1:
            raise ValueError(f"nodes={self.nodes} and ranks_per_node={self.ranks_per_node} must be at least 1")
        if self.nodes > 1 and self.inter is None:
            raise ValueError(f"inter=None, but there are {self.nodes} nodes: say how fast the link between them is")
        if self.ranks_per_node > 1 and self.intra is None:
            raise ValueError(f"intra=None, but a node has {self.ranks_per_node} ranks: say how fast they exchange")
        if self.pairwise is not None:
            check_bandwidths(self.pairwise)
            if len(self.pairwise) != self.nodes:
                raise ValueError(f"pairwise has {len(self.pairwise)} rows, but there are {self.nodes} nodes")

    @property
    def world_size(self) -> int:
        """Number of ranks, N."""
        return self.nodes * self.ranks_per_node

    def shared_by(self, exchanges: int) -> "Links":
        """What each has of the links if several exchanges run at the same time, such as those of pipeline stages."""
        if exchanges < 1:
            raise ValueError(f"exchanges={exchanges} must be at least 1")
        return replace(self, intra=_share(self.intra, exchanges), inter=_share(self.inter, exchanges))

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it; see :meth:`from_json`."""
        return {"schema": SCHEMA, "version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Links":
        """Read what :meth:`to_json` has written; keys it does not know (of the command that measured, say) are ignored.

        ======================  ==========================================================================
        ``schema``              ``"danon-links"``
        ``version``             1; greater where older readers would misunderstand
        ``nodes``               number of nodes
        ``ranks_per_node``      ranks on each
        ``intra``, ``inter``    null, or the fields of :class:`Link`: ``latency_seconds``, ``bytes_per_second``,
                                ``overhead_seconds``, ``overhead_seconds_per_byte`` (these two may be missing)
        ``shared_memory``       true or false
        ``pairwise``            bytes a second from node (row) to node (column), or null
        ======================  ==========================================================================

        Raises:
            ValueError: If it is something else, of a later version, incomplete, or out of range.
        """
        if content.get("schema") != SCHEMA:
            raise ValueError(f"this is no description of links: schema={content.get('schema')!r}, not {SCHEMA!r}")
        if content.get("version") != SCHEMA_VERSION:
            raise ValueError(
                f"version={content.get('version')!r} of {SCHEMA} cannot be read, only {SCHEMA_VERSION}: "
                "measure the links again with this version of the package"
            )
        try:
            pairwise = content["pairwise"]
            return cls(
                nodes=int(content["nodes"]),
                ranks_per_node=int(content["ranks_per_node"]),
                intra=_link(content["intra"]),
                inter=_link(content["inter"]),
                shared_memory=bool(content["shared_memory"]),
                pairwise=None if pairwise is None else tuple(tuple(map(float, row)) for row in pairwise),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the description of links is damaged: {type(error).__name__} {error}") from error

    @classmethod
    def read(cls, path: Path | str) -> "Links":
        """Read a file that ``danon-bench links --json`` has written.

        Raises:
            OSError: If it cannot be read.
            ValueError: See :meth:`from_json`; also if it holds no JSON object.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object")
        return cls.from_json(content)


def check_bandwidths(matrix: tuple[tuple[float, ...], ...]) -> None:
    """Raise a ValueError unless this is a square matrix with finite, positive numbers off its diagonal."""
    for i, row in enumerate(matrix):
        if len(row) != len(matrix):
            raise ValueError(f"row {i} of the bandwidths has {len(row)} numbers, but there are {len(matrix)} rows")
        for j, value in enumerate(row):
            if i != j and not 0 < value < math.inf:
                raise ValueError(f"the bandwidth from node {i} to node {j} is {value}: it must be finite and above 0")


def _share(link: Link | None, exchanges: int) -> Link | None:
    return None if link is None else replace(link, bytes_per_second=link.bytes_per_second / exchanges)


def _link(content: Mapping[str, Any] | None) -> Link | None:
    if content is None:
        return None
    return Link(
        float(content["latency_seconds"]),
        float(content["bytes_per_second"]),
        float(content.get("overhead_seconds", 0.0)),
        float(content.get("overhead_seconds_per_byte", 0.0)),
    )
