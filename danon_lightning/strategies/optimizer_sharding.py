"""Optimizers that share their state out among the replicas of a model: stage one of ZeRO."""

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import torch.distributed as dist
from fairscale.optim import OSS
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from danon_lightning.optim import OneBitAdam
from danon_lightning.strategies.process_groups import GroupReference


class ShardedOptimizer(OSS):
    """Stands for an optimizer, of whose state each replica keeps a part (fairscale's OSS; Rajbhandari et al. 2020).

    Each parameter belongs to one replica, which alone has its state, moves it, and sends the others the result. That
    changes no weight by a bit, as long as the optimizer looks at one parameter at a time.

    Learning rates and other options of ``param_groups`` are those of all replicas. Its state dictionary is that of the
    optimizer it stands for, but with what this replica keeps.
    """

    def __init__(self, optimizer: Optimizer, group: dist.ProcessGroup, held: Container[int]) -> None:
        """Take over from an optimizer. Collective.

        Args:
            optimizer: The same on all replicas. Of its state, what belongs to other replicas is left behind.
            group: The replicas.
            held: The ``id`` of each of its parameters that this rank has; others are on other stages.

        Raises:
            ValueError: If the optimizer looks at all parameters at once, or these have several dtypes.
        """
        check_shardable(optimizer)
        self._whole_groups = [list(group["params"]) for group in optimizer.param_groups]
        own = [{**g, "params": [p for p in g["params"] if id(p) in held]} for g in optimizer.param_groups]
        dtypes = {parameter.dtype for one in own for parameter in one["params"]}
        if len(dtypes) > 1:
            names = ", ".join(sorted(str(dtype) for dtype in dtypes))
            raise ValueError(f"optimizer_sharding needs parameters of one dtype, these have several: {names}")
        super().__init__(own, _narrowing(optimizer), group, **optimizer.defaults)
        self._trains = self._trained()

    @property
    def group(self) -> dist.ProcessGroup:
        """The replicas."""
        return self._group()

    @group.setter
    def group(self, group: dist.ProcessGroup) -> None:
        self._group = GroupReference(group)

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """What this replica keeps, by parameters."""
        inner: Optimizer | None = self.__dict__.get("optim")
        return defaultdict(dict) if inner is None else inner.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if "optim" in self.__dict__:
            self.optim.state = state

    @property
    def indices(self) -> dict[int, int]:
        """The number that each parameter has in state dictionaries, by its ``id``."""
        parameters = (parameter for group in self._whole_groups for parameter in group)
        return {id(parameter): index for index, parameter in enumerate(parameters)}

    @override
    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Move what belongs to this replica, and exchange the results. Collective."""
        self._opt_called = True  # schedulers ask
        OSS._sync_param_groups(self.param_groups, self.optim.param_groups)
        loss = self.optim.step(**kwargs) if closure is None else self.optim.step(closure, **kwargs)
        if self._trained() != self._trains:
            self._trains = self._trained()
            self.refresh_trainable()
        self._broadcast_params()
        OSS._sync_param_groups(self.optim.param_groups, self.param_groups)
        return loss

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # or they warn that it has been exchanged

    @override
    def _broadcast_params(self) -> None:
        """Hand round what each replica has moved.

        What all have is gathered, everybody sending at the same time; fairscale has one replica after another broadcast
        its part. Only what a part has more than the smallest one is broadcast.
        """
        for parts in self.buckets.values():
            buffers = {rank: part.buffer for rank, part in parts.items()}
            common = min(buffer.numel() for buffer in buffers.values()) if len(buffers) == self.world_size else 0
            if common:
                gathered = [buffers[rank][:common] for rank in range(self.world_size)]
                dist.all_gather(gathered, gathered[self.rank].clone(), group=self.group)
            for rank, buffer in sorted(buffers.items()):
                if buffer.numel() > common:
                    dist.broadcast(buffer[common:], self._local_to_global_rank[rank], group=self.group)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in more parameters, which must be held by all replicas."""
        super().add_param_group(param_group)
        if not self.in_super_constructor:
            self._whole_groups.append(list(self.param_groups[-1]["params"]))
            self._trains = self._trained()

    def release(self, released: Mapping[nn.Parameter, Tensor]) -> None:
        """Have nothing more to do with parameters that this rank does not hold any longer.

        Args:
            released: What stands for each of them.
        """
        self._whole_groups = [[released.get(p, p) for p in group] for group in self._whole_groups]
        for group in self.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter not in released]
        self._clear_cache()
        self.buckets.clear()
        for mine, group in zip(self.optim.param_groups, self.partition_parameters()[self.rank], strict=True):
            mine["params"] = group["params"]
        self.state = defaultdict(dict, _part(self.state, self.optim.param_groups))
        self._trains = self._trained()
        self.refresh_trainable()

    def own_state(self) -> dict[int, Any]:
        """What this replica keeps, by the numbers of parameters."""
        indices = self.indices
        return {indices[id(parameter)]: state for parameter, state in self.state.items()}

    @override
    def state_dict(self, all_ranks: bool = False) -> dict[str, Any]:
        """What this replica keeps, in the form of the optimizer that it stands for."""
        return {"state": self.own_state(), "param_groups": self.groups()}

    def groups(self) -> list[dict[str, Any]]:
        """The options of all groups, with the numbers of their parameters."""
        indices = self.indices
        return [
            {**{key: value for key, value in group.items() if key != "params"}, "params": [indices[id(p)] for p in all]}
            for group, all in zip(self.param_groups, self._whole_groups, strict=True)
        ]

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what belongs to this replica out of the state of a whole optimizer.

        Raises:
            ValueError: If that one has other groups.
        """
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group) for group in self._whole_groups]:
            raise ValueError("the saved state of the optimizer has other groups of parameters than this one")
        indices = self.indices
        numbers = [[indices[id(p)] for p in group["params"]] for group in self.optim.param_groups]
        flat = [number for group in numbers for number in group]
        self.optim.load_state_dict(
            {
                "state": {at: state_dict["state"][n] for at, n in enumerate(flat) if n in state_dict["state"]},
                "param_groups": _renumbered(saved, numbers),
            }
        )
        OSS._sync_param_groups(self.optim.param_groups, self.param_groups)

    def _trained(self) -> list[bool]:
        return [parameter.requires_grad for group in self.param_groups for parameter in group["params"]]


def check_shardable(optimizer: Optimizer) -> None:
    """Refuse optimizers whose steps depend on several parameters at once.

    Raises:
        ValueError: Naming it.
    """
    if isinstance(optimizer, (LBFGS, OneBitAdam)):
        raise ValueError(
            f"optimizer_sharding=True cannot be used with {type(optimizer).__name__}, which needs its state of all "
            "parameters in one place: use another optimizer, such as AdamW, or optimizer_sharding=False"
        )


def sharded(
    optimizers: Sequence[Optimizer], schedulers: Iterable[Any], group: dist.ProcessGroup, held: Container[int]
) -> list[Optimizer]:
    """Put sharded optimizers in the place of others, also where schedulers have them. Collective.

    Args:
        optimizers: The same on all replicas.
        schedulers: Of their learning rates.
        group: The replicas.
        held: The ``id`` of each parameter that this rank has.

    Returns:
        For each its sharded one, whose class has the same name; those that have no parameter here stay as they are.
    """
    replaced: dict[int, Optimizer] = {}
    for optimizer in optimizers:
        if any(id(parameter) in held for group_ in optimizer.param_groups for parameter in group_["params"]):
            # Logs and progress bars show the name of the class.
            kind = type(type(optimizer).__name__, (ShardedOptimizer,), {})
            replaced[id(optimizer)] = kind(optimizer, group, held)
    for scheduler in schedulers:
        _redirect(scheduler, replaced)
    return [replaced.get(id(optimizer), optimizer) for optimizer in optimizers]


def _redirect(scheduler: Any, replaced: Mapping[int, Optimizer]) -> None:
    for name, value in vars(scheduler).items():
        if isinstance(value, Optimizer):
            setattr(scheduler, name, replaced.get(id(value), value))
        elif isinstance(value, list):  # SequentialLR, ChainedScheduler
            for part in value:
                if isinstance(getattr(part, "optimizer", None), Optimizer):
                    _redirect(part, replaced)


def _narrowing(optimizer: Optimizer) -> Callable[..., Optimizer]:
    """Makes an optimizer like another one, for some of its parameters: its arguments need not be known for that."""

    def make(groups: list[dict[str, Any]], **_: Any) -> Optimizer:
        part = type(optimizer).__new__(type(optimizer))
        part.__dict__.update(optimizer.__dict__)
        part.__dict__.pop("step", None)  # a scheduler's, which calls the whole one
        part.param_groups = [copy(group) for group in groups]
        part.state = defaultdict(dict, _part(optimizer.state, groups))
        return part

    return make


def _part(state: Mapping[Any, Any], groups: Iterable[Mapping[str, Any]]) -> dict[Any, Any]:
    return {p: state[p] for group in groups for p in group["params"] if p in state}


def _renumbered(saved: Iterable[Mapping[str, Any]], numbers: Iterable[Sequence[int]]) -> list[dict[str, Any]]:
    groups, at = [], 0
    for group, mine in zip(saved, numbers, strict=True):
        groups.append({**group, "params": list(range(at, at + len(mine)))})
        at += len(mine)
    return groups
