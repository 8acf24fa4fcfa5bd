"""Measuring a module on this machine: a few training steps of two sizes, in one process."""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from typing_extensions import override

from danon_lightning.planner.live_memory import LiveBytes
from danon_lightning.planner.profile import Affine, OptimizerCost, Part, Profile
from danon_lightning.strategies.pipeline.batches import tensors_in
from danon_lightning.strategies.pipeline.blocks import Blocks, find_blocks
from danon_lightning.strategies.pipeline.dry_run import dry_run
from danon_lightning.strategies.pipeline.errors import AbsentDataError, UnsupportedStepError
from danon_lightning.strategies.pipeline.logged import captured
from danon_lightning.strategies.pipeline.module_state import restored
from danon_lightning.strategies.pipeline.ownership import owners_before_use
from danon_lightning.strategies.pipeline.passage import MicroBatch
from danon_lightning.strategies.pipeline.pipeline import loss_of
from danon_lightning.strategies.pipeline.random_numbers import generators_restored
from danon_lightning.strategies.pipeline.recording import Cuts, Recording, TensorMeta
from danon_lightning.strategies.pipeline.stage import StagedModule
from danon_lightning.strategies.pipeline.torch_internals import calls_replaced
from danon_lightning.strategies.pipeline.trial import first_batch

_RUNS = 5
# So many steps as if there were a schedule of learning rates to be made for them.
_STEPS = 1000


def measure(
    module: pl.LightningModule,
    data: pl.LightningDataModule | Any = None,
    samples: tuple[int, int] | None = None,
    *,
    ranks: int = 1,
    pipeline_layers: str | None = None,
    precision: Any = "32-true",
    accelerator: str = "cpu",
    threads: int | None = 1,
    runs: int = _RUNS,
) -> Profile:
    """Measure a module. It stays as it is: a copy is trained for some steps.

    Args:
        module: The module.
        data: A batch, or where a first one can be had from; None if the module has a ``train_dataloader`` itself.
        samples: Two sizes of micro-batches to be measured; None for a rank's share of the batch, and a quarter of it.
        ranks: Of how many ranks one has a share.
        pipeline_layers: As for ``DanonHybridStrategy``.
        precision: As for the Trainer.
        accelerator: What to measure on: "cpu" or "cuda".
        threads: How many of this process compute, as a rank of the job will have; None to leave it.
        runs: How often each is measured; the median counts.

    Raises:
        ValueError: If there is no first batch, or it has no samples; or the sizes do not rise.
    """
    if samples is not None and not 1 <= samples[0] < samples[1]:
        raise ValueError(f"samples={samples} must be two numbers from 1 on, the second the greater one")
    measurement = _Measurement(samples, ranks, pipeline_layers, runs)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,
        max_steps=_STEPS,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[measurement],
    )
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    copied = copy.deepcopy(module)
    try:
        if data is None or isinstance(data, pl.LightningDataModule):
            trainer.fit(copied, datamodule=data)
        else:
            trainer.fit(copied, train_dataloaders=[data])
    finally:
        torch.set_num_threads(before)
    assert measurement.profile is not None
    return measurement.profile


