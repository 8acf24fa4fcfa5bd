"""The strategy: the life cycle of a job. What it is made of lies beside it."""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import _augment_message
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from danon_lightning.optim import OneBitAdam
from danon_lightning.strategies.communication import (
    AutoCompression,
    Compressor,
    ErrorFeedback,
    GradientCommunicator,
    LinearCompressor,
    available_compressors,
    get_compressor,
)
from danon_lightning.strategies.communication.adaptive.settings import check_auto, resolve_auto
from danon_lightning.strategies.communication.error_feedback import resolve_error_feedback
from danon_lightning.strategies.communication.layout import check_hierarchical, uses_two_levels
from danon_lightning.strategies.mesh import Mesh
from danon_lightning.strategies.optimizer_checks import allowed_compressions, check_optimizer
from danon_lightning.strategies.overlap import ForwardOverlap, Synchronization, check_overlap, check_trainer
from danon_lightning.strategies.pipeline.arguments import check_arguments
from danon_lightning.strategies.pipeline.initialization import reproducible
from danon_lightning.strategies.pipeline.schedules import resolve_schedule
from danon_lightning.strategies.preemption import PostponedRequeue
from danon_lightning.strategies.replicated import ReplicatedStrategy
from danon_lightning.strategies.sync import (
    AsyncSync,
    PeriodicSync,
    check_sync_mode,
    keep_local,
    resolve_sync_mode,
)

_CHECKPOINT_KEY = "danon_gradient_memory"
_SYNC_KEY = "danon_sync"


