"""Running the stages of a step: each runs the user's whole step, with what other stages hold absent."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from danon_lightning.strategies.pipeline.absent import Absent, find_absent, with_arrived
from danon_lightning.strategies.pipeline.blocks import Blocks
from danon_lightning.strategies.pipeline.errors import AbsentDataError, UnsupportedStepError
from danon_lightning.strategies.pipeline.loss_weights import CountedLosses, EnoughCountedError, RescaledLosses
from danon_lightning.strategies.pipeline.module_state import restored
from danon_lightning.strategies.pipeline.observer import Observer, observed_by
from danon_lightning.strategies.pipeline.passage import MicroBatch, NextStageReachedError, Passage
from danon_lightning.strategies.pipeline.random_numbers import HEAD, generators_restored, reseed
from danon_lightning.strategies.pipeline.recording import Cuts
from danon_lightning.strategies.pipeline.slots import Slot, blocks_of_slots, find_slots
from danon_lightning.strategies.pipeline.torch_internals import calls_replaced


class StagedModule:
    """A module in this process, of which any stage can be run."""

    def __init__(self, root: nn.Module, blocks: Blocks, cuts: Cuts, owners: Mapping[str, Sequence[int]]) -> None:
        """Start.

        Args:
            root: The module that owns everything the step uses.
            blocks: Its body.
            cuts: Which blocks each stage has.
            owners: Which stages hold each parameter and buffer (see :func:`ownership.find_owners`).
        """
        self.root, self.blocks, self.cuts, self.owners = root, blocks, cuts, owners
        self._slots = find_slots(root)
        self._first_names = {name: first for first, slot in self._slots.items() for name in slot.names}
        self._of_blocks = blocks_of_slots(self._slots, blocks.modules)
        self._passage: Passage | None = None

    def release(self, stages: Iterable[int], device: torch.device | None = None) -> None:
        """Let go of all parameters and buffers that none of these stages holds: they become absent.

        Args:
            stages: The stages of this process.
            device: Where they claim to be, if not where they were.
        """
        kept = set(stages)
        for name, slot in self._slots.items():
            if not kept & set(self.owners[name]):
                slot.put(Absent.like(slot.get(), name=name, device=device))

    def parameters_of(self, stage: int) -> list[nn.Parameter]:
        """The parameters that a stage holds.

        Args:
            stage: One of this process.
        """
        found = (self.parameter(name) for name, stages in self.owners.items() if stage in stages)
        return [parameter for parameter in found if parameter is not None]

    def parameter(self, name: str) -> nn.Parameter | None:
        """A parameter by its first full name; None if this process does not hold it, or it is a buffer.

        Args:
            name: See above.
        """
        held = self._slots[name].get()
        return held if isinstance(held, nn.Parameter) and not isinstance(held, Absent) else None

    def keeper(self, name: str) -> int | None:
        """The stage that keeps a parameter or buffer up to date; None if there is none of this name.

        Args:
            name: Any of its full names.
        """
        first = self._first_names.get(name)
        return None if first is None else self.owners[first][0]

    def placeholder(self, name: str) -> Tensor:
        """What stands in the place of a parameter that this process does not hold.

        Args:
            name: Its first full name.
        """
        return self._slots[name].get()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Make blocks do what their stage asks for, for as long as a schedule lasts.

        Backward belongs to it: activation checkpointing calls blocks again.
        """
        with calls_replaced(self.blocks.modules, self._replacement):
            yield

    def forward(
        self,
        stage: int,
        micro_batch: MicroBatch,
        received: Sequence[Tensor] = (),
        loss_factors: Sequence[float] | None = None,
    ) -> Any:
        """Run a stage. Only inside of :meth:`attached`.

        Args:
            stage: Which one.
            micro_batch: What to run it on.
            received: What the stage before has returned; nothing for the first one. Leaves that require gradients where
                those do, whose gradients are then to be given back to that stage.
            loss_factors: What losses that take a mean are to be multiplied by (see ``loss_weights``).

        Returns:
            What the next stage must get: a tuple of tensors. Of the last stage, the result of the step.

        Raises:
            UnsupportedStepError: If the step cannot be cut here, or takes another way than in its dry run.
        """
        own = self.cuts.blocks_of(stage)
        obstacle = micro_batch.recording.blocks[own.start].obstacle
        if obstacle is not None:
            raise UnsupportedStepError(f"the step cannot be cut before block {own.start}: {obstacle}")
        losses = nullcontext() if loss_factors is None else RescaledLosses(loss_factors)
        with self._hidden() as reveal, losses:
            passage = Passage(micro_batch, own, received, lambda: reveal(stage))
            if stage == 0:
                reveal(stage)
            try:
                result = with_arrived(self._run(passage, micro_batch, Observer(self._buffers())))
            except NextStageReachedError as reached:
                return passage.outgoing(reached)
        if stage < self.cuts.stages - 1:
            raise UnsupportedStepError(
                f"stage {stage} should have ended at block {own.stop} of {self.blocks.name!r}, but the step went on: "
                "it must not catch every exception (a bare except, or except BaseException), nor leave blocks out"
            )
        passage.finish()
        missing = find_absent(result)
        if missing is not None:
            raise AbsentDataError(
                f"the result of the step contains {missing!r}, which depends on parameters that the last stage does "
                "not hold: return what is computed from the last block"
            )
        return result

    def count_losses(self, micro_batches: Iterable[MicroBatch]) -> list[list[float | None]]:
        """What the losses that take a mean divide by (see ``loss_weights``).

        Runs the steps without any parameter, and leaves the module as it was. Only inside of :meth:`attached`.

        Args:
            micro_batches: The micro-batches of a batch.

        Returns:
            For each of them the divisors in the order of the calls.
        """
        counted: list[list[float | None]] = []
        blocks = len(self.blocks)
        with restored(self.root), self._hidden():
            for micro_batch in micro_batches:
                passage = Passage(micro_batch, range(blocks, blocks), (), lambda: None)
                losses = CountedLosses(stop_after=micro_batch.recording.losses)
                if micro_batch.recording.losses:
                    with losses, suppress(EnoughCountedError):
                        self._run(passage, micro_batch, _TailObserver(self._buffers(), passage))
                counted.append(losses.divisors)
        return counted

    def _run(self, passage: Passage, micro_batch: MicroBatch, observer: Observer) -> Any:
        device = next(iter(self._slots.values())).get().device
        with generators_restored(device), observed_by(observer):
            reseed(micro_batch.seed, micro_batch.index, HEAD)
            self._passage = passage
            try:
                return micro_batch.step()
            finally:
                self._passage = None

    @contextmanager
    def _hidden(self) -> Iterator[Callable[[int], None]]:
        """Make all parameters outside of blocks absent, until the stage that holds them is reached.

        Where a process holds a parameter for a later part of the step (tied embeddings), what comes before would else
        be half there.
        """
        outside = [slot for name, slot in self._slots.items() if slot.is_parameter and name not in self._of_blocks]
        hidden: list[tuple[Slot, Tensor, Absent]] = []
        for slot in outside:
            held = slot.get()
            if not isinstance(held, Absent):
                stand_in = Absent.like(held, name=slot.name)
                hidden.append((slot, held, stand_in))
                slot.put(stand_in)

        def reveal(stage: int) -> None:
            for slot, held, stand_in in hidden:
                if stage in self.owners[slot.name]:
                    # The step may have got hold of it before.
                    stand_in.arrive(held)
                    slot.put(held)

        try:
            yield reveal
        finally:
            for slot, held, _ in hidden:
                slot.put(held)

    def _buffers(self) -> set[int]:
        return {id(slot.get()) for slot in self._slots.values() if not slot.is_parameter}

    def _replacement(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        block = self.blocks.modules[index]

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._passage is not None:
                return self._passage.call(index, block, original, args, kwargs)
            # Activation checkpointing repeats an own block in backward.
            args, kwargs = with_arrived((args, kwargs))
            if find_absent((args, kwargs)) is not None:
                raise AbsentDataError(f"block {index} is called again outside of its stage, without its arguments")
            return original(*args, **kwargs)

        return call


class _TailObserver(Observer):
    """Lets the tail read and write, since its result does not matter."""

    def __init__(self, buffers: set[int], passage: Passage) -> None:
        super().__init__(buffers)
        self._passage = passage

    def read(self, tensor: Tensor) -> None:
        if not self._passage.in_tail:
            super().read(tensor)

    def write(self, func: torch._ops.OpOverload, target: Tensor) -> None:
        if not self._passage.in_tail:
            super().write(func, target)