def shares(batch_size: int, ranks: int) -> tuple[int, int]:
    """Sizes of micro-batches to measure: what a rank has of a batch without a pipeline, and a quarter of it.

    Args:
        batch_size: Samples of a step, of all ranks together.
        ranks: How many.
    """
    many = max(2, batch_size // ranks)
    return max(1, many // 4), many


def resized(batch: Any, samples: int) -> Any:
    """A batch of so many samples, some of them repeated if need be.

    Args:
        batch: Nested containers of tensors; those whose first dimension is that of the first tensor with any are cut.
        samples: How many.

    Raises:
        ValueError: If no tensor in it has a dimension.
    """
    size = samples_of(batch)

    def take(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != size:
            return tensor
        return tensor[torch.arange(samples, device=tensor.device) % size]

    return apply_to_collection(batch, Tensor, take)


def samples_of(batch: Any) -> int:
    """How many samples a batch has.

    Raises:
        ValueError: If no tensor in it has a dimension.
    """
    size = next((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), 0)
    if not size:
        raise ValueError(f"a batch of type {type(batch).__name__} has no tensor whose first dimension counts samples")
    return size


class _Measurement(pl.Callback):
    """Measures when all has been set up, and has training end before it begins."""

    def __init__(self, samples: tuple[int, int] | None, ranks: int, pipeline_layers: str | None, runs: int) -> None:
        self.profile: Profile | None = None
        self._samples, self._ranks, self._pipeline_layers, self._runs = samples, ranks, pipeline_layers, runs

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = pl_module.device
        batch = first_batch(trainer, device)
        if batch is None:
            raise ValueError(
                "a plan needs a first batch, from a list of batches or a DataLoader of a dataset that is no "
                "IterableDataset: give a batch of your own instead"
            )
        size = samples_of(batch)
        few, many = self._samples or shares(size, self._ranks)
        steps = {number: _Step(trainer, resized(batch, number)) for number in (few, many)}
        blocks, recordings, problem = _dry_runs(pl_module, self._pipeline_layers, steps)
        pl_module.train()
        for parameter in pl_module.parameters():
            if parameter.requires_grad:  # as after the first step: gradients are there, and added to
                parameter.grad = torch.zeros_like(parameter)
        measured = {number: _timed(pl_module, blocks, step, device, self._runs) for number, step in steps.items()}
        bytes_of = {number: _weighed(pl_module, blocks, step, device) for number, step in steps.items()}
        parts = _parts(few, many, measured, bytes_of, recordings)
        stage_seconds = count_seconds = 0.0
        if blocks is not None:
            stage_seconds, count_seconds = _stage_overhead(
                pl_module, blocks, recordings[few], steps[few], device, self._runs
            )
        self.profile = Profile(
            module=pl_module,
            blocks=blocks,
            no_pipeline=problem,
            recording=recordings.get(many),
            parts=parts,
            optimizer=_optimizer_cost(trainer.optimizers, device, self._runs),
            stage_seconds=stage_seconds,
            count_seconds=count_seconds,
            measured_samples=(few, many),
            batch_samples=size,
        )
        trainer.fit_loop.epoch_loop.max_steps = 0


@dataclass
class _Step:
    """The user's training step on a batch."""

    trainer: pl.Trainer
    batch: Any

    def __call__(self) -> Any:
        module = self.trainer.lightning_module
        arguments = [0] if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2) else []
        with captured(module, None), self.trainer.precision_plugin.train_step_context():
            return module.training_step(self.batch, *arguments)


def _dry_runs(
    module: pl.LightningModule, name: str | None, steps: dict[int, _Step]
) -> tuple[Blocks | None, dict[int, Recording], str | None]:
    try:
        blocks = find_blocks(module, name)
    except ValueError as error:
        if name is not None:
            raise
        return None, {}, str(error)
    try:
        return blocks, {number: dry_run(module, blocks, step) for number, step in steps.items()}, None
    except (UnsupportedStepError, AbsentDataError) as error:
        return None, {}, str(error)


@dataclass
class _Marks:
    """Calls something at the borders between parts, forward and backward."""

    blocks: Blocks | None
    forward: Callable[[], None]
    backward: Callable[[int], None]

    def attached(self) -> Any:
        return nullcontext() if self.blocks is None else calls_replaced(self.blocks.modules, self._marked)

    def _marked(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        assert self.blocks is not None
        last = len(self.blocks) - 1

        def call(*args: Any, **kwargs: Any) -> Any:
            entering = next((x for x in tensors_in((args, kwargs)) if x.requires_grad and x.grad_fn is not None), None)
            self.forward()
            if entering is not None:
                # What comes back for it ends the backward pass of this block.
                entering.register_hook(lambda _: self.backward(index))
            result = original(*args, **kwargs)
            if index == last:
                self.forward()
                leaving = next((x for x in tensors_in(result) if x.requires_grad), None)
                if leaving is not None:
                    leaving.register_hook(lambda _: self.backward(index + 1))
            return result

        return call


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _number_of_parts(blocks: Blocks | None) -> int:
    return 1 if blocks is None else len(blocks) + 2


def _timed(
    module: pl.LightningModule, blocks: Blocks | None, step: _Step, device: torch.device, runs: int
) -> list[tuple[float, float]]:
    """For each part the seconds of its forward and backward pass, the medians of some runs after a first one."""
    found = [_timed_once(module, blocks, step, device) for _ in range(runs + 1)][1:]
    return [
        (statistics.median(run[part][0] for run in found), statistics.median(run[part][1] for run in found))
        for part in range(_number_of_parts(blocks))
    ]


def _timed_once(
    module: pl.LightningModule, blocks: Blocks | None, step: _Step, device: torch.device
) -> list[tuple[float, float]]:
    moments: list[float] = []
    back: dict[int, float] = {}
    marks = _Marks(blocks, lambda: moments.append(_now(device)), lambda part: back.__setitem__(part, _now(device)))
    with restored(module), generators_restored(device):
        with marks.attached():
            begin = _now(device)
            loss = loss_of(step())
            end = _now(device)
            loss.backward()
            finished = _now(device)
    borders = [begin, *moments, end]
    forward = [after - before for before, after in zip(borders, borders[1:], strict=False)]
    # A part without a gradient for what enters it has no end of its own: what comes before it counts for it.
    backward, start = [0.0] * len(forward), end
    for part in reversed(range(len(forward))):
        ended = finished if part == 0 else back.get(part - 1)
        if ended is not None:
            backward[part] = max(0.0, ended - start)
            start = ended
    return list(zip(forward, backward, strict=True))


def _weighed(
    module: pl.LightningModule, blocks: Blocks | None, step: _Step, device: torch.device
) -> list[tuple[float, float, float]]:
    """For each part the bytes that it keeps, and the peaks of its forward and its backward pass."""
    mode = LiveBytes()
    lives: list[int] = []
    peaks: list[int] = []
    back: dict[int, int] = {}

    def forward() -> None:
        lives.append(mode.live)
        peaks.append(mode.begin_part())

    def backward(part: int) -> None:
        back[part] = mode.begin_part()

    marks = _Marks(blocks, forward, backward)
    gc.collect()
    with restored(module), generators_restored(device), marks.attached(), mode:
        mode.live, _ = 0, mode.begin_part()
        loss = loss_of(step())
        forward()
        loss.backward()
        back[-1] = mode.begin_part()
    before = [0, *lives]
    kept = [max(0, after - live) for live, after in zip(before, lives, strict=False)]
    found = []
    for part, own in enumerate(kept):
        ended = back.get(part - 1)
        earlier = sum(kept[:part])
        found.append((
            float(own),
            float(max(own, peaks[part] - before[part])),
            float(max(own, ended - earlier if ended is not None else 0)),
        ))  # fmt: skip
    return found


def _parts(
    few: int,
    many: int,
    seconds: dict[int, list[tuple[float, float]]],
    weights: dict[int, list[tuple[float, float, float]]],
    recordings: dict[int, Recording],
) -> tuple[Part, ...]:
    def line(values: Callable[[int], float]) -> Affine:
        return Affine.through((few, values(few)), (many, values(many)))

    parts = []
    for index in range(len(seconds[few])):
        at = index - 1
        entering: dict[str, Any] = {}
        if recordings and 0 <= at < len(recordings[few].blocks):
            entering = {
                "entering": line(lambda n, at=at: _bytes(recordings[n].blocks[at].arrives.values())),  # type: ignore[misc]
                "returned": line(
                    lambda n, at=at: _bytes(m for m in recordings[n].blocks[at].arrives.values() if m.requires_grad)  # type: ignore[misc]
                ),
                "obstacle": recordings[few].blocks[at].obstacle,
                "is_block": True,
            }
        parts.append(
            Part(
                forward=line(lambda n, index=index: seconds[n][index][0]),  # type: ignore[misc]
                backward=line(lambda n, index=index: seconds[n][index][1]),  # type: ignore[misc]
                kept=line(lambda n, index=index: weights[n][index][0]),  # type: ignore[misc]
                forward_peak=line(lambda n, index=index: weights[n][index][1]),  # type: ignore[misc]
                backward_peak=line(lambda n, index=index: weights[n][index][2]),  # type: ignore[misc]
                **entering,
            )
        )
    return tuple(parts)


def _bytes(metas: Any) -> float:
    found: Sequence[TensorMeta] = list(metas)
    return float(sum(one.meta.numel() * one.meta.element_size() for one in found))


def _stage_overhead(
    module: pl.LightningModule,
    blocks: Blocks,
    recording: Recording,
    step: _Step,
    device: torch.device,
    runs: int,
) -> tuple[float, float]:
    """What two stages take longer than the whole, for each; and what it takes to see what losses divide by."""
    middle = next((at for at in _from_the_middle(len(blocks)) if recording.blocks[at].obstacle is None), None)
    if middle is None:
        return 0.0, 0.0
    cuts = Cuts((0, middle, len(blocks)))
    staged = StagedModule(module, blocks, cuts, owners_before_use(module, blocks, cuts))
    micro_batch = MicroBatch(step, 0, 0, recording)
    more, counting = [], []
    with restored(module):
        for _ in range(runs + 1):
            start = _now(device)
            step()
            whole = _now(device) - start
            with staged.attached():
                start = _now(device)
                sent = staged.forward(0, micro_batch)
                staged.forward(1, micro_batch, [one.detach().requires_grad_(one.requires_grad) for one in sent])
                more.append((_now(device) - start - whole) / 2)
                start = _now(device)
                staged.count_losses([micro_batch])
                counting.append(_now(device) - start)
    return max(0.0, statistics.median(more[1:])), statistics.median(counting[1:])


def _from_the_middle(number: int) -> list[int]:
    return sorted(range(1, number), key=lambda at: abs(2 * at - number))


def _optimizer_cost(optimizers: Sequence[torch.optim.Optimizer], device: torch.device, runs: int) -> OptimizerCost:
    parameters = [p for one in optimizers for group in one.param_groups for p in group["params"] if p.requires_grad]
    numel = sum(parameter.numel() for parameter in parameters) or 1
    seconds = []
    mode = LiveBytes()
    for run in range(runs + 2):
        with mode if run == 1 else nullcontext():  # the state is there by then
            start = _now(device)
            for one in optimizers:
                one.step()
            seconds.append(_now(device) - start)
    state = sum(
        value.numel() * value.element_size()
        for one in optimizers
        for kept in one.state.values()
        for value in kept.values()
        if isinstance(value, Tensor)
    )
    return OptimizerCost(
        name=", ".join(dict.fromkeys(type(one).__name__ for one in optimizers)) or "none",
        seconds_per_element=statistics.median(seconds[2:]) / numel,
        state_bytes_per_element=state / numel,
        temporary_bytes_per_element=mode.peak / numel,
        instances=tuple(optimizers),
    )
