"""The steps of a LightningModule on the micro-batches of a batch, as the Trainer sees them: one step on one batch."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from danon_lightning.strategies.pipeline.agreement import broadcast_plain
from danon_lightning.strategies.pipeline.batches import (
    check_alike,
    join_results,
    split_batch,
    tensors_in,
    weighted_mean,
)
from danon_lightning.strategies.pipeline.blocks import Blocks
from danon_lightning.strategies.pipeline.dry_run import batch_signature, dry_run
from danon_lightning.strategies.pipeline.logged import Logged, captured, number_of, replay, tensor_of
from danon_lightning.strategies.pipeline.metrics import SharedMetrics
from danon_lightning.strategies.pipeline.module_state import restored
from danon_lightning.strategies.pipeline.passage import MicroBatch
from danon_lightning.strategies.pipeline.pipeline import Pipeline, loss_of
from danon_lightning.strategies.pipeline.random_numbers import generators_restored
from danon_lightning.strategies.pipeline.recording import Recording
from danon_lightning.strategies.pipeline.timeline import PassObserver
from danon_lightning.strategies.process_groups import GroupReference

TRAINING = "training_step"
# What labels hold where they do not count.
_IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A batch that has been cut.

    Attributes:
        micro_batches: Its parts.
        sizes: How many samples each has.
        weights: By how much each counts in means; together 1.
    """

    micro_batches: list[MicroBatch]
    sizes: list[int]
    weights: list[float]


