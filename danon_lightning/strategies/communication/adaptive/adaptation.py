"""What a communicator with ``compression="auto"`` does at the end of its exchanges, on all ranks alike."""

import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from danon_lightning.strategies.communication.adaptive.controller import (
    FIRST_LOOK,
    NOTHING,
    OFF,
    PING_SECONDS,
    PROBE,
    Controller,
    Decision,
    by_name,
)
from danon_lightning.strategies.communication.adaptive.forecast import Forecaster
from danon_lightning.strategies.communication.adaptive.measurement import Measured, Moment, StepMeter, from_numbers
from danon_lightning.strategies.communication.adaptive.settings import FOR_ANY_OPTIMIZER, FOR_SGD, AutoCompression
from danon_lightning.strategies.communication.cost_model import agree_on_costs, coding_costs, probe_links
from danon_lightning.strategies.communication.cost_model.traffic import Parameters
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
# Of less, a large part would find room in a token bucket on the way.
_LEAST_PING = 3 << 16
_SENTENCE_BYTES = 512
_KEPT_DECISIONS = 100


class Adaptation:
    """Measures steps, has rank 0 decide, and tells all ranks at the same step.

    Args:
        settings: What may be chosen, and how readily.
        mesh: Layout of the ranks.
        group: All ranks; None for a single one.
        outer: The level between nodes.
        hierarchical: As for the communicator.
        device: Where gradients lie.

    Attributes:
        controller: Decides, on rank 0; elsewhere it is told.
        decisions: The last ones, on all ranks.
        exchanges: Number of finite ones since the start of training.
    """

    def __init__(
        self,
        settings: AutoCompression,
        mesh: Mesh,
        group: dist.ProcessGroup | None,
        outer: GroupLevel,
        *,
        hierarchical: bool | Literal["auto"],
        device: torch.device,
    ) -> None:
        """See the class. Collective: it probes the links."""
        self._mesh, self._group, self._outer, self._device = mesh, group, outer, device
        candidates = by_name(settings.resolve(FOR_SGD))
        links, reason = None, "all ranks are on one node"
        if mesh.num_nodes > 1:
            links, reason = probe_links(mesh, device=device), "the links could not be measured"
        self._has_links = links is not None
        self._bytes_per_second = links.inter.bytes_per_second if links is not None and links.inter is not None else 0.0
        forecaster = Forecaster(links, {}, hierarchical, device) if links is not None else None
        self.controller = Controller(settings, candidates, forecaster, reason)
        if settings.candidates is None:
            self.controller.allow(by_name(settings.resolve(FOR_ANY_OPTIMIZER)))
        self._meter = StepMeter(device, settings.every_n_steps)
        self.decisions: deque[Decision] = deque(maxlen=_KEPT_DECISIONS)
        self.exchanges = 0
        self._here = 0
        self._knows_costs = False

    def start_exchange(self) -> None:
        """Before the first bucket of an exchange is handed over. Collective at the first time: it measures coding."""
        forecaster = self.controller.forecaster
        if self._knows_costs or forecaster is None:
            return
        self._knows_costs = True
        forecaster.costs = {
            name: agree_on_costs(coding_costs(candidate, self._device), self._group, self._device)
            for name, candidate in self.controller.candidates.items()
            if self.controller.allows(name)
        }

    def bucket_is_ready(self) -> None:
        """When a bucket is handed over."""
        self._meter.bucket_is_ready()

    def forget_steps(self) -> None:
        """What has been measured is no longer what is."""
        self._meter.clear()

    def end_exchange(self, buckets: Sequence[Parameters], *, finite: bool, flushes: bool) -> Decision | None:
        """When all buckets have been averaged. Now and then it is collective.

        Args:
            buckets: In the order in which they were exchanged.
            finite: Whether it counts.
            flushes: Whether a change is under way already. Both are the same on all ranks.

        Returns:
            What has been decided, if anything.
        """
        self._meter.end_exchange()
        self._here += 1
        self.exchanges += finite
        if self._group is None or not finite or flushes or not self.controller.is_due(self._here):
            return None
        decision = self._look(buckets)
        if decision is not None:
            self.decisions.append(decision)
        self._meter.pause()
        return decision

    def _look(self, buckets: Sequence[Parameters]) -> Decision | None:
        if not self._has_links and self._here > FIRST_LOOK:
            return None
        numbers = self._meter.to_numbers(len(buckets)).to(self._device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        measured = from_numbers(numbers.tolist())
        look, decision = NOTHING, None
        if self._mesh.rank == 0:
            look = self._think(lambda: self.controller.wants_probe(measured, buckets, self.exchanges)) or NOTHING
            if look == NOTHING:
                decision = self._decide(measured, buckets)
        look, decision = self._tell(look, decision)
        if look != NOTHING:
            probes = look == PROBE or self._seems_faster()
            start = time.perf_counter()
            found = self._probe() if probes else None
            if self._mesh.rank == 0:
                assert measured is not None
                known = measured
                if probes:
                    self.controller.probe_seconds = time.perf_counter() - start
                    self._think(lambda: self.controller.take_probe(found, known, buckets, self.exchanges))
                decision = self._decide(measured, buckets)
            _, decision = self._tell(NOTHING, decision)
        return decision

    def _decide(self, measured: Measured | None, buckets: Sequence[Parameters]) -> Decision | None:
        decision: Decision | None = self._think(lambda: self.controller.decide(measured, buckets, self.exchanges))
        if self.controller.warning:
            warnings.warn(self.controller.warning, stacklevel=2)
            self.controller.warning = ""
        return decision

    def _think(self, thought: Callable[[], Any]) -> Any:
        """Other ranks wait for what comes of it, so something must."""
        try:
            return thought()
        except Exception as error:
            warnings.warn(
                f"steps cannot be predicted ({type(error).__name__}: {error}): gradients travel uncompressed, which is "
                "safe",
                stacklevel=2,
            )
            self.controller.give_up("steps cannot be predicted")
            return None

    def _tell(self, look: int, decision: Decision | None) -> tuple[int, Decision | None]:
        """Rank 0's will, on all ranks."""
        names = list(self.controller.candidates)
        index = -1 if decision is None else names.index(decision.name)
        header = torch.tensor([look, index], dtype=torch.int64, device=self._device)
        dist.broadcast(header, 0, group=self._group)
        look, index = header.tolist()
        if index < 0:
            return look, None
        sentence = decision.sentence.encode()[:_SENTENCE_BYTES] if decision is not None else b""
        text = torch.tensor([*sentence.ljust(_SENTENCE_BYTES, b" ")], dtype=torch.uint8, device=self._device)
        dist.broadcast(text, 0, group=self._group)
        sentence = bytes(text.tolist()).rstrip(b" ")
        self.controller.current = names[index]
        return look, Decision(self.exchanges, names[index], sentence.decode(errors="replace"))

    def _probe(self) -> float:
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

    def _seems_faster(self) -> bool:
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

    def allow(self, names: Collection[str]) -> None:
        """From now on, choose among these only."""
        self.controller.allow(names)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings; those of rank 0 are the ones to keep."""
        return {
            "exchanges": self.exchanges,
            "controller": self.controller.state_dict(),
            "decisions": [asdict(decision) for decision in self.decisions],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, on all ranks."""
        self.exchanges = int(state["exchanges"])
        self.controller.load_state_dict(state["controller"])
        self.decisions.extend(Decision(**decision) for decision in state["decisions"])


__all__ = ["OFF", "Adaptation"]
