"""The strategy with pipeline parallelism: replicas of the model that several ranks share."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from fairscale.nn.checkpoint import checkpoint_wrapper
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import _augment_message
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from danon_lightning.strategies.hybrid import DanonHybridStrategy
from danon_lightning.strategies.optimizer_sharding import ShardedOptimizer
from danon_lightning.strategies.pipeline.agreement import broadcast_plain
from danon_lightning.strategies.pipeline.balance import Costs, cut_table, parameter_costs, suggested_cuts
from danon_lightning.strategies.pipeline.blocks import Blocks
from danon_lightning.strategies.pipeline.checkpoint import gather_plain, load_own
from danon_lightning.strategies.pipeline.initialization import made_in_part, reproducible
from danon_lightning.strategies.pipeline.metrics import SharedMetrics
from danon_lightning.strategies.pipeline.norms import agreeing_on_overflow, clip_by_total_norm
from danon_lightning.strategies.pipeline.ownership import find_owners, owners_before_use
from danon_lightning.strategies.pipeline.pipeline import Pipeline
from danon_lightning.strategies.pipeline.planning import belongs_across_nodes, blocks_for, choose_cuts
from danon_lightning.strategies.pipeline.recording import Cuts
from danon_lightning.strategies.pipeline.refusals import check_optimizers, check_trainer, check_whole
from danon_lightning.strategies.pipeline.stage import StagedModule
from danon_lightning.strategies.pipeline.steps import TRAINING, Batch, Steps
from danon_lightning.strategies.pipeline.timeline import COMPUTE, Pass, PassObserver, Stopwatch, gather_passes
from danon_lightning.strategies.process_groups import GroupReference, own_group
from danon_lightning.strategies.seeds import seed_from

# The first steps are slower than all others.
_MEASURED_STEP = 5


class PipelinedStrategy(DanonHybridStrategy):
    """What ``DanonHybridStrategy(pipeline_parallel_size=…)`` makes. See there."""

    _staged: StagedModule | None = None
    _blocks: Blocks
    _pipeline: Pipeline
    _metrics: SharedMetrics
    _steps: Steps
    _costs: Costs | None = None
    _made_in_part: Collection[str] = ()
    _is_placed = _measures = _keeps_batches = False
    _trained = _evaluated = 0
    _measured: Sequence[Pass] = ()
    _kept: Sequence[tuple[Batch, float]] = ()

    @override
    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Have ``configure_model`` make only what the stages of this rank need.

        It runs twice: without any data, which shows what there is; then for the part.
        """
        module = self.lightning_module
        assert module is not None
        if self._staged is not None and self._staged.root is module:
            yield  # an earlier call of the Trainer has made it
            return

        def make() -> None:
            with reproducible(seed, self.root_device), self.precision_plugin.module_init_context():
                module.configure_model()

        def own_parameters() -> list[str]:
            self._made_in_part = {name for name, parameter in module.named_parameters() if parameter.is_meta}
            blocks, cuts = self._decide(module)
            own = set(self._schedule.stages_of(self.mesh.pipeline_rank))
            owners = owners_before_use(module, blocks, cuts)
            return [name for name, stages in owners.items() if own & set(stages)]

        seed = self._shared_seed()
        with made_in_part(module, make, own_parameters, self.root_device):
            yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Cut the module, and let go of what other ranks hold."""
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        check_trainer(trainer, syncs_batch_norm=self._layer_sync is not None)
        module = self.lightning_module
        if self._staged is None or self._staged.root is not module:
            self.precision_plugin.convert_module(module)
            check_whole(module)
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if name not in self._made_in_part:
                    tensor.data = tensor.data.to(self.root_device)
                    dist.broadcast(tensor.data, 0)
            self._cut(module)
        self.model_to_device()  # metrics too; and the end of an earlier call has moved everything to the host
        self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
        scaler = self._scaler()
        if scaler is not None:
            scaler.unscale_ = agreeing_on_overflow(scaler, self.root_device)  # type: ignore[assignment, method-assign]
        if trainer.state.fn == TrainerFn.FITTING:
            self._communicator = self._make_communicator(module) if self.mesh.data_parallel_size > 1 else None
            self.setup_optimizers(trainer)
            check_optimizers(self.optimizers, self._scaler())
        self.setup_precision_plugin()
        self._postpone_requeue(trainer)

    def _decide(self, module: pl.LightningModule) -> tuple[Blocks, Cuts]:
        """Where to cut, and which ranks are a pipeline."""
        schedule, device = self._schedule, self.root_device
        blocks = blocks_for(module, self._pipeline_layers, schedule)
        cuts, self._costs = choose_cuts(
            module, blocks, schedule.stages, self._stage_cut, self._num_microbatches, device
        )
        fits = module.trainer.state.fn == TrainerFn.FITTING
        if fits and self._pipeline_placement == "auto" and not self._is_placed:
            self._pipelines_across_nodes = belongs_across_nodes(
                module,
                blocks,
                cuts,
                schedule,
                self.mesh,
                compressor=self._compressor,
                hierarchical=self._hierarchical,
                device=device,
            )
        self._is_placed = True
        return blocks, cuts

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """What a sampler is keyed on. Whoever has asked builds on it, so it must not change any more."""
        self._is_placed = True
        return super().distributed_sampler_kwargs

    def _cut(self, module: pl.LightningModule) -> None:
        """Decide which rank holds what."""
        blocks, cuts = self._decide(module)
        schedule, mesh = self._schedule, self.mesh
        if self.is_global_zero:
            Console().print(cut_table(module, blocks, schedule, cuts, self._costs))
        self._settled = False
        self._blocks = blocks
        self._staged = StagedModule(module, blocks, cuts, owners_before_use(module, blocks, cuts))
        replicas = [mesh.ranks_of_replica(replica) for replica in range(mesh.data_parallel_size)]
        _, pipeline_group = own_group(replicas, mesh.rank, None, self._timeout)
        assert pipeline_group is not None
        self._pipeline_group = GroupReference(pipeline_group)
        _, replica_group = own_group(mesh.groups_of_replicas(), mesh.rank, None, self._timeout)
        self._replica_group = None if replica_group is None else GroupReference(replica_group)
        self._pipeline = Pipeline(self._staged, schedule, pipeline_group, self.root_device)
        if self._activation_checkpointing:
            for stage in self._pipeline.stages:
                for index in cuts.blocks_of(stage):
                    checkpoint_wrapper(blocks.modules[index], self._activation_checkpointing == "offload")
        last = schedule.rank_of(schedule.stages - 1)
        self._metrics = SharedMetrics(module, last, self._pipeline_group, self._replica_group, self.root_device)
        self._steps = Steps(
            module,
            blocks,
            self._pipeline,
            self._metrics,
            self._pipeline_group,
            self.root_device,
            self._num_microbatches,
            self._microbatch_weight,
        )
        self._seed = self._shared_seed()
        self._held_back: list[Tensor | None] | None = None
        self._synchronizes = True

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Have the workers of all ranks of a pipeline draw alike."""
        if os.environ.get("PL_SEED_WORKERS") == "1" and getattr(dataloader, "worker_init_fn", self) is None:
            rank = self.mesh.data_parallel_rank
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=rank)  # type: ignore[attr-defined]
        return dataloader

    # ---- steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward and backward passes of all micro-batches. :meth:`backward` hands the gradients over."""
        assert self.lightning_module is not None and self._staged is not None
        trainer = self.lightning_module.trainer
        seed = self._seed_of(TRAINING, trainer.fit_loop.epoch_loop.total_batch_idx)
        batch = self._steps.prepare(TRAINING, args, self.precision_plugin.train_step_context, seed)
        if not self._settled:
            self._settle()
        # Lightning resets gradients after this method, and adds to those of earlier batches in backward. What it is
        # about to reset would only take memory.
        parameters = list(self._own_parameters())
        before = [None if self._resets_gradients() else parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        stopwatch = Stopwatch(self.root_device) if self._measures else None
        scale = self._loss_scale() / trainer.accumulate_grad_batches
        if self._keeps_batches:
            is_first = trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0
            self._kept = [*(() if is_first else self._kept), (batch, scale)]
        result = self._steps.train(batch, scale, stopwatch)
        if stopwatch is not None:
            self._measured, self._measures = stopwatch.passes(), False
        self._trained += 1
        if self._trained == _MEASURED_STEP - 1:
            self.measure_pipeline()
        elif self._trained == _MEASURED_STEP:
            self._suggest_cuts()
        self._held_back = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        return result

    def _resets_gradients(self) -> bool:
        """Whether Lightning will now reset gradients, and nobody looks at them before."""
        module = self.lightning_module
        assert module is not None
        trainer = module.trainer
        watchers: list[Any] = [module, *trainer.callbacks]  # type: ignore[attr-defined]
        return (
            trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0
            and not is_overridden("optimizer_zero_grad", module)
            and not any(is_overridden("on_before_zero_grad", watcher) for watcher in watchers)
        )

    def _suggest_cuts(self) -> None:
        """Say so if the stages have unevenly much to do."""
        assert self._staged is not None
        ranks, cuts = self.pipeline_timeline(), self._staged.cuts
        seconds = [0.0] * cuts.stages
        for one in (one for passes in ranks for one in passes):
            if one.kind in COMPUTE:
                seconds[one.stage] += one.end - one.start
        better = suggested_cuts(self._costs or parameter_costs(self._staged.root, self._blocks), cuts, seconds)
        if better is not None:
            shares = ", ".join(f"{took / sum(seconds):.0%}" for took in seconds)
            rank_zero_warn(
                f"the stages of the pipeline have unevenly much to do ({shares} of the time): "
                f"stage_cut={list(better.bounds[1:-1])} should be faster"
            )

    def keep_batches(self) -> None:
        """From now on, keep the batches of each optimizer step for :meth:`replay_training_step`."""
        self._keeps_batches = True

    def replay_training_step(self, observer: PassObserver, batch: int = -1) -> dict[str, Tensor]:
        """Run a training step once more, for whoever looks for what has gone wrong in it. Collective in the pipeline.

        Weights must be as they were, so this is for the time between the backward pass and the optimizer's step.
        Nothing is logged; gradients, buffers, metrics and random states stay as they are.

        Args:
            observer: Is told of all passes.
            batch: Which one, of those since gradients were reset; by default the last.

        Returns:
            The gradients of this rank's layers, by name: of this batch alone, not averaged over replicas, and without
            what other stages add to those that they share.

        Raises:
            RuntimeError: If there is no such batch: :meth:`keep_batches` comes first.
        """
        if not -len(self._kept) <= batch < len(self._kept):
            raise RuntimeError(
                f"batch {batch} cannot be replayed, {len(self._kept)} are kept: call keep_batches() before training"
            )
        assert self._staged is not None
        held = {name: self._staged.parameter(name) for name in self._staged.owners}
        parameters = {name: parameter for name, parameter in held.items() if parameter is not None}
        before = {name: parameter.grad for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = None
        try:
            self._steps.replay(*self._kept[batch], observer)
            gradients = {name: parameter.grad for name, parameter in parameters.items()}
        finally:
            for name, parameter in parameters.items():
                parameter.grad = before[name]
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def measure_pipeline(self) -> None:
        """Take the time of all passes in the next training step."""
        self._measures = True

    def pipeline_timeline(self) -> list[list[Pass]]:
        """What each rank of this pipeline has done in the step that was measured last. Collective.

        On several machines it should be called soon, since their clocks drift apart.
        """
        return gather_passes(self._measured, self._pipeline_group(), self.root_device)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward passes. The last stage alone has the result."""
        self._save_if_asked()
        return self._evaluate("validation_step", args, self.precision_plugin.val_step_context)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward passes. The last stage alone has the result."""
        return self._evaluate("test_step", args, self.precision_plugin.test_step_context)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward passes. All ranks of the pipeline get the result."""
        result = self._evaluate("predict_step", args, self.precision_plugin.predict_step_context, logs=False)
        return broadcast_plain(result, self._metrics.source, self._pipeline_group(), self.root_device)

    def _evaluate(
        self,
        hook: str,
        args: tuple[Any, ...],
        context: Callable[[], AbstractContextManager[Any]],
        *,
        logs: bool = True,
    ) -> Any:
        self._evaluated += 1
        batch = self._steps.prepare(hook, args, context, self._seed_of(hook, self._evaluated))
        return self._steps.evaluate(batch, logs=logs)

    def _seed_of(self, hook: str, number: int) -> int:
        return seed_from(self._seed, self.mesh.data_parallel_rank, hook, number)

    @override
    def on_train_start(self) -> None:
        """Begin anew."""
        self._steps.forget_training()
        self._kept = ()

    def _settle(self) -> None:
        """Now that a training step is known: keep only what the stages of this rank use."""
        assert self._staged is not None
        staged = self._staged
        owners = find_owners(staged.root, self._blocks, staged.cuts, self._steps.recordings.values())
        released = self._pipeline.settle(owners)
        for optimizer in self.optimizers:
            if isinstance(optimizer, ShardedOptimizer):
                optimizer.release(released)
                continue
            for group in optimizer.param_groups:
                group["params"] = [released.get(parameter, parameter) for parameter in group["params"]]
            for parameter in released:
                optimizer.state.pop(parameter, None)
        self._settled = True

    # ---- gradients

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Hand over the gradients of the step, and average them over the replicas."""
        assert self.lightning_module is not None and self._held_back is not None
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        for parameter, gradient in zip(self._own_parameters(), self._held_back, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._held_back = None
        if self._synchronizes:
            self._pipeline.gather_shared_gradients()
            self._average_over_replicas()
            self._pipeline.spread_shared_gradients()
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    def _average_over_replicas(self) -> None:
        """Exchange what this rank counts: of what stages share, the first has the sum."""
        communicator = self._communicator
        if communicator is None:
            return
        assert self._replica_group is not None
        counted = self._pipeline.counted_here()
        parameters = [parameter for parameter in self._own_parameters() if id(parameter) in counted]
        # A parameter that no replica has used must stay without gradient, or the optimizer would move it.
        used = torch.tensor([parameter.grad is not None for parameter in parameters], device=self.root_device).int()
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self._replica_group())
        parameters = [parameter for parameter, is_used in zip(parameters, used.tolist(), strict=True) if is_used]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        communicator.average(parameters, self._bucket_bytes)
        if not communicator.finite:
            self._skip_step(self._own_parameters())

    @override
    def _replicas(self) -> tuple[dist.ProcessGroup | None, set[int]]:
        group = None if self._replica_group is None else self._replica_group()
        return group, {id(parameter) for parameter in self._own_parameters()}

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """In here, gradients are only gathered."""
        self._synchronizes = False
        try:
            yield
        finally:
            self._synchronizes = True

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        counted = self._pipeline.counted_here()
        clip_by_total_norm(optimizer, clip_val, counted, self._pipeline_group(), self.root_device)

    def _own_parameters(self) -> Iterator[nn.Parameter]:
        assert self._staged is not None
        for name in self._staged.owners:
            parameter = self._staged.parameter(name)
            if parameter is not None:
                yield parameter

    # ---- collective decisions

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the replicas: the ranks of a pipeline have the same values."""
        if group is None:
            if self._replica_group is None:
                return tensor
            group = self._replica_group()
        return super().reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather over all ranks; for ``LightningModule.all_gather``, which names the group, over the replicas."""
        if group is not dist.group.WORLD or self._staged is None:
            return super().all_gather(tensor, group, sync_grads)
        if self._replica_group is None:
            return tensor.unsqueeze(0)
        return super().all_gather(tensor, self._replica_group(), sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Decide over all ranks."""
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    # ---- failures

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Say what it means that a connection has ended."""
        super().on_exception(exception)
        stages = ", ".join(map(str, self._schedule.stages_of(self.mesh.pipeline_rank)))
        _augment_message(
            exception,
            pattern=".*(Connection (closed|reset) by peer|Broken pipe|Timed out waiting).*",
            new_message=(
                f"rank {self.global_rank} (stage {stages} of the pipeline) has lost another rank, which must have "
                f"failed: what that one has printed says why ({exception})"
            ),
        )

    # ---- checkpoints

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """Each rank loads what it holds, which is known after set-up."""
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state on rank 0, as a plain Trainer would save it; nothing elsewhere. Collective."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        return self._gather({name: value for name, value in state.items() if self._keeps(name)}, state)

    def _keeps(self, name: str) -> bool:
        """Whether what is saved under a name is what this rank has: buffers change where they are used."""
        assert self._staged is not None
        stage = self._staged.keeper(name)
        if stage is not None:
            return self._schedule.rank_of(stage) == self.mesh.pipeline_rank
        of_metric = any(name.startswith(f"{path}.") for path in self._metrics.paths.values())
        return self.mesh.pipeline_rank == (self._metrics.source if of_metric else 0)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, as a plain Trainer would save it. Collective."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        every = range(sum(len(group["params"]) for group in state["param_groups"]))
        return {"state": self._gather(state["state"], every), "param_groups": state["param_groups"]}

    def _gather(self, own: dict[Any, Any], order: Iterable[Any]) -> dict[Any, Any]:
        self._refuse_to_gather_after_failure()
        if self.mesh.data_parallel_rank:
            return {}
        return gather_plain(own, order, self._pipeline_group(), self.root_device)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint."""
        # Lightning forgets to say when it loads after set-up.
        safe = True if weights_only is None else weights_only
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=safe)
        self._restore_memory()
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load what this rank holds."""
        assert self.lightning_module is not None
        load_own(self.lightning_module, checkpoint["state_dict"], strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load what this rank holds."""
        _, own = self._replicas()
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if isinstance(optimizer, ShardedOptimizer):
                states.append(state)
                continue
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            kept = {index: one for index, one in state["state"].items() if id(parameters[index]) in own}
            states.append({**state, "state": kept})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    @override
    def teardown(self) -> None:
        """Release the devices. The module stays cut: it can be validated and tested, and saved."""
        self._kept, self._keeps_batches = (), False
        vars(self.precision_plugin).pop("clip_grad_by_norm", None)
        scaler = self._scaler()
        if scaler is not None:
            vars(scaler).pop("unscale_", None)
        super().teardown()
