"""The strategy: the life cycle of a job. What it is made of lies beside it."""

import atexit
from datetime import timedelta
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import _augment_message
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from danon_lightning.strategies.communication import BlockCompressor, GradientCommunicator, get_compressor
from danon_lightning.strategies.communication.collectives import check_hierarchical, uses_two_levels
from danon_lightning.strategies.mesh import Mesh


class DanonHybridStrategy(DDPStrategy):
    """Trains any LightningModule data-parallel, gradients being averaged by a :class:`GradientCommunicator`.

    ``import danon_lightning`` registers it, so that ``Trainer(strategy="danon_hybrid", devices=2)`` is all there is to
    write. Use the class itself to set arguments: ``Trainer(strategy=DanonHybridStrategy(compression="int8"))``.

    Args:
        compression: None for dense gradients; "int8", or a compressor, to send coded gradients over the slow links:
            between nodes where the exchange is hierarchical, else between all ranks.
        hierarchical: True to sum inside each node first and exchange only the sums between nodes, False to treat all
            ranks alike, "auto" for True wherever there are several nodes with several ranks each.
        find_unused_parameters: Set it if some parameters take no part in a training step.
        static_graph: Set it if the graph is the same at every step.
        bucket_cap_mb: Size of the gradient buckets in MiB.
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
    _has_failed: ClassVar[bool] = False  # in this process, whichever Trainer it was

    def __init__(
        self,
        *,
        compression: str | BlockCompressor | None = None,
        hierarchical: bool | Literal["auto"] = "auto",
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        bucket_cap_mb: float = 25,
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
        self._compressor = get_compressor(compression)
        self._hierarchical = hierarchical
        self._communicator: GradientCommunicator | None = None

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Make the strategy known by its name."""
        strategy_registry.register(
            cls.strategy_name, cls, description="Data parallel with hierarchical, compressible gradient exchange"
        )

    @property
    def mesh(self) -> Mesh:
        """The layout of the ranks.

        Raises:
            ValueError: If the ranks cannot be laid out evenly over the nodes.
        """
        return Mesh.from_world(self.world_size, self.num_nodes, self.global_rank)

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
        if mesh.world_size > 1:
            sent = "dense" if self._compressor is None else self._compressor.name
            two_levels = uses_two_levels(mesh, self._hierarchical)
            facts["gradients"] = f"dense inside a node, {sent} between nodes" if two_levels else f"{sent}, all to all"
        return facts

    def communication_stats(self) -> dict[str, int]:
        """What this rank has sent since the start of ``fit``; empty before it, and on a single rank.

        Returns:
            ``steps``, ``intra_node_bytes``, ``inter_node_bytes`` and ``dense_bytes`` (the size of the gradients).
        """
        return self._communicator.stats() if self._communicator else {}

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
    def on_exception(self, exception: BaseException) -> None:
        """Remember that other ranks may be waiting, and say what to do about unused parameters."""
        DanonHybridStrategy._has_failed = True
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
            return
        assert isinstance(self.model, DistributedDataParallel)
        self._pl_static_graph_delay_done = False  # Lightning sets it once for all fits, but each has a new DDP
        for name, submodule in self.model.module.named_modules():
            if isinstance(submodule, (nn.Embedding, nn.EmbeddingBag)) and submodule.sparse:
                raise ValueError(
                    f"{name} ({type(submodule).__name__}) has sparse=True, but sparse gradients cannot be exchanged: "
                    "set sparse=False, or train with strategy='ddp'"
                )
        self._communicator = GradientCommunicator(
            mesh,
            compression=self._compressor,
            hierarchical=self._hierarchical,
            device=self.root_device,
            timeout=self._timeout,
        )
        self.model.register_comm_hook(self._communicator, self._communicator.hook)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Propagate gradients; they are averaged over the replicas on the way.

        Raises:
            RuntimeError: If the exchange has failed, saying where to look for the cause.
        """
        try:
            return super().backward(*args, **kwargs)
        except RuntimeError:
            if self._communicator is not None and self._communicator.error is not None:
                raise self._communicator.error from self._communicator.error.__cause__
            raise

    @override
    def teardown(self) -> None:
        """Stop the exchange and unwrap the model."""
        if self._communicator is not None:
            self._communicator.close(failed=self._has_failed)
        super().teardown()


def _leave_process_group() -> None:
    # After an error there may be operations that other ranks never complete, and leaving would wait for them.
    if dist.is_initialized() and not DanonHybridStrategy._has_failed:
        dist.destroy_process_group()
