"""What the link between nodes can do at present, measured between two steps."""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from danon_lightning.strategies.communication.adaptive.measurement import Moment
from danon_lightning.strategies.communication.levels import LARGEST_MESSAGE_BYTES, Box, GroupLevel
from danon_lightning.strategies.mesh import Mesh

# Of a probe between steps the first part is not timed: it fills buffers and token buckets on the way.
_PROBE_PARTS, _IN_FLIGHT = 3, 2
# Parts that take less are repeated with longer ones.
_SHORT_SECONDS, _PART_SECONDS, _LEAST_PART, _MOST_PART = 0.01, 0.03, 1 << 20, 4 << 20
# A link may seem slower than it is, while processors are busy: who finds it so looks again.
_SLOWER = 0.7
# A link that takes what is sent to see whether it has become faster, in less than this part of the time, may have.
_MUCH_FASTER = 2.0
# What such a look takes on a link that has not. Of less, a large part would find room in a token bucket on the way.
PING_SECONDS = 0.02
_LEAST_PING = 3 << 16


class LinkProbe:
    """Sends bytes as an exchange does, and sees how long they take.

    Args:
        outer: The level between nodes.
        group: All ranks.
        mesh: Layout of the ranks.
        device: Where gradients lie.
        bytes_per_second: What a node can send to others, as far as is known.
    """

    def __init__(
        self,
        outer: GroupLevel,
        group: dist.ProcessGroup | None,
        mesh: Mesh,
        device: torch.device,
        bytes_per_second: float,
    ) -> None:
        """See the class."""
        self._outer, self._group, self._mesh, self._device = outer, group, mesh, device
        self._bytes_per_second = bytes_per_second

    def measure(self) -> float:
        """Bytes a second that a node can send to others at present, all its ranks at once. Collective."""
        size, ranks = _LEAST_PART, self._mesh.ranks_per_node
        found = self._time_parts(size, _PROBE_PARTS)
        if ranks * size < _SHORT_SECONDS * found:
            size = min(int(_PART_SECONDS * found / ranks), _MOST_PART)
            found = self._time_parts(size, _PROBE_PARTS)
        if found < _SLOWER * self._bytes_per_second:
            found = max(found, self._time_parts(size, _PROBE_PARTS))
        self._bytes_per_second = found
        return found

    def seems_faster(self) -> bool:
        """Whether the link may have become much faster. Collective, and shorter than a probe."""
        size = max(_LEAST_PING, int(PING_SECONDS * self._bytes_per_second / self._mesh.ranks_per_node))
        return self._time_parts(size, 1) > _MUCH_FASTER * self._bytes_per_second

    def _time_parts(self, size: int, parts: int) -> float:
        """Send parts of so many bytes a rank; returns a node's bytes a second after the first of them. Collective.

        Args:
            size: Bytes.
            parts: How many; where there is only one, it counts.
        """
        outer, works = self._outer, deque[Box]()
        peers = max(outer.size - 1, 1)
        row = min(size // peers, LARGEST_MESSAGE_BYTES)
        boxes = -(-size // (peers * row))

        def start() -> None:
            box = outer.all_to_all([row] * outer.size)
            box.post()
            works.append(box)

        def finish() -> None:
            box = works.popleft()
            box.wait()
            box.release()

        started = 0
        self._agree_on(torch.zeros(1, dtype=torch.float64))  # so that all begin at once
        began = since = Moment(self._device)
        for finished in range(parts * boxes):
            while started < min(finished + _IN_FLIGHT, parts * boxes):
                start()
                started += 1
            finish()
            if finished + 1 == boxes < parts * boxes:
                since = Moment(self._device)
        whole = self._agree_on(torch.tensor([began.until(Moment(self._device))], dtype=torch.float64))
        # Ranks share a link unevenly, so that one is late with its first part, and another one with the rest.
        first = torch.tensor([began.until(since)], dtype=torch.float64, device=self._device)
        dist.all_reduce(first, group=self._group)
        seconds = whole - float(first) / self._mesh.world_size
        timed = max(parts - 1, 1) * boxes * row
        return self._mesh.ranks_per_node * timed * sum(outer.remote) / max(seconds, 1e-9)

    def _agree_on(self, number: Tensor) -> float:
        """The largest of all ranks."""
        number = number.to(self._device)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return float(number)
