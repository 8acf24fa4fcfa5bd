"""What a communicator with ``compression="auto"`` does at the end of its exchanges, on all ranks alike."""

import struct
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from danon_lightning.strategies.communication.adaptive.controller import (
    FIRST_LOOK,
    NOTHING,
    PROBE,
    Controller,
    Decision,
    by_name,
)
from danon_lightning.strategies.communication.adaptive.forecast import Forecaster
from danon_lightning.strategies.communication.adaptive.link_probe import LinkProbe
from danon_lightning.strategies.communication.adaptive.measurement import Measured, StepMeter, from_numbers
from danon_lightning.strategies.communication.adaptive.settings import FOR_ANY_OPTIMIZER, FOR_SGD, AutoCompression
from danon_lightning.strategies.communication.cost_model import agree_on_costs, coding_costs, probe_links
from danon_lightning.strategies.communication.cost_model.traffic import Parameters
from danon_lightning.strategies.communication.layout import group_of_all
from danon_lightning.strategies.communication.levels import GroupLevel
from danon_lightning.strategies.mesh import Mesh

# What rank 0 wishes to know of the link, the number of what it has decided, whether the next look that is due is left
# out, and why.
_WILL = struct.Struct("<hh?512s")
_KEPT_DECISIONS = 100


class Adaptation:
    """Measures steps, has rank 0 decide, and tells all ranks at the same step.

    Args:
        settings: What may be chosen, and how readily.
        mesh: Layout of the ranks.
        outer: The level between nodes.
        hierarchical: As for the communicator.
        device: Where gradients lie.
        timeout: How long one operation may take; None for torch's default.

    Attributes:
        controller: Decides, on rank 0; elsewhere it is told.
        decisions: The last ones, on all ranks.
        exchanges: Number of finite ones since the start of training.
    """

    def __init__(
        self,
        settings: AutoCompression,
        mesh: Mesh,
        outer: GroupLevel,
        *,
        hierarchical: bool | Literal["auto"],
        device: torch.device,
        timeout: timedelta | None,
    ) -> None:
        """See the class. Collective: it probes the links."""
        self._mesh, self._device = mesh, device
        # Of its own: looks are taken while others may use the communicator's.
        self._group = group_of_all(mesh, device, timeout)
        candidates = by_name(settings.resolve(FOR_SGD))
        links, reason = None, "all ranks are on one node"
        if mesh.num_nodes > 1:
            links, reason = probe_links(mesh, device=device), "the links could not be measured"
        self._has_links = links is not None
        known = links.inter.bytes_per_second if links is not None and links.inter is not None else 0.0
        self._probe = LinkProbe(outer, self._group, mesh, device, known)
        forecaster = Forecaster(links, candidates, {}, hierarchical, device) if links is not None else None
        self.controller = Controller(settings, candidates, forecaster, reason)
        if settings.candidates is None:
            self.controller.allow(by_name(settings.resolve(FOR_ANY_OPTIMIZER)))
        self._meter = StepMeter(device, settings.every_n_steps)
        self.decisions: deque[Decision] = deque(maxlen=_KEPT_DECISIONS)
        self.exchanges = 0
        self._here = 0
        self._knows_costs = False
        self._told: tuple[Tensor, dist.Work] | None = None  # rank 0's will, on its way
        self._seen: Measured | None = None
        self._rests = False  # until a look is due

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

    def end_exchange(self, *, finite: bool) -> Decision | None:
        """When all buckets have been averaged, and before that is told. Collective if something must be measured.

        Args:
            finite: Whether it counts; the same on all ranks.

        Returns:
            What the last look has decided, if anything.
        """
        self._meter.end_exchange()
        self._here += 1
        self.exchanges += finite
        if self._told is None:
            return None
        wish, decision = self._heard(*self._told)
        self._told = None
        if wish != NOTHING:
            # While all ranks wait: beside training, busy processors would make the link seem slower than it is.
            if wish == PROBE or self._ping():
                decision = self._measure_link()
            self._meter.pause()
        if decision is not None:
            self.decisions.append(decision)
        return decision

    def look(self, buckets: Sequence[Parameters]) -> None:
        """Between two exchanges, where it takes time that nobody waits for. Now and then it is collective.

        What comes of it is known at the end of the next exchange, on all ranks.

        Args:
            buckets: In the order in which they were exchanged.
        """
        if self._group is None or not self.controller.is_due(self._here):
            return
        if not self._has_links and self._here > FIRST_LOOK:
            return
        if self._rests:
            self._rests = False
            return
        numbers = self._meter.to_numbers(len(buckets)).to(self._device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        self._seen = measured = from_numbers(numbers.tolist(), buckets)
        wish, decision = NOTHING, None
        if self._mesh.rank == 0:
            wish = self._think(lambda: self.controller.wants_probe(measured, self.exchanges)) or NOTHING
            if wish != PROBE:
                decision = self._decide(measured)
        wish = wish if decision is None else NOTHING
        # While all is as expected, every second look will do: each takes time of processors that compute.
        rests = decision is None and wish != PROBE and measured is not None and self.controller.is_calm
        self._told = self._tell(wish, decision, rests=rests)

    def _ping(self) -> bool:
        """Stop all ranks to see whether the link may have become much faster."""
        start = time.perf_counter()
        faster = self._probe.seems_faster()
        self.controller.ping_seconds = time.perf_counter() - start
        return faster

    def _measure_link(self) -> Decision | None:
        """Stop all ranks to do it, and decide by it."""
        start = time.perf_counter()
        found = self._probe.measure()
        measured, decision = self._seen, None
        if self._mesh.rank == 0:
            assert measured is not None
            self.controller.probe_seconds = time.perf_counter() - start
            self._think(lambda: self.controller.take_probe(found, measured, self.exchanges))
            decision = self._decide(measured)
        return self._heard(*self._tell(NOTHING, decision))[1]

    def _decide(self, measured: Measured | None) -> Decision | None:
        decision: Decision | None = self._think(lambda: self.controller.decide(measured, self.exchanges))
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

    def _tell(self, wish: int, decision: Decision | None, *, rests: bool = False) -> "tuple[Tensor, dist.Work]":
        """Begin to tell all ranks rank 0's will."""
        index = -1 if decision is None else list(self.controller.candidates).index(decision.name)
        sentence = b"" if decision is None else decision.sentence.encode()
        will = torch.frombuffer(bytearray(_WILL.pack(wish, index, rests, sentence)), dtype=torch.uint8).to(self._device)
        return will, dist.broadcast(will, 0, group=self._group, async_op=True)

    def _heard(self, will: Tensor, work: "dist.Work") -> tuple[int, Decision | None]:
        """Rank 0's will, on all ranks."""
        work.wait()
        wish, index, self._rests, sentence = _WILL.unpack(bytes(will.tolist()))
        if index < 0:
            return wish, None
        name = list(self.controller.candidates)[index]
        self.controller.current = name
        return wish, Decision(self.exchanges, name, sentence.rstrip(b"\0").decode(errors="replace"))

    def close(self) -> None:
        """Give up its process group. Every rank does it, with nothing under way."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
            self._group = None

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
