"""The ranks of a pipeline at work: a batch in, gradients in ``.grad`` and results out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from typing_extensions import override

from danon_lightning.strategies.pipeline.errors import UnsupportedStepError
from danon_lightning.strategies.pipeline.loss_weights import loss_factors
from danon_lightning.strategies.pipeline.ownership import shared
from danon_lightning.strategies.pipeline.passage import MicroBatch
from danon_lightning.strategies.pipeline.recording import TensorMeta
from danon_lightning.strategies.pipeline.schedules import Schedule
from danon_lightning.strategies.pipeline.stage import StagedModule
from danon_lightning.strategies.pipeline.timeline import PassObserver
from danon_lightning.strategies.pipeline.torch_pipelining import (
    ScheduledStage,
    as_in_memory,
    build_schedule,
    laid_out,
    no_view,
    run_schedule,
)
from danon_lightning.strategies.process_groups import GroupReference


@dataclass
class _Batch:
    """What is under way."""

    micro_batches: Sequence[MicroBatch]
    weights: Sequence[float]
    scale: float
    factors: Sequence[Sequence[float]] | None
    results: list[Any] = field(default_factory=list)
    error: BaseException | None = None


class Pipeline:
    """The stages of this rank, and those before and after them on other ranks.

    All ranks of a pipeline do the same calls in the same order, with the same micro-batches.
    """

    def __init__(
        self, staged: StagedModule, schedule: Schedule, group: dist.ProcessGroup, device: torch.device | str = "cpu"
    ) -> None:
        """Start. What this rank does not hold is released.

        Args:
            staged: The module, cut into as many stages as the schedule has.
            schedule: Which rank has which stage, and in which order they run.
            group: The ranks of the pipeline.
            device: Where they run.

        Raises:
            ValueError: If the module has another number of stages.
        """
        if staged.cuts.stages != schedule.stages:
            raise ValueError(f"the module is cut into {staged.cuts.stages} stages, the schedule has {schedule.stages}")
        self._staged, self._schedule, self._group = staged, schedule, GroupReference(group)
        self._device = torch.device(device)
        self._rank = dist.get_rank(group)
        self.stages = schedule.stages_of(self._rank)
        staged.release(self.stages, self._device)
        self._stages = [
            ScheduledStage(_StageModule(self, stage), stage, schedule.stages, self._device, group)
            for stage in self.stages
        ]
        self._on_several_ranks = self._find_shared()
        self._prepared: dict[int, Any] = {}
        self._batch: _Batch | None = None

    @property
    def has_last(self) -> bool:
        """Whether this rank runs the last stage: it alone has the results of the step."""
        return self._schedule.stages - 1 in self.stages

    def settle(self, owners: Mapping[str, Sequence[int]]) -> dict[nn.Parameter, Tensor]:
        """Hold no more than what the stages of this rank use.

        Args:
            owners: Which stages hold what; no stage anything new.

        Returns:
            What stands for each of the parameters that have been released.
        """
        before = {name: self._staged.parameter(name) for name in owners}
        self._staged.owners = owners
        self._staged.release(self.stages, self._device)
        self._on_several_ranks = self._find_shared()
        released = {}
        for name, parameter in before.items():
            if parameter is not None and self._staged.parameter(name) is None:
                released[parameter] = self._staged.placeholder(name)
        return released

    def counted_here(self) -> set[int]:
        """The ``id`` of each parameter that this rank is to count, where all ranks together count each once."""
        elsewhere = {id(parameter) for parameter, ranks in self._shared if ranks[0] != self._rank}
        held = [self._staged.parameter(name) for name in self._staged.owners]
        return {id(parameter) for parameter in held if parameter is not None} - elsewhere

    def train(
        self,
        micro_batches: Sequence[MicroBatch],
        weights: Sequence[float],
        scale: float = 1.0,
        observer: PassObserver | None = None,
    ) -> list[Any]:
        """Run forward and backward passes. Gradients are added to ``.grad``; :meth:`gather_shared_gradients` is left.

        Args:
            micro_batches: The parts of the batch.
            weights: What share of it each is; they add up to one.
            scale: What the loss is multiplied by for the backward pass.
            observer: Is told of passes, and of what lies between them.

        Returns:
            What the step returns for each micro-batch, without graphs, on the rank of the last stage; nothing on
            others.

        Raises:
            UnsupportedStepError: If the step cannot be run in stages.
        """
        for stage in self._stages:
            arriving = [self._arrives(stage.stage_index, one) for one in micro_batches]
            leaving = [self._arrives(stage.stage_index + 1, one) for one in micro_batches]
            stage.expect(_metas(arriving), _metas(leaving))
            stage.observer = observer
        number = len(micro_batches)
        if number not in self._prepared:
            self._prepared[number] = build_schedule(self._schedule.order(number), self._stages, number)
        with self._staged.attached():
            factors = self._loss_factors(micro_batches, weights)
            self._batch = batch = _Batch(micro_batches, weights, scale, factors)
            try:
                run_schedule(self._prepared[number], number, observer)
            except BaseException as error:
                self._prepared.clear()  # they are in the middle of something
                # torch wraps it, with all arguments in print.
                raise (batch.error or error) from None
            finally:
                self._batch = None
        return batch.results

    def evaluate(self, micro_batches: Sequence[MicroBatch], weights: Sequence[float]) -> list[Any]:
        """Run forward passes only, each stage all micro-batches before the next one.

        Args:
            micro_batches: The parts of the batch.
            weights: What share of it each is; they add up to one.

        Returns:
            What the step returns for each, on the rank of the last stage; nothing on others.

        Raises:
            UnsupportedStepError: If the step cannot be run in stages.
        """
        results: list[Any] = []
        sent: list[dist.Work] = []
        handed_over: list[tuple[Tensor, ...]] = []
        with self._staged.attached():
            factors = self._loss_factors(micro_batches, weights)
            for stage in self.stages:
                before, after = (self._schedule.rank_of(other) for other in (stage - 1, stage + 1))
                is_last = stage == self._schedule.stages - 1
                # All are asked for before anything is sent, or two ranks could wait for one another.
                arriving = [
                    self._receive(before, self._arrives(stage, one)) if before != self._rank and stage else ([], ())
                    for one in micro_batches
                ]
                given, handed_over = handed_over, []
                for index, micro_batch in enumerate(micro_batches):
                    works, received = arriving[index]
                    arriving[index] = [], ()
                    for work in works:
                        work.wait()
                    if stage and before == self._rank:
                        received = given[index]
                    own_factors = factors[index] if factors is not None and is_last else None
                    result = self._staged.forward(stage, micro_batch, received, own_factors)
                    if is_last:
                        results.append(result)
                    elif after == self._rank:
                        handed_over.append(result)
                    else:
                        sent += self._send(after, result, self._arrives(stage + 1, micro_batch))
        for work in sent:
            work.wait()
        return results

    def gather_shared_gradients(self) -> None:
        """Add up the gradients of what stages on several ranks hold (tied embeddings), on the first of these ranks."""
        for parameter, (first, *others) in self._shared:
            if self._rank != first:
                self._send_gradient(parameter.grad, first)
                continue
            found = [parameter.grad, *(self._receive_gradient(parameter, other) for other in others)]
            total: Tensor | None = None
            for gradient in found:
                if gradient is not None:
                    total = gradient if total is None else total + gradient
            parameter.grad = total

    def spread_shared_gradients(self) -> None:
        """Give the others what the first rank has made of them: the same bits on each."""
        for parameter, (first, *others) in self._shared:
            if self._rank == first:
                for other in others:
                    self._send_gradient(parameter.grad, other)
            else:
                parameter.grad = self._receive_gradient(parameter, first)

    def _send_gradient(self, gradient: Tensor | None, rank: int) -> None:
        dist.send(torch.tensor([gradient is not None], device=self._device).int(), group=self._group(), group_dst=rank)
        if gradient is not None:
            dist.send(gradient.contiguous(), group=self._group(), group_dst=rank)

    def _receive_gradient(self, parameter: Tensor, rank: int) -> Tensor | None:
        is_there = torch.zeros(1, dtype=torch.int32, device=self._device)
        dist.recv(is_there, group=self._group(), group_src=rank)
        if not is_there:
            return None
        gradient = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._device)
        dist.recv(gradient, group=self._group(), group_src=rank)
        return gradient

    @property
    def _shared(self) -> list[tuple[nn.Parameter, list[int]]]:
        """Parameters that are trained and the ranks that hold them, of those that this rank holds and others too."""
        return [(parameter, ranks) for parameter, ranks in self._on_several_ranks if parameter.requires_grad]

    def _find_shared(self) -> list[tuple[nn.Parameter, list[int]]]:
        found = []
        for name, stages in shared(self._staged.owners).items():
            ranks = sorted({self._schedule.rank_of(stage) for stage in stages})
            parameter = self._staged.parameter(name) if self._rank in ranks and len(ranks) > 1 else None
            if parameter is not None:
                found.append((parameter, ranks))
        return found

    def run_stage(self, stage: int, index: int, received: Sequence[Tensor]) -> Any:
        """Run a stage on a micro-batch of :meth:`train`."""
        batch = self._batch
        assert batch is not None
        factors = batch.factors[index] if batch.factors is not None else None
        try:
            result = self._staged.forward(stage, batch.micro_batches[index], received, factors)
            if stage < self._schedule.stages - 1:
                return tuple(no_view(tensor) for tensor in result)
            loss = loss_of(result)
        except BaseException as error:
            batch.error = error
            raise
        batch.results.append(apply_to_collection(result, Tensor, Tensor.detach))
        return loss * (batch.weights[index] * batch.scale)

    def _loss_factors(self, micro_batches: Sequence[MicroBatch], weights: Sequence[float]) -> list[list[float]] | None:
        return loss_factors(self._staged.count_losses(micro_batches), weights) if self.has_last else None

    def _arrives(self, stage: int, micro_batch: MicroBatch) -> list[TensorMeta]:
        """What a stage gets from the one before: nothing in the first one, and there is none after the last."""
        if stage in (0, self._schedule.stages):
            return []
        block = self._staged.cuts.blocks_of(stage).start
        return list(micro_batch.recording.blocks[block].arrives.values())

    def _receive(self, rank: int, metas: Sequence[TensorMeta]) -> tuple[list[dist.Work], tuple[Tensor, ...]]:
        buffers = tuple(torch.empty_like(meta.meta, device=self._device) for meta in metas)
        works = [dist.irecv(as_in_memory(buffer), group=self._group(), group_src=rank) for buffer in buffers]
        return [work for work in works if work is not None], buffers

    def _send(self, rank: int, tensors: Sequence[Tensor], metas: Sequence[TensorMeta]) -> list[dist.Work]:
        works = []
        for tensor, meta in zip(tensors, metas, strict=True):
            sent = laid_out(tensor.detach(), torch.empty_like(meta.meta).stride())
            works.append(dist.isend(as_in_memory(sent), group=self._group(), group_dst=rank))
        return [work for work in works if work is not None]


class _StageModule(nn.Module):
    """What torch takes for the module of a stage."""

    def __init__(self, pipeline: Pipeline, stage: int) -> None:
        super().__init__()
        self._run = pipeline.run_stage
        self.stage = stage
        self._parameters_of_stage = pipeline._staged.parameters_of

    @override
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Schedules that put off the gradients of weights ask which these are."""
        return iter(self._parameters_of_stage(self.stage))

    @override
    def forward(self, *received: Tensor, index: int) -> Any:
        return self._run(self.stage, index, received)


def loss_of(result: object) -> Tensor:
    """The loss in what a training step has returned: a tensor, or a mapping with one as ``"loss"``.

    Raises:
        UnsupportedStepError: If there is none.
    """
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UnsupportedStepError(
            f"a training step with pipeline stages must return the loss (a tensor of one element, or a dictionary with "
            f"one as 'loss'), but it returned {type(loss).__name__ if not isinstance(loss, Tensor) else loss.shape}: "
            "a step cannot be skipped by returning None"
        )
    return loss


def _metas(expected: Sequence[Sequence[TensorMeta]]) -> list[list[Tensor]]:
    return [[meta.meta.detach().requires_grad_(meta.requires_grad) for meta in metas] for metas in expected]
