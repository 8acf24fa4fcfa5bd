"""What keeps the replicas of a model together, and what each of them has of its own."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from danon_lightning.strategies.communication import GradientCommunicator
from danon_lightning.strategies.mesh import Mesh
from danon_lightning.strategies.optimizer_sharding import ShardedOptimizer, sharded
from danon_lightning.strategies.overlap import ForwardOverlap, Synchronization
from danon_lightning.strategies.pipeline.checkpoint import gather_plain
from danon_lightning.strategies.sync import AsyncSync, LocalSteps, PeriodicSync, StaleGradients
from danon_lightning.strategies.sync.periodic import all_finite


class ReplicatedStrategy(DDPStrategy):
    """Synchronises replicas late or in periods, if that is wanted, and shares optimizers out among them."""

    _has_failed: ClassVar[bool] = False  # in this process, whichever Trainer it was
    _sync_mode: AsyncSync | PeriodicSync | None
    _residual_checkpoint: Literal["mean", "per_rank"]
    _bucket_bytes: int
    _communicator: GradientCommunicator | None = None
    _stale: StaleGradients | None = None
    _local: LocalSteps | None = None
    _overlap: ForwardOverlap | None = None
    _synchronization: Synchronization | None = None
    _saved_sync: dict[str, Any] | None = None

    @property
    def mesh(self) -> Mesh:
        """The layout of the ranks."""
        raise NotImplementedError

    def _shard_optimizers(self) -> None:
        group, held = self._replicas()
        if group is not None:
            schedulers = [config.scheduler for config in self.lr_scheduler_configs]
            self.optimizers = sharded(self.optimizers, schedulers, group, held)

    @override
    def on_train_start(self) -> None:
        """Begin to synchronise in other ways than at each step, or go on with it."""
        self._stale = self._local = None
        if self._overlap is not None:
            self._overlap.attach()
        group, _ = self._replicas()
        communicator, module = self._communicator, self.lightning_module
        if communicator is None or group is None or module is None:
            return
        own = {name: parameter for name, parameter in self._held(module) if parameter.requires_grad}
        if isinstance(self._sync_mode, AsyncSync):
            self._stale = StaleGradients(self._sync_mode, communicator, self._bucket_bytes, self._loss_scale)
        elif isinstance(self._sync_mode, PeriodicSync):
            buffers = [buffer for buffer in module.buffers() if type(buffer) is Tensor]
            self._local = LocalSteps(self._sync_mode, own, buffers, self._average_moves, group)
        self._restore_sync(own)

    @override
    def on_train_end(self) -> None:
        """End the last period: all replicas have the same weights then."""
        if self._local is not None:
            self._local.synchronize(self.optimizers[0])
        if self._stale is not None:
            self._stale.wait()

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Run the optimizer; where replicas synchronise in periods, at the end of one do so."""
        with nullcontext() if self._overlap is None else self._overlap.deferred(optimizer):
            output = super().optimizer_step(optimizer, *args, **kwargs)
        if self._local is not None:
            self._local.after_step(optimizer)
        return output

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass, where it may have to wait for the weights of the step before."""
        if self._overlap is None:
            return super().training_step(*args, **kwargs)
        # nccl asks that operations of several groups begin in the same order on all ranks.
        model = self.model
        waits = self.root_device.type == "cuda" and getattr(model, "will_sync_module_buffers", bool)()
        with self._overlap.training_step(waits_first=waits):
            return super().training_step(*args, **kwargs)

    @property
    def waits_in_forward(self) -> bool:
        """Whether what the exchange adds to a step is a part of its forward pass, not of the backward pass."""
        return self._overlap is not None

    def _end_overlap(self) -> None:
        if self._overlap is not None:
            self._overlap.detach()
            assert self.lightning_module is not None
            callbacks = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
            if self._synchronization in callbacks:
                callbacks.remove(self._synchronization)
        self._overlap = self._synchronization = None

    def parameter_staleness(self) -> float:
        """By how many optimizer steps what moves the weights is behind.

        0 where gradients are averaged in each step; 1 with ``sync_mode="async"``; with ``sync_mode="periodic"`` the
        steps since replicas have last heard of one another.
        """
        sync = self._stale or self._local
        return 0.0 if sync is None else sync.staleness

    def _exchange_late(self, parameters: list[nn.Parameter]) -> None:
        """Take the averages of the step before for these gradients, which set out."""
        if self._stale is None or self._stale.replace(parameters):
            return
        if self._stale.skips:
            rank_zero_warn("a gradient of the step before was not finite: all ranks skip this step")
        if self._scaler() is not None:
            for parameter in parameters:  # a scaler skips what is not finite; without any gradient it fails
                parameter.grad = torch.full_like(parameter, torch.nan)

    def _average_moves(self, parameters: list[nn.Parameter]) -> bool:
        """Average ``.grad`` over the replicas, and agree on whether the result is finite."""
        assert self._communicator is not None
        self._communicator.average(parameters, self._bucket_bytes)
        # With a compression the exchange has looked, and may have dropped what was not finite.
        finite = self._communicator.finite and all_finite(parameter.grad for parameter in parameters)
        return self.reduce_boolean_decision(finite)

    def _skip_step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Have the optimizer leave the weights as they are; a gradient scaler does so by itself."""
        if self._scaler() is None:
            for parameter in parameters:
                parameter.grad = None
            rank_zero_warn("a gradient was not finite: all ranks skip this step")

    def _sync_state(self) -> dict[str, Any]:
        """Collective. Of use on rank 0."""
        assert self.lightning_module is not None
        names = {id(parameter): name for name, parameter in self._held(self.lightning_module)}
        if self._stale is not None:
            own: dict[str, Any] = {"mode": "async", **self._stale.state_dict(names)}
        else:
            assert self._local is not None
            own = {"mode": "periodic", "steps": self._local.steps, **self._local.state_dict()}
        state = {key: self._whole(part) if isinstance(part, dict) else part for key, part in own.items()}
        if self._local is not None and self._residual_checkpoint == "per_rank":
            mine = {
                "tensors": {name: tensor.detach() for name, tensor in self._own_tensors(self.lightning_module)},
                "optimizer": self.optimizers[0].state_dict()["state"],
            }
            everybody = dist.group.WORLD
            assert everybody is not None
            ranks = gather_plain({self.global_rank: mine}, range(self.world_size), everybody, self.root_device)
            state |= {"layout": str(self.mesh), "ranks": ranks}
        return state

    def _restore_sync(self, own: dict[str, nn.Parameter]) -> None:
        saved, self._saved_sync = self._saved_sync, None
        if saved is None:
            return
        if self._stale is not None and saved["mode"] == "async":
            self._stale.load_state_dict(saved, own)
        elif self._local is not None and saved["mode"] == "periodic":
            self._local.load_state_dict(saved, saved["steps"])
            if saved.get("layout") == str(self.mesh):
                mine = saved["ranks"][self.global_rank]
                with torch.no_grad():
                    for name, tensor in self._own_tensors(self.lightning_module):
                        tensor.copy_(mine["tensors"][name])
                optimizer = self.optimizers[0]
                optimizer.load_state_dict({**optimizer.state_dict(), "state": mine["optimizer"]})
        elif saved["mode"] == "async":
            rank_zero_warn("sync_mode is no longer 'async': the gradients of the last step before are lost")

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state of the module. Where replicas are in the middle of a period, their mean; collective then."""
        state = super().lightning_module_state_dict()
        return state if self._local is None else self._with_means(state, self._local)

    def _with_means(self, state: dict[str, Any], local: LocalSteps) -> dict[str, Any]:
        assert self.lightning_module is not None
        if not local.steps or self._others_may_be_gone():
            return state
        means = {id(parameter): name for name, parameter in self._held(self.lightning_module)}
        found = local.mean_weights()
        aliases = self.lightning_module.named_parameters(remove_duplicate=False)
        return {**state, **{name: found[means[id(p)]] for name, p in aliases if means.get(id(p)) in found}}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0; elsewhere of sharded optimizers nothing. For these it is collective."""
        if self._overlap is not None:
            self._overlap.finish()
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        if not isinstance(optimizer, ShardedOptimizer):
            return super().optimizer_state(optimizer)
        self._refuse_to_gather_after_failure()
        group, _ = self._replicas()
        assert group is not None
        state = optimizer.state_dict()
        every = range(len(optimizer.indices))
        return {**state, "state": gather_plain(state["state"], every, group, self.root_device)}

    def _others_may_be_gone(self) -> bool:
        """Whether there was an error, after which other ranks cannot be asked for anything."""
        module = self.lightning_module
        return self._has_failed or (module is not None and module.trainer.interrupted)

    def _refuse_to_gather_after_failure(self) -> None:
        if self._others_may_be_gone():
            raise RuntimeError("no checkpoint is written after an error: other ranks cannot be asked for their part")

    def _replicas(self) -> tuple[dist.ProcessGroup | None, set[int]]:
        """The ranks that hold the same as this one, if there are others; and the ``id`` of each parameter it holds."""
        held = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        return dist.group.WORLD if self.world_size > 1 else None, held

    def _held(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of this rank, by name."""
        return module.named_parameters()

    def _own_tensors(self, module: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
        """The same, and the buffers of this rank."""
        assert module is not None
        yield from self._held(module)
        yield from ((name, buffer) for name, buffer in module.named_buffers() if type(buffer) is Tensor)

    def _whole(self, own: dict[str, Any]) -> dict[str, Any]:
        """What the ranks of a replica have by the names of parameters, on rank 0. Collective."""
        return own

    def _scaler(self) -> "torch.amp.GradScaler | None":
        scaler = getattr(self.precision_plugin, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _loss_scale(self) -> float:
        scaler = self._scaler()
        return float(scaler.get_scale()) if scaler is not None else 1.0