class Steps:
    """Runs the steps of a module through a pipeline. All ranks of the pipeline do the same calls.

    Attributes:
        recordings: What dry runs have found out, by the hook, what it was called with, and the kind of batch.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        blocks: Blocks,
        pipeline: Pipeline,
        metrics: SharedMetrics,
        group: GroupReference,
        device: torch.device,
        num_microbatches: int,
        microbatch_weight: Callable[[Any], float | Tensor] | None,
    ) -> None:
        """Start.

        Args:
            module: The module.
            blocks: Its body.
            pipeline: Runs micro-batches.
            metrics: Those of the module.
            group: The ranks of the pipeline.
            device: Where these run.
            num_microbatches: Into how many parts to cut a batch, if it has as many samples.
            microbatch_weight: By how much a part counts; None for its number of samples.
        """
        self._module, self._blocks, self._pipeline, self._metrics = module, blocks, pipeline, metrics
        self._group, self._device = group, device
        self._num_microbatches, self._microbatch_weight = num_microbatches, microbatch_weight
        self._logged: Logged | None = None
        self.recordings: dict[Any, Recording] = {}

    def prepare(
        self, hook: str, args: tuple[Any, ...], context: Callable[[], AbstractContextManager[Any]], seed: int
    ) -> Batch:
        """Cut a batch, and find out by a dry run what stages must know about its parts, once for each kind.

        Args:
            hook: The method of the module.
            args: For it: the batch, then whatever else it takes.
            context: To run it in.
            seed: For whatever it draws.
        """
        batch, *rest = args
        module = self._module
        check_alike(batch, self._group(), self._device)
        parts, sizes = split_batch(batch, self._num_microbatches)

        def step_on(index: int, part: Any) -> Callable[[], Any]:
            def step() -> Any:
                if self._logged is not None:
                    self._logged.begin(index)
                with captured(module, self._logged), self._metrics.step(), context():
                    return getattr(module, hook)(part, *rest)

            return step

        micro_batches = []
        for index, part in enumerate(parts):
            step = step_on(index, part)
            # Losses may be added from some epoch on.
            epoch = module.current_epoch if hook == TRAINING else 0
            key = hook, tuple(rest[1:]), epoch, batch_signature(module, part)
            if key not in self.recordings:
                self.recordings[key] = dry_run(module, self._blocks, step)
                if hook == TRAINING:
                    self._warn_of_ignored_labels(batch, self.recordings[key])
            micro_batches.append(MicroBatch(step, index, seed, self.recordings[key]))
        return Batch(micro_batches, sizes, self._weights(parts, sizes))

    def train(self, batch: Batch, scale: float, observer: PassObserver | None) -> Any:
        """Run forward and backward passes. Gradients are added to ``.grad``.

        Args:
            batch: From :meth:`prepare`.
            scale: What to multiply the loss by.
            observer: Is told of the passes, if given.

        Returns:
            The loss; on the last stage also what else the step has returned with it.
        """
        with self._logging() as logged:
            results = self._pipeline.train(batch.micro_batches, batch.weights, scale, observer)
        found = {}
        if results:
            losses = [loss_of(result) for result in results]
            found["loss"] = number_of(weighted_mean([float(loss) for loss in losses], batch.weights), losses[0])
        loss = tensor_of(self._agree(found, logged, batch)["loss"], self._device).requires_grad_()
        if results and isinstance(results[0], Mapping):
            return {**join_results(results, batch.sizes, batch.weights), "loss": loss}
        return loss

    def replay(self, batch: Batch, scale: float, observer: PassObserver) -> None:
        """Run forward and backward passes once more, logging nothing. Gradients are added to ``.grad``.

        Args:
            batch: From :meth:`prepare`.
            scale: What to multiply the loss by.
            observer: Is told of the passes.
        """
        with restored(self._module), generators_restored(self._device):
            self._pipeline.train(batch.micro_batches, batch.weights, scale, observer)

    def evaluate(self, batch: Batch, *, logs: bool) -> Any:
        """Run forward passes.

        Args:
            batch: From :meth:`prepare`.
            logs: Whether the step may log.

        Returns:
            What the step has returned; None but on the last stage.
        """
        with self._logging() as logged:
            results = self._pipeline.evaluate(batch.micro_batches, batch.weights)
        if logs:
            self._agree({}, logged, batch)
        return join_results(results, batch.sizes, batch.weights) if results else None

    def forget_training(self) -> None:
        """Have training steps looked at anew."""
        self.recordings = {key: one for key, one in self.recordings.items() if key[0] != TRAINING}

    def _weights(self, parts: Sequence[Any], sizes: Sequence[int]) -> list[float]:
        weights = [float(size) for size in sizes]
        if self._microbatch_weight is not None:
            weights = [float(self._microbatch_weight(part)) for part in parts]
            if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights):
                raise ValueError(
                    f"microbatch_weight has given {weights} for the micro-batches of a batch: it must give finite "
                    "numbers that are not negative, nor all zero"
                )
        return [weight / sum(weights) for weight in weights]

    def _warn_of_ignored_labels(self, batch: Any, recording: Recording) -> None:
        if self._microbatch_weight is not None or recording.losses or recording.tail_problem is not None:
            return
        integers = (tensor for tensor in tensors_in(batch) if tensor.dtype in (torch.int64, torch.int32))
        if any((tensor == _IGNORED).any() for tensor in integers):
            rank_zero_warn(
                f"the batch has labels {_IGNORED}, which are usually not counted, but the step calls no loss of "
                "torch.nn.functional that takes a mean: if its own code takes a mean over what is labelled, say so by "
                "DanonHybridStrategy(microbatch_weight=lambda batch: number of what is labelled). Micro-batches count "
                "by their numbers of samples otherwise, which is another mean"
            )

    @contextmanager
    def _logging(self) -> Iterator[Logged | None]:
        """Note what the step logs, on the last stage; elsewhere, values are absent."""
        self._logged = Logged() if self._pipeline.has_last else None
        try:
            yield self._logged
        finally:
            self._logged = None

    def _agree(self, found: dict[str, Any], logged: Logged | None, batch: Batch) -> dict[str, Any]:
        """Log on all ranks, and tell them what the last stage has found."""
        if logged is not None:
            found["logged"] = logged.combined(batch.weights, self._metrics.paths)
        agreed = broadcast_plain(found, self._metrics.source, self._group(), self._device)
        replay(self._module, agreed["logged"])
        return dict(agreed)
