"""What a communicator with ``compression="auto"`` does at the end of its exchanges, on all ranks alike."""

import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from danon_lightning.strategies.communication.adaptive.controller import FIRST_LOOK, OFF, Controller, Decision, by_name
from danon_lightning.strategies.communication.adaptive.forecast import Forecaster
from danon_lightning.strategies.communication.adaptive.measurement import Measured, Moment, StepMeter, from_numbers
from danon_lightning.strategies.communication.adaptive.settings import FOR_ANY_OPTIMIZER, FOR_SGD, AutoCompression
from danon_lightning.strategies.communication.cost_model import agree_on_costs, coding_costs, probe_links
from danon_lightning.strategies.communication.cost_model.traffic import Parameters
from danon_lightning.strategies.communication.levels import LARGEST_MESSAGE_BYTES, Box, GroupLevel
from danon_lightning.strategies.mesh import Mesh

# Of a probe between steps the first part is not timed: it fills buffers and token buckets on the way. Of the others the
# fastest counts: a link may seem slower than it is, while processors are busy.
_PROBE_PARTS, _IN_FLIGHT = 3, 2
# A part takes about so long on the link as it was before, within these sizes.
_PART_SECONDS, _LEAST_PART, _MOST_PART = 0.1, 1 << 20, 8 << 20
# A link that turns out so many times as fast is probed again, with larger parts.
_MUCH_FASTER = 2.0
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
        probes, decision = False, None
        if self._mesh.rank == 0:
            probes = bool(self._think(lambda: self.controller.wants_probe(measured, buckets, self.exchanges)))
            if not probes:
                decision = self._decide(measured, buckets)
        told, decision = self._tell(probes, decision)
        if told:
            start = time.perf_counter()
            found = self._probe()
            self.controller.probe_seconds = time.perf_counter() - start
            if self._mesh.rank == 0:
                assert measured is not None
                known = measured
                self._think(lambda: self.controller.take_probe(found, known, buckets, self.exchanges))
                decision = self._decide(measured, buckets)
            _, decision = self._tell(False, decision)
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

    def _tell(self, probes: bool, decision: Decision | None) -> tuple[bool, Decision | None]:
        """Rank 0's will, on all ranks."""
        names = list(self.controller.candidates)
        index = -1 if decision is None else names.index(decision.name)
        header = torch.tensor([int(probes), index], dtype=torch.int64, device=self._device)
        dist.broadcast(header, 0, group=self._group)
        told, index = header.tolist()
        if index < 0:
            return bool(told), None
        sentence = decision.sentence.encode()[:_SENTENCE_BYTES] if decision is not None else b""
        text = torch.tensor([*sentence.ljust(_SENTENCE_BYTES, b" ")], dtype=torch.uint8, device=self._device)
        dist.broadcast(text, 0, group=self._group)
        sentence = bytes(text.tolist()).rstrip(b" ")
        self.controller.current = names[index]
        return bool(told), Decision(self.exchanges, names[index], sentence.decode(errors="replace"))

    def _probe(self) -> float:
        """Bytes a second that a node can send to others at present, all its ranks at once. Collective."""
        known, size = self._bytes_per_second, 0
        while True:
            before, size = (
                size,
                max(_LEAST_PART, min(int(_PART_SECONDS * known / self._mesh.ranks_per_node), _MOST_PART)),
            )
            if size <= before:
                break
            known = self._time_parts(size)
            if known < _MUCH_FASTER * self._bytes_per_second:
                break
        self._bytes_per_second = known
        return known

    def _time_parts(self, size: int) -> float:
        """Send parts of so many bytes a rank; returns a node's bytes a second. Collective."""
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

        started, ends = 0, []
        self._agree_on(torch.zeros(1, dtype=torch.float64))  # so that all begin at once
        for finished in range(_PROBE_PARTS * boxes):
            while started < min(finished + _IN_FLIGHT, _PROBE_PARTS * boxes):
                start()
                started += 1
            finish()
            if (finished + 1) % boxes == 0:
                ends.append(Moment(self._device))
        fastest = min(
            self._agree_on(torch.tensor([one.until(other)], dtype=torch.float64)) for one, other in pairwise(ends)
        )
        return self._mesh.ranks_per_node * boxes * row * sum(outer.remote) / max(fastest, 1e-9)

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
