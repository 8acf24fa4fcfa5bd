"""What a rank remembers from step to step: what compression has left out, and whatever else the next step needs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from danon_lightning.strategies.communication import kernels
from danon_lightning.strategies.communication.compressors import Compressor, LinearCompressor
from danon_lightning.strategies.communication.compressors.base import Context, Region
from danon_lightning.strategies.communication.error_feedback import ErrorFeedback
from danon_lightning.strategies.communication.messages import real_numel
from danon_lightning.strategies.seeds import seed_from

Role = Literal["worker", "server", "dense"]
Owed = Literal["residual", "momentum", "dense_momentum"]


class MomentumSource(Protocol):
    """An optimizer whose momentum is exchanged in place of the gradient (see :class:`OneBitAdam`)."""

    @property
    def frozen(self) -> bool:
        """Whether it is time to; the same on all ranks. Before, everything travels dense, as it is."""

    def blend(self, parameter: Tensor, start: int, stop: int, gradient: Tensor, share: float) -> None:
        """Make share · β·m + (1−β)·g of a part of a gradient, in place."""


@dataclass
class _Slot:
    """The memory of one region in one role. ``new_…`` become valid when the step is committed."""

    residual: Tensor | None = None
    new_residual: Tensor | None = None
    momentum: Tensor | None = None
    new_momentum: Tensor | None = None
    state: dict[str, Tensor | float] | None = None
    new_state: dict[str, Tensor | float] | None = None
    touched: bool = False
    seeds: tuple[int, int] | None = None  # of this rank alone, and of all that exchange the region

    def commit(self) -> None:
        if self.touched:
            self.residual, self.new_residual = self.new_residual, self.residual
            self.momentum, self.new_momentum = self.new_momentum, self.momentum
            if self.new_state is not None:  # an empty one is meant: the compressor has given its state up
                self.state = self.new_state
        self.touched = False


class Memory:
    """All that a rank remembers from step to step: residuals, momentum, and the compressor's own state, by region.

    A step writes to second buffers, which become the first ones once all ranks agree that its gradients are finite
    (:meth:`commit`); otherwise it is as if the step had never been (:meth:`roll_back`).

    Args:
        compressor: What codes the regions.
        feedback: How errors are fed back; None if they are forgotten.
        index: Which of the ranks that exchange the same regions this one is.
        groups: How many they are.
        parameters: The model's parameters by name.

    Attributes:
        numels: How many real numbers each parameter has.
        flush_next: Set it to have the next step, and all after it, send everything dense, and all that is owed with it.
    """

    def __init__(
        self,
        compressor: Compressor | LinearCompressor,
        feedback: ErrorFeedback | None,
        index: int,
        groups: int,
        parameters: dict[str, Tensor],
    ) -> None:
        """See the class."""
        self.compressor, self.feedback, self.index, self.groups = compressor, feedback, index, groups
        self._parameters = parameters
        self.numels = {name: real_numel(p) for name, p in parameters.items()}
        self.step = 0
        self.unused_parameters = False
        self.flush_next = False
        self._momentum_source: MomentumSource | None = None
        self._exchanges_momentum = False
        self._slots: dict[tuple[str, Region], _Slot] = {}
        # Mean residuals and momenta from a checkpoint, by parameter, until the regions that they belong to turn up.
        self._owed: dict[Owed, dict[str, Tensor]] = {"residual": {}, "momentum": {}, "dense_momentum": {}}
        self.owed_states: dict[tuple[str, Region], dict[str, Tensor | float]] = {}
        self.pending: dict[str, Any] | None = None  # all of it, until a step has been completed

    def exchange_momentum_of(self, source: MomentumSource) -> None:
        """Exchange an optimizer's momentum in place of gradients, from the moment on when it says so."""
        self._momentum_source = source

    def begin_step(self) -> None:
        """See what is to be exchanged in this step."""
        self._exchanges_momentum = self._momentum_source is not None and self._momentum_source.frozen

    @property
    def flushes(self) -> bool:
        """Whether this step sends everything dense, and all that is kept with it."""
        if self.flush_next:
            return True
        if self._momentum_source is not None and not self._exchanges_momentum:
            return True
        every = self.feedback.flush_every if self.feedback else None
        return every is not None and (self.step + 1) % every == 0

    def encode_sum(self, region: Region, sources: Sequence[Tensor], scale: float, payload: Tensor) -> "bool | Tensor":
        """Code a worker's ``scale · Σ sources`` (each ``[n]``) into ``payload``; returns whether it is finite."""
        assert isinstance(self.compressor, Compressor)
        if self.feedback is None and not self._exchanges_momentum:
            slot, context = self._touch("worker", region), self.context("worker", region)
            finite = self.compressor.encode_sum(sources, scale, payload, context)
            slot.new_state = context.new_state
            return finite
        values = torch.empty_like(sources[0], dtype=torch.float32)
        finite = kernels.add_scaled(values, sources, scale)
        self.encode("worker", region, values, payload)
        return finite

    def encode(self, role: Role, region: Region, values: Tensor, payload: Tensor) -> None:
        """Code ``values`` (float32 ``[n]``, changed on the way) into ``payload``, feeding errors back."""
        assert isinstance(self.compressor, Compressor)
        if self._takes_no_part(role, region, values):
            self.compressor.encode(values, payload, Context(self.step))
            return
        slot = self._touch(role, region)
        context = self.context(role, region)
        if role == "worker":
            self._correct(region, values, slot)
        if self.feedback is None:
            self.compressor.encode(values, payload, context)
        else:
            residual, new_residual = self._residuals(role, region, slot, values.device)
            self.compressor.encode_with_feedback(values, residual, self.feedback.decay, new_residual, payload, context)
            # Factor masking. A code of all elements leaves none behind, wherever it may be exact by chance.
            if slot.new_momentum is not None and role == "worker" and self.compressor.exchange == "gather":
                slot.new_momentum.mul_(new_residual != 0)
        slot.new_state = context.new_state

    def compensate(self, role: Role, region: Region, values: Tensor) -> None:
        """Add to ``values`` what is owed, which is thereby sent in full."""
        if self._takes_no_part(role, region, values):
            return
        slot = self._touch(role, region)
        if role == "worker":
            self._correct(region, values, slot)
        if self.feedback is None:
            return
        residual, new_residual = self._residuals(role, region, slot, values.device)
        values.add_(residual, alpha=self.feedback.decay)
        new_residual.zero_()

    def workspace(self, region: Region, shape: torch.Size, device: torch.device) -> Tensor:
        """Where to put the values that :meth:`rounds` is to code (float32 of the region's shape).

        What the code leaves of them becomes the residual where it lies, which saves a pass over memory.
        """
        if self.feedback is None or self.flushes:
            return torch.empty(shape, device=device)
        slot = self._slots.setdefault(("worker", region), _Slot())
        return self._residuals("worker", region, slot, device)[1].view(shape)

    def rounds(self, region: Region, values: Tensor) -> "LinearRounds":
        """Begin to code ``values`` (from :meth:`workspace`) in rounds of sums."""
        slot = None if self._takes_no_part("worker", region, values) else self._touch("worker", region)
        return LinearRounds(self, region, slot, values)

    def decoding_context(self, region: Region) -> Context:
        """What a :class:`LinearCompressor` may know when it decodes."""
        return Context(self.step, shared_seed=_at_step(seed_from(region), self.step))

    def correct_dense(self, region: Region, values: Tensor, loss_scale: float) -> None:
        """Clip a dense mean gradient (any float type), and give it the momentum, as compressed ones get it."""
        feedback = self.feedback
        gathers = feedback is not None and feedback.momentum is not None
        clips = feedback is not None and feedback.clip_norm is not None
        owed = self._owed["residual"].get(region.parameter)  # it was compressed before the checkpoint
        if not (gathers or clips or self._exchanges_momentum or owed is not None):
            return
        wide = values.float().div(loss_scale)
        self._clip(region, wide, 1)
        if owed is not None:
            wide.add_(owed.to(wide.device))
        if self._exchanges_momentum:
            self._blend(region, wide, 1.0)
        elif gathers:
            self._gather_momentum("dense", region, wide, self._touch("dense", region))
        values.copy_(wide.mul_(loss_scale))

    def commit(self) -> None:
        """Make the step's changes valid."""
        for slot in self._slots.values():
            slot.commit()
        self.step += 1
        for owed in self._owed.values():
            owed.clear()  # every region has turned up by now
        self.owed_states.clear()
        self.pending = None

    def roll_back(self) -> None:
        """Forget the step's changes."""
        for slot in self._slots.values():
            slot.touched = False

    def owes_more(self) -> bool:
        """Whether something is still owed after a step that has flushed what took part in it. Before :meth:`commit`."""
        left = [slot.residual for slot in self._slots.values() if not slot.touched and slot.residual is not None]
        return bool(torch.stack([residual.any() for residual in left]).any()) if left else False

    def residual_norm(self) -> float:
        """2-norm of this rank's residuals."""
        squares = [slot.residual.norm().square() for slot in self._slots.values() if slot.residual is not None]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def items(self, kind: Literal["residual", "momentum"]) -> Iterator[tuple[str, Region, Tensor]]:
        """(role, region, tensor) of everything kept."""
        for (role, region), slot in self._slots.items():
            tensor = slot.residual if kind == "residual" else slot.momentum
            if tensor is not None:
                yield role, region, tensor

    def states(self) -> Iterator[tuple[str, Region, dict[str, Tensor | float]]]:
        """(role, region, state) of the compressor's own memory."""
        for (role, region), slot in self._slots.items():
            if slot.state:
                yield role, region, slot.state

    def restore(
        self,
        role: str,
        region: Region,
        *,
        residual: Tensor | None = None,
        momentum: Tensor | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Set what is kept of a region."""
        slot = self._slots.setdefault((role, region), _Slot())
        slot.residual = residual if residual is not None else slot.residual
        slot.momentum = momentum if momentum is not None else slot.momentum
        slot.state = state if state is not None else slot.state

    def owe(self, kind: Owed, parameter: str, total: Tensor) -> None:
        """Take a share of a whole parameter's residual or momentum, whoever turns out to own which region of it."""
        self._owed[kind][parameter] = total

    def _takes_no_part(self, role: Role, region: Region, values: Tensor) -> bool:
        """Whether the parameter has not been used in this step: DDP then drops what it is sent, so nothing may be."""
        if not self.unused_parameters or self.feedback is None or self._exchanges_momentum or bool(values.any()):
            return False
        # What a checkpoint has left for it is there after the first step only for those that have taken it.
        slot = self._slots.setdefault((role, region), _Slot())
        self._residuals(role, region, slot, values.device)
        if role == "worker" and self.feedback.momentum is not None:
            self._momentum(role, region, slot, values.device)
        return True

    def _touch(self, role: str, region: Region) -> _Slot:
        slot = self._slots.setdefault((role, region), _Slot())
        slot.touched, slot.new_state = True, None
        slot.state = slot.state or self.owed_states.get((role, region))
        return slot

    def context(self, role: Role, region: Region) -> Context:
        """What an encoder may know."""
        slot = self._slots.setdefault((role, region), _Slot())
        if slot.seeds is None:
            slot.seeds = seed_from(region, role, self.index), seed_from(region)
        own, shared = (_at_step(seed, self.step) for seed in slot.seeds)
        return Context(self.step, seed=own, shared_seed=shared, state=slot.state or {})

    def _correct(self, region: Region, values: Tensor, slot: _Slot) -> None:
        """Turn the gradient of a node into what is to be compressed."""
        # The sum over M nodes of shares clipped to c/√M has a norm of about c, if they are independent.
        self._clip(region, values, self.groups)
        if self._exchanges_momentum:
            self._blend(region, values, 1 / self.groups)
        elif self.feedback is not None and self.feedback.momentum is not None:
            self._gather_momentum("worker", region, values, slot)

    def _blend(self, region: Region, values: Tensor, share: float) -> None:
        assert self._momentum_source is not None
        self._momentum_source.blend(self._parameters[region.parameter], region.start, region.stop, values, share)

    def _clip(self, region: Region, values: Tensor, groups: int) -> None:
        if self.feedback is not None and self.feedback.clip_norm is not None:
            part = region.numel / self.numels[region.parameter]
            limit = self.feedback.clip_norm * math.sqrt(part / groups)
            values.mul_((limit / values.norm().clamp_min(1e-30)).clamp_max(1.0))

    def _gather_momentum(self, role: Role, region: Region, values: Tensor, slot: _Slot) -> None:
        assert self.feedback is not None and self.feedback.momentum is not None
        momentum, new_momentum = self._momentum(role, region, slot, values.device)
        torch.mul(momentum, self.feedback.momentum, out=new_momentum)
        values.copy_(new_momentum.add_(values))

    def _momentum(self, role: Role, region: Region, slot: _Slot, device: torch.device) -> tuple[Tensor, Tensor]:
        if slot.momentum is None:
            slot.momentum = self._share_of("dense_momentum" if role == "dense" else "momentum", region, device)
        if slot.new_momentum is None:
            slot.new_momentum = torch.empty_like(slot.momentum)
        return slot.momentum, slot.new_momentum

    def _residuals(self, role: Role, region: Region, slot: _Slot, device: torch.device) -> tuple[Tensor, Tensor]:
        if slot.residual is None:
            # The server's residual is paid back by the workers too.
            slot.residual = (
                self._share_of("residual", region, device)
                if role == "worker"
                else torch.zeros(region.numel, device=device)
            )
        if slot.new_residual is None:
            slot.new_residual = torch.empty_like(slot.residual)
        return slot.residual, slot.new_residual

    def _share_of(self, kind: Owed, region: Region, device: torch.device) -> Tensor:
        total = self._owed[kind].get(region.parameter)
        if total is None:
            return torch.zeros(region.numel, device=device)
        shares = 1 if kind == "dense_momentum" else self.groups  # what travels dense is alike on all ranks
        return (total[region.start : region.stop] / shares).to(device)


class LinearRounds:
    """The sums that one region takes, one after another."""

    def __init__(self, memory: Memory, region: Region, slot: _Slot | None, values: Tensor) -> None:
        """See :meth:`Memory.rounds`; without a slot nothing is remembered."""
        self._memory, self._slot, self._values = memory, slot, values
        compressor, feedback = memory.compressor, memory.feedback
        assert isinstance(compressor, LinearCompressor)
        self._context = memory.context("worker", region)
        flat = values.view(-1)
        if slot is not None:
            memory._correct(region, flat, slot)
        if slot is not None and feedback is not None:
            residual, _ = memory._residuals("worker", region, slot, values.device)
            flat.add_(residual, alpha=feedback.decay)
        self._rounds = compressor.rounds(values, self._context, feedback=feedback is not None)
        self.code: Tensor | None = None

    def start(self) -> Tensor:
        """The first tensor to be summed."""
        return next(self._rounds)

    def resume(self, total: Tensor) -> Tensor | None:
        """Take the sum of the last one; returns the next, or None when ``code`` is there."""
        try:
            return self._rounds.send(total)
        except StopIteration as stop:
            self.code = stop.value
            slot = self._slot
            if slot is not None:
                slot.new_state = self._context.new_state
                if slot.new_momentum is not None:
                    slot.new_momentum.mul_(self._values.view(-1) != 0)  # factor masking
            return None


def _at_step(seed: int, step: int) -> int:
    """Another seed for each step: hashing anew would take longer than coding a small region."""
    return (seed + step * 0x9E3779B97F4A7C15) % (1 << 63)
