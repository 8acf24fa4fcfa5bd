"""The ways in which a model can be spread over a cluster."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from danon_lightning.strategies import Mesh
from danon_lightning.strategies.pipeline.schedules import Schedule, resolve_schedule

SCHEDULES = ("1f1b", "gpipe", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv")
DEFAULT_SCHEDULES = ("1f1b", "gpipe", "interleaved_1f1b")
DEFAULT_COMPRESSIONS = (None, "bf16", "int8")
# Micro-batches for each stage of a pipeline that are tried.
_PER_STAGE = (1, 2, 4, 8)


@dataclass(frozen=True)
class Layout:
    """One of them.

    Attributes:
        data: Number of replicas.
        pipeline: Number of ranks that share each.
        micro_batches: Into how many a replica's batch is cut; 1 without a pipeline.
        schedule: In which order they pass; None without a pipeline.
        stages_per_rank: How many stages each rank has.
        across_nodes: Whether the ranks of a pipeline are on several nodes, and the replicas of a stage on one.
        checkpointing: Whether activations are computed twice rather than kept.
        sharding: Whether the optimizer's state is shared out among replicas.
        compression: What gradients are coded with between nodes.
    """

    data: int
    pipeline: int = 1
    micro_batches: int = 1
    schedule: str | None = None
    stages_per_rank: int = 1
    across_nodes: bool = False
    checkpointing: bool = False
    sharding: bool = False
    compression: str | None = None

    def resolved(self) -> Schedule:
        """Its schedule, of one rank without a pipeline."""
        return resolve_schedule(self.schedule or "gpipe", self.pipeline, self.stages_per_rank)

    def mesh(self, nodes: int, ranks_per_node: int) -> Mesh:
        """Where its ranks are.

        Raises:
            ValueError: If they cannot be laid out so.
        """
        return Mesh(nodes, ranks_per_node, 0, self.pipeline, self.across_nodes)

    def distance(self, other: "Layout") -> int:
        """In how many respects two differ."""
        return sum(getattr(self, field.name) != getattr(other, field.name) for field in fields(self))

    def __str__(self) -> str:
        """In one line: ``2 replicas × 2 stages, 1f1b, 8 micro-batches, int8``."""
        words = [f"{self.data} replica{'s' * (self.data > 1)}"]
        if self.pipeline > 1:
            ranks = f"{self.pipeline} ranks" + f" × {self.stages_per_rank} stages" * (self.stages_per_rank > 1)
            words = [f"{words[0]} × {ranks}{' across nodes' * self.across_nodes}"]
            words += [str(self.schedule), f"{self.micro_batches} micro-batches"]
        words += ["checkpointing"] * self.checkpointing + ["sharded optimizer"] * self.sharding
        return ", ".join([*words, self.compression or "dense"])


def enumerate_layouts(
    nodes: int,
    ranks_per_node: int,
    batch: int,
    blocks: int,
    *,
    schedules: Sequence[str] = DEFAULT_SCHEDULES,
    compressions: Sequence[str | None] = DEFAULT_COMPRESSIONS,
    checkpointing: Sequence[bool] = (False, True),
    sharding: Sequence[bool] = (False, True),
) -> Iterator[Layout]:
    """All layouts that use all ranks.

    Numbers divide: pipelines the ranks, replicas the batch, and micro-batches what a replica has of it. Micro-batches
    are as many as a pipeline has ranks, or 2, 4 or 8 times as many; where that divides nothing, any number that does
    and is not smaller.

    Args:
        nodes: Number of nodes.
        ranks_per_node: Ranks on each.
        batch: Samples of a step, of all replicas together.
        blocks: Of how many the body of the model is; 0 if it cannot be cut.
        schedules: For pipelines.
        compressions: What gradients may be coded with between nodes, where there are several replicas.
        checkpointing: Whether it is tried, for pipelines.
        sharding: Whether it is tried, for several replicas.
    """
    world = nodes * ranks_per_node
    for pipeline in range(1, world + 1):
        if world % pipeline or batch % (world // pipeline) or (pipeline > 1 and pipeline > blocks):
            continue
        data = world // pipeline
        for one in _pipelines(nodes, ranks_per_node, pipeline, batch // data, blocks, schedules, checkpointing):
            for is_sharded in sharding if data > 1 else (False,):
                for compression in compressions if data > 1 else (None,):
                    yield Layout(data, **one, sharding=is_sharded, compression=compression)  # type: ignore[arg-type]


def _pipelines(
    nodes: int,
    ranks_per_node: int,
    pipeline: int,
    samples: int,
    blocks: int,
    schedules: Sequence[str],
    checkpointing: Sequence[bool],
) -> Iterator[dict[str, object]]:
    if pipeline == 1:
        yield {}
        return
    placements = [across for across in (False, True) if _fits(nodes, ranks_per_node, pipeline, across)]
    if 1 in (nodes, ranks_per_node, nodes * ranks_per_node // pipeline):
        placements = placements[:1]  # it makes no difference
    for name in schedules:
        schedule = resolve_schedule(name, pipeline)
        if schedule.stages > blocks:
            continue
        for micro_batches in _numbers(pipeline, samples):
            for across in placements:
                for checkpointed in checkpointing:
                    if checkpointed and schedule.splits_backward:
                        continue
                    yield {
                        "pipeline": pipeline,
                        "micro_batches": micro_batches,
                        "schedule": name,
                        "stages_per_rank": schedule.stages_per_rank,
                        "across_nodes": across,
                        "checkpointing": checkpointed,
                    }


def _numbers(pipeline: int, samples: int) -> list[int]:
    """Numbers of micro-batches of equal size."""
    divisors = [number for number in range(pipeline, samples + 1) if not samples % number]
    return [number for number in divisors if number in [per * pipeline for per in _PER_STAGE]] or divisors


def _fits(nodes: int, ranks_per_node: int, pipeline: int, across: bool) -> bool:
    try:
        Mesh(nodes, ranks_per_node, 0, pipeline, across)
    except ValueError:
        return False
    return True
