"""Which layer each parameter belongs to, and which rank counts it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

_SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


class _Mesh(Protocol):
    pipeline_parallel_size: int

    @property
    def data_parallel_size(self) -> int: ...

    @property
    def pipeline_rank(self) -> int: ...


@runtime_checkable
class HasStages(Protocol):
    """A strategy whose ranks hold different parts of the model."""

    @property
    def mesh(self) -> _Mesh:
        """How replicas and pipelines are laid out."""
        ...

    def parameter_stages(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        """(stage, rank of the pipeline) of all that hold a parameter, by its first full name. Alike on all ranks."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a parameter is counted.

    Attributes:
        layer: Index of its layer.
        is_counted: Whether this rank is the one of its replica that counts it.
        is_whole: Whether one backward pass brings its gradient as a whole. Of a parameter that several stages share
            (tied embeddings) each brings a part, and these are added up later.
    """

    layer: int
    is_counted: bool = True
    is_whole: bool = True


@dataclass(frozen=True)
class Placement:
    """The watched parameters.

    A layer is a module that has parameters of its own: weight and bias of an ``nn.Linear`` are one.

    Attributes:
        layers: Names of all layers in the order of the module, the same on all ranks.
        places: By name of the parameter.
        stages: Of each layer, the pipeline stage that holds it; empty without stages.
        replicas: Number of ranks that count the same.
    """

    layers: tuple[str, ...]
    places: Mapping[str, Place]
    stages: tuple[int, ...] = ()
    replicas: int = 1

    @classmethod
    def find(
        cls, trainer: pl.Trainer, module: nn.Module, include: Iterable[str], exclude: Iterable[str]
    ) -> "Placement":
        """Look at the module as it is now.

        Args:
            trainer: Whose strategy may have stages.
            module: Whose parameters.
            include: Patterns of parameter names, as in file names: a name must match one of them.
            exclude: And none of these.
        """
        include, exclude = tuple(include), tuple(exclude)
        layers: dict[str, int] = {}
        watched: dict[str, int] = {}
        for name, _ in module.named_parameters():
            if _matches(name, include) and not _matches(name, exclude):
                watched[name] = layers.setdefault(layer_of(name), len(layers))
        strategy: Any = trainer.strategy
        if not isinstance(strategy, HasStages):
            places = {name: Place(layer) for name, layer in watched.items()}
            return cls(tuple(layers), places, replicas=trainer.world_size)
        own, held = strategy.mesh.pipeline_rank, strategy.parameter_stages()
        places, stages = {}, [0] * len(layers)
        for name, layer in watched.items():
            ranks = {rank for _, rank in held[name]}
            places[name] = Place(layer, min(ranks) == own, ranks == {own} and len(held[name]) == 1)
            stages[layer] = held[name][0][0]
        return cls(tuple(layers), places, tuple(stages), strategy.mesh.data_parallel_size)


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies that leave each rank with pieces of gradients.

    Raises:
        TypeError: If so.
    """
    if isinstance(trainer.strategy, _SHARDED):
        raise TypeError(
            f"GradientMonitor needs whole gradients, but {type(trainer.strategy).__name__} leaves each rank with "
            "shards of them: leave the callback out, or train with strategy='ddp' or 'danon_hybrid'"
        )


def layer_of(parameter: str) -> str:
    """The name of the module that has a parameter; of one that the whole module has itself, its own name.

    What ``torch.compile`` adds to names is left out.
    """
    name = parameter.replace("_orig_mod.", "")
    return name.rpartition(".")[0] or name


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