class DanonHybridStrategy(ReplicatedStrategy):
    """Trains any LightningModule data-parallel, gradients being averaged by a :class:`GradientCommunicator`.

    ``import danon_lightning`` registers it, so that ``Trainer(strategy="danon_hybrid", devices=2)`` is all there is to
    write, or ``strategy="danon_hybrid_int8"`` (and so on) for a compression. Use the class itself to set arguments:
    ``Trainer(strategy=DanonHybridStrategy(compression="int8"))``.

    Args:
        compression: None for dense gradients; a name of :func:`available_compressors` such as "int8", or a compressor,
            to send coded gradients over the slow links: between nodes where the exchange is hierarchical, else between
            all ranks. "auto", or an :class:`AutoCompression`, to choose between nodes by measurement, again and again,
            among what the optimizer tolerates.
        error_feedback: Whether what compression leaves out of a step is added to the next one: "auto" for where the
            compressor needs it; or an :class:`ErrorFeedback` with settings of its own (momentum correction, say).
        residual_checkpoint: What checkpoints keep of it: "mean" for one model copy, valid for any number of ranks;
            "per_rank" for everything, so that a run on the same number of nodes and ranks resumes to the bit.
        hierarchical: True to sum inside each node first and exchange only the sums between nodes, False to treat all
            ranks alike, "auto" for True wherever there are several nodes with several ranks each.
        find_unused_parameters: Set it if some parameters take no part in a training step.
        static_graph: Set it if the graph is the same at every step.
        sync_mode: "full" to average gradients in each step, before the optimizer moves; "async" to do so while the next
            step computes, and move one step late; "periodic" to let each replica train by itself for some steps, and
            average what they have found; or :class:`AsyncSync` or :class:`PeriodicSync` with settings of its own.
        optimizer_sharding: True to share the optimizer's state out among replicas, each of which moves its part of the
            weights and sends it to the others. Weights are the same to the bit.
        overlap_forward: True to let the exchange go on during the next forward pass, which waits for each weight where
            it is first used, and to send first what is needed first. Weights are the same to the bit.
        bucket_cap_mb: Size of the gradient buckets in MiB.
        pipeline_parallel_size: Number of ranks that share a replica of the model, each with some of its layers; 1 for
            a whole model on every rank.
        num_microbatches: Into how many parts a batch is cut, which pass through the pipeline one after another. More
            leave ranks less idle, but each is smaller. "auto" for four times as many as stages; fewer, where a batch
            has not so many samples.
        schedule: In which order they pass: "gpipe", "1f1b", "interleaved_1f1b", "looped_bfs",
            "interleaved_zero_bubble" or "zbv".
        stages_per_rank: Number of stages of each rank, for schedules that take several; None for two of them.
        pipeline_layers: Dotted name of the ``nn.Sequential`` or ``nn.ModuleList`` whose layers are shared out, such as
            "model.layers"; None to find it.
        stage_cut: "parameters" for stages with about as many parameters each; "measured" for stages that take about as
            long, by some runs of the first micro-batch at set-up; or the first layer of each stage but the first:
            ``[3, 7]`` for three stages with layers 0 to 2, 3 to 6, and 7 onwards.
        pipeline_placement: Whether the ranks of a pipeline are on one node, as far as they fit there, or on several
            ones, and the replicas of a stage on one. "auto" for what sends fewer bytes from node to node, as far as the
            first batch tells.
        microbatch_weight: For losses that take a mean in code of their own, over something else than samples: gives,
            for a micro-batch, by how much that mean is divided, such as the number of labelled tokens. Loss and logged
            means of micro-batches are weighted with it. Not needed for losses of ``torch.nn.functional``.
        activation_checkpointing: True to keep only what enters each layer, and run it once more in the backward pass;
            "offload" to keep that in the memory of the host. Not with zero-bubble schedules.
        accelerator: As for every strategy of Lightning; this and the following are usually left to the Trainer.
        parallel_devices: Devices of this node.
        cluster_environment: How ranks find one another.
        checkpoint_io: How checkpoints are written.
        precision_plugin: Numerical precision.
        process_group_backend: Backend of the default process group; None for nccl on CUDA and gloo on the CPU.
            Gradients have groups of their own, always nccl on CUDA and gloo on the CPU.
        timeout: How long a collective operation may take before the job is given up.

    Raises:
        ValueError: For an unknown compression or value of ``hierarchical``, naming the valid ones; at set-up, if the
            ranks cannot be laid out evenly over the nodes.
    """

    strategy_name = "danon_hybrid"
    _requeue: PostponedRequeue | None = None

    def __new__(cls, *args: Any, pipeline_parallel_size: int = 1, **kwargs: Any) -> "DanonHybridStrategy":
        """Make the strategy with or without pipeline stages: they share little but their arguments."""
        if cls is DanonHybridStrategy and pipeline_parallel_size != 1:
            from danon_lightning.strategies.pipelined import PipelinedStrategy

            cls = PipelinedStrategy
        return super().__new__(cls)

    def __init__(
        self,
        *,
        compression: str | Compressor | LinearCompressor | AutoCompression | None = None,
        error_feedback: bool | Literal["auto"] | ErrorFeedback = "auto",
        residual_checkpoint: Literal["mean", "per_rank"] = "mean",
        hierarchical: bool | Literal["auto"] = "auto",
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        sync_mode: Literal["full", "async", "periodic"] | AsyncSync | PeriodicSync = "full",
        optimizer_sharding: bool = False,
        overlap_forward: bool = False,
        bucket_cap_mb: float = 25,
        pipeline_parallel_size: int = 1,
        num_microbatches: int | Literal["auto"] = "auto",
        schedule: str = "1f1b",
        stages_per_rank: int | None = None,
        pipeline_layers: str | None = None,
        stage_cut: Literal["parameters", "measured"] | Sequence[int] = "parameters",
        pipeline_placement: Literal["auto", "inside_nodes", "across_nodes"] = "auto",
        microbatch_weight: Callable[[Any], float | Tensor] | None = None,
        activation_checkpointing: bool | Literal["offload"] = False,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        """See the class."""
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            bucket_cap_mb=bucket_cap_mb,
            # Gradients live in the buckets they are sent from: one copy less, of time and of memory.
            gradient_as_bucket_view=True,
        )
        check_hierarchical(hierarchical)
        if residual_checkpoint not in ("mean", "per_rank"):
            raise ValueError(f"residual_checkpoint={residual_checkpoint!r} must be 'mean' or 'per_rank'")
        self._sync_mode = resolve_sync_mode(sync_mode)
        self._auto = resolve_auto(compression)
        is_auto = isinstance(compression, AutoCompression) or self._auto is not None
        self._compressor = None if is_auto else get_compressor(compression)  # type: ignore[arg-type]
        self._announced = 0
        if self._auto is not None:
            _check_auto(error_feedback, self._sync_mode, pipeline_parallel_size)
        self._error_feedback = resolve_error_feedback(error_feedback, self._compressor)
        self._residual_checkpoint = residual_checkpoint
        self._saved_memory: dict[str, Any] | None = None
        self._hierarchical, self._optimizer_sharding = hierarchical, optimizer_sharding
        check_sync_mode(self._sync_mode, self._error_feedback, optimizer_sharding, find_unused_parameters)
        if isinstance(self._sync_mode, PeriodicSync):
            self._ddp_kwargs.setdefault("broadcast_buffers", False)
        self._overlap_forward = overlap_forward
        if overlap_forward:
            check_overlap(
                compressed=is_auto or self._compressor is not None,
                sync_mode=sync_mode if isinstance(sync_mode, str) else type(sync_mode).__name__,
                optimizer_sharding=optimizer_sharding,
                find_unused_parameters=find_unused_parameters,
                static_graph=static_graph,
                pipeline_parallel_size=pipeline_parallel_size,
            )
        self._bucket_bytes = round(bucket_cap_mb * (1 << 20))
        if pipeline_parallel_size < 1:
            raise ValueError(f"pipeline_parallel_size={pipeline_parallel_size} must be at least 1")
        self._pipeline_parallel_size = pipeline_parallel_size
        self._schedule = resolve_schedule(schedule, pipeline_parallel_size, stages_per_rank)
        self._pipeline_layers, self._stage_cut = pipeline_layers, stage_cut
        self._pipeline_placement = pipeline_placement
        self._pipelines_across_nodes = pipeline_placement == "across_nodes"
        self._microbatch_weight, self._activation_checkpointing = microbatch_weight, activation_checkpointing
        self._num_microbatches = 4 * self._schedule.stages if num_microbatches == "auto" else num_microbatches
        check_arguments(
            schedule=self._schedule,
            pipeline_parallel_size=pipeline_parallel_size,
            num_microbatches=self._num_microbatches,
            stage_cut=stage_cut,
            pipeline_placement=pipeline_placement,
            activation_checkpointing=activation_checkpointing,
            only_for_stages={
                "pipeline_layers": pipeline_layers is not None,
                "microbatch_weight": microbatch_weight is not None,
            },
        )

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Make the strategy known by its name, and with each compression as ``danon_hybrid_<compression>``."""
        strategy_registry.register(
            cls.strategy_name, cls, description="Data parallel with hierarchical, compressible gradient exchange"
        )
        strategy_registry.register(
            f"{cls.strategy_name}_auto", cls, description="danon_hybrid, compressing if it pays", compression="auto"
        )
        for name in available_compressors():
            strategy_registry.register(
                f"{cls.strategy_name}_{name}", cls, description=f"danon_hybrid with {name} gradients", compression=name
            )

    @property
    def mesh(self) -> Mesh:
        """The layout of the ranks.

        Raises:
            ValueError: If the ranks cannot be laid out evenly over the nodes.
        """
        return Mesh.from_world(
            self.world_size,
            self.num_nodes,
            self.global_rank,
            self._pipeline_parallel_size,
            self._pipelines_across_nodes,
        )

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """What a sampler is keyed on: the number of replicas, and which one this rank belongs to."""
        return {"num_replicas": self.mesh.data_parallel_size, "rank": self.mesh.data_parallel_rank}

    def describe(self) -> dict[str, str]:
        """Short facts for a table at the start of a run."""
        mesh = self.mesh
        replicas = "1 replica" if mesh.data_parallel_size == 1 else f"{mesh.data_parallel_size} replicas"
        facts = {"mesh": f"{mesh}, {replicas}"}
        if mesh.pipeline_parallel_size > 1:
            stages = f"{mesh.pipeline_parallel_size} ranks × {self._schedule.stages_per_rank} stages"
            facts["pipeline"] = f"{stages}, {self._num_microbatches} micro-batches in {self._schedule.name} order"
        if mesh.data_parallel_size > 1:
            sent = "dense" if self._compressor is None else self._compressor.name
            sent = sent if self._auto is None else "compressed if it pays"
            two_levels = uses_two_levels(mesh, self._hierarchical)
            facts["gradients"] = f"dense inside a node, {sent} between nodes" if two_levels else f"{sent}, all to all"
            if self._overlap_forward:
                facts["gradients"] += ", beside the next forward pass"
        return facts

    def communication_stats(self) -> dict[str, Any]:
        """What this rank has sent since the start of ``fit``, and how long it took.

        Returns:
            The fields of :class:`~danon_lightning.strategies.communication.stats.CommunicationStats`: ``steps``,
            ``skipped_steps``, ``intra_node_bytes``, ``inter_node_bytes``, ``dense_bytes``, ``compression_ratio``,
            ``exposed_seconds``, ``hidden_seconds`` and ``residual_norm``. Empty before ``fit``, and on a single rank.
        """
        return self._communicator.stats() if self._communicator else {}

    def compression_decisions(self) -> list[tuple[int, str, str]]:
        """What ``compression="auto"`` has decided, the last ones: after how many exchanges, what, and why.

        What is a compressor's name, or "off" for dense gradients. Alike on all ranks; empty without "auto".
        """
        return self._communicator.decisions() if self._communicator is not None else []

    @property
    def gradients_agree(self) -> bool:
        """Whether replicas have the same gradients when the optimizer moves: those of the batches of this very step."""
        return self._sync_mode is None

    @property
    def gradients_finite(self) -> bool | None:
        """Whether all gradients of the last exchange were finite, on all ranks. If not, all of them skip the step.

        None where nobody has looked: without compression, and before the first exchange.
        """
        communicator = self._communicator
        if communicator is None or not communicator.checks_finite or not communicator.steps:
            return None
        return communicator.finite

    @override
    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Give what ``configure_model`` makes the same weights on every layout of the ranks."""
        with reproducible(self._shared_seed(), self.root_device):
            yield

    def _shared_seed(self) -> int:
        """The same on all ranks."""
        seed = torch.tensor(int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed() % (1 << 62)))
        if dist.is_initialized():
            seed = seed.to(self.root_device)
            dist.broadcast(seed, 0)
        return int(seed)

    @override
    def setup_environment(self) -> None:
        """Join the other ranks, once the layout is known to be sound."""
        uses_two_levels(self.mesh, self._hierarchical)
        super().setup_environment()

    @override
    def setup_distributed(self) -> None:
        """Join the default process group, and leave it when the process ends."""
        joins = not dist.is_initialized()
        super().setup_distributed()
        if joins:
            # Lightning leaves nccl groups only, but gloo's threads abort a process that ends with them running.
            atexit.register(_leave_process_group)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Get ready for a call of the Trainer."""
        super().setup(trainer)
        if self._overlap is not None:
            self._synchronization = Synchronization(self._overlap)
            trainer.callbacks.insert(0, self._synchronization)  # type: ignore[attr-defined]
        self._postpone_requeue(trainer)

    def _postpone_requeue(self, trainer: pl.Trainer) -> None:
        is_wanted = trainer.state.fn == TrainerFn.FITTING and PostponedRequeue.is_wanted(trainer)
        self._requeue = PostponedRequeue(trainer, self.root_device) if is_wanted else None

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Write a checkpoint if the job is about to be stopped."""
        self._save_if_asked()

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step, but first write a checkpoint if the job is about to be stopped."""
        self._save_if_asked()
        return super().validation_step(*args, **kwargs)

    def _save_if_asked(self) -> None:
        if self._requeue is not None:
            self._requeue.check()

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Remember that other ranks may be waiting, and say what to do about unused parameters."""
        ReplicatedStrategy._has_failed = True
        _augment_message(
            exception,
            pattern=".*Expected to have finished reduction in the prior iteration.*",
            new_message=(
                "Some parameters took no part in the loss that training_step returned. If that is intended, use "
                "strategy=DanonHybridStrategy(find_unused_parameters=True)."
            ),
        )

    @override
    def _register_ddp_hooks(self) -> None:
        # Lightning would register hooks on CUDA only; ours serves every device.
        mesh = self.mesh
        if mesh.world_size == 1:
            self._restore_memory()
            return
        assert isinstance(self.model, DistributedDataParallel)
        self._pl_static_graph_delay_done = False  # Lightning sets it once for all fits, but each has a new DDP
        for name, submodule in self.model.module.named_modules():
            if isinstance(submodule, (nn.Embedding, nn.EmbeddingBag)) and submodule.sparse:
                raise ValueError(
                    f"{name} ({type(submodule).__name__}) has sparse=True, but sparse gradients cannot be exchanged: "
                    "set sparse=False, or train with strategy='ddp'"
                )
        self._communicator = self._make_communicator(self.model)
        self._restore_memory()
        if self._overlap_forward:
            self._overlap = ForwardOverlap(self._communicator, self.model.module)
            self.model.register_comm_hook(self._overlap, self._overlap.hook)
            return
        exchanges = self._sync_mode is None
        self.model.register_comm_hook(self._communicator, self._communicator.hook if exchanges else keep_local)

    def _make_communicator(self, module: nn.Module) -> GradientCommunicator:
        self._announced = 0
        return GradientCommunicator(
            module,
            self.mesh,
            compression=self._auto or self._compressor,
            error_feedback=self._error_feedback or ("auto" if self._compressor is None else False),
            hierarchical=self._hierarchical,
            device=self.root_device,
            timeout=self._timeout,
            # What periods average is no gradient of a scaled loss.
            loss_scale=None if isinstance(self._sync_mode, PeriodicSync) else self._loss_scale,
        )

    def _restore_memory(self) -> None:
        """Give the communicator what a checkpoint has kept for it."""
        if self._saved_memory is None:
            return
        if self._communicator is None:
            rank_zero_warn("there is no exchange of gradients: what earlier steps have left out is lost")
        else:
            exact = self._communicator.load_state_dict(self._saved_memory)
            self._announced = max((step for step, _, _ in self.compression_decisions()), default=0)
            if not exact and self._residual_checkpoint == "per_rank":
                rank_zero_warn(
                    "the exchange is laid out otherwise than before: the run goes on with all residuals, but not to "
                    "the bit"
                )
        self._saved_memory = None

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Create the optimizers, and see whether the compression goes with them."""
        super().setup_optimizers(trainer)
        if isinstance(self._sync_mode, PeriodicSync) and len(self.optimizers) > 1:
            raise ValueError(f"sync_mode='periodic' takes one optimizer, there are {len(self.optimizers)}")
        if self._overlap_forward:
            check_trainer(trainer, self.optimizers, scales_loss=self._scaler() is not None)
        if self._communicator is not None and self._compressor is not None:
            self._check_optimizers(self._communicator, self._compressor, clips=bool(trainer.gradient_clip_val))
        if self._communicator is not None and self._auto is not None:
            clips = bool(trainer.gradient_clip_val)
            self._communicator.allow(allowed_compressions(self._auto, self.optimizers, clips=clips))
        if self._optimizer_sharding:
            self._shard_optimizers()

    def _check_optimizers(
        self, communicator: GradientCommunicator, compressor: Compressor | LinearCompressor, *, clips: bool
    ) -> None:
        for optimizer in self.optimizers:
            check_optimizer(optimizer, compressor, self._error_feedback, clips=clips)
        with_momentum = [optimizer for optimizer in self.optimizers if isinstance(optimizer, OneBitAdam)]
        if with_momentum and self._sync_mode is not None:
            raise ValueError("OneBitAdam can be used with a compression only with sync_mode='full'")
        if with_momentum and len(self.optimizers) > 1:
            raise ValueError("OneBitAdam can be used with a compression only as the only optimizer")
        for optimizer in with_momentum:
            communicator.exchange_momentum_of(optimizer)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Propagate gradients; they are averaged over the replicas on the way.

        With a compression, gradients that are not finite are dropped on all ranks, and the optimizer leaves the weights
        as they are: what is kept for later steps does not contain them either. (A gradient scaler does so by itself.)

        Raises:
            RuntimeError: If the exchange has failed, saying where to look for the cause.
        """
        communicator = self._communicator
        steps = communicator.steps if communicator is not None else 0
        late = isinstance(self._sync_mode, AsyncSync)
        try:
            loss = super().backward(*args, **kwargs)
        except RuntimeError:
            if communicator is not None and communicator.error is not None:
                raise communicator.error from communicator.error.__cause__
            raise
        assert self.model is not None
        if late and getattr(self.model, "require_backward_grad_sync", False):
            self._exchange_late([parameter for parameter in self.model.parameters() if parameter.grad is not None])
        elif not late and communicator is not None and communicator.steps > steps and not communicator.finite:
            self._skip_step(self.model.parameters())
        self._announce_decisions()
        return loss

    def _announce_decisions(self) -> None:
        decisions = self.compression_decisions()
        for step, _, sentence in decisions:
            if step > self._announced:
                rank_zero_info(f"step {step}: {sentence}")
                self._announced = step

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, with what compression has left out so far. Every rank must call it."""
        communicator = self._communicator
        full = "optimizer_states" in checkpoint  # not one of weights only
        if full and (self._stale is not None or self._local is not None):
            self._refuse_to_gather_after_failure()
            # First: it waits for what is under way, which changes what compression has left out.
            checkpoint[_SYNC_KEY] = self._sync_state()
        if communicator is not None and (self._compressor is not None or self._auto is not None) and full:
            if self._others_may_be_gone():
                rank_zero_warn("the checkpoint has no residuals: after an error other ranks cannot be asked for theirs")
            else:
                state = communicator.state_dict(per_rank=self._residual_checkpoint == "per_rank")
                if state is not None:
                    checkpoint[_CHECKPOINT_KEY] = state
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        if self.lightning_module is not None and self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            self._saved_memory = checkpoint.get(_CHECKPOINT_KEY)
            self._saved_sync = checkpoint.get(_SYNC_KEY)
        return checkpoint

    @override
    def teardown(self) -> None:
        """Stop the exchange and unwrap the model."""
        self._end_overlap()
        if self._communicator is not None:
            self._communicator.close(failed=self._has_failed)
        if self._requeue is not None:
            self._requeue.end()
        self._stale = self._local = None
        super().teardown()


def _check_auto(error_feedback: object, sync_mode: object, stages: int) -> None:
    """Refuse what does not go with "auto".

    Raises:
        ValueError: Saying which argument to change.
    """
    check_auto(error_feedback, stages)
    if sync_mode is not None:
        raise ValueError(
            "compression='auto' needs sync_mode='full': it weighs what the exchange adds to each step. Name a "
            "compression, such as 'int8'"
        )


def _leave_process_group() -> None:
    # After an error there may be operations that other ranks never complete, and leaving would wait for them.
    if dist.is_initialized() and not ReplicatedStrategy._has_failed:
        dist.destroy_process_group()
