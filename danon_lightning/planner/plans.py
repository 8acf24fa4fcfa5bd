"""A plan: a layout, what it is predicted to cost, and how to train with it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from danon_lightning.planner.layouts import Layout
from danon_lightning.planner.memory import Memory
from danon_lightning.strategies import DanonHybridStrategy


@dataclass(frozen=True)
class Plan:
    """A layout and its prediction.

    Attributes:
        layout: How the model is spread.
        nodes: Number of nodes.
        ranks_per_node: Ranks on each.
        batch: Samples of a step, of all replicas together.
        stage_cut: First layer of each stage but the first; empty without a pipeline.
        pipeline_layers: Name of the layers, where it was given.
        step_seconds: From step to step.
        compute_seconds: Of these, forward and backward passes of the busiest rank.
        bubble: Share of ranks × time in which the ranks of a pipeline have nothing to compute, from the first pass to
            the last.
        exchange_seconds: What the exchange of gradients makes the step longer by.
        optimizer_seconds: Moving the weights, and sending them on where the optimizer is sharded.
        leaving_bytes: What leaves the node that sends most.
        memory: Of the rank that needs most.
        reason: Why it cannot be had; None if it can.
        extra_overrides: Those of ``danon-train`` that it was made for: model and data.
    """

    layout: Layout
    nodes: int
    ranks_per_node: int
    batch: int
    stage_cut: tuple[int, ...] = ()
    pipeline_layers: str | None = None
    step_seconds: float = 0.0
    compute_seconds: float = 0.0
    bubble: float = 0.0
    exchange_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    leaving_bytes: float = 0.0
    memory: Memory = field(default_factory=lambda: Memory(0.0, 0.0, 0.0, 0.0, 0.0))
    reason: str | None = None
    extra_overrides: tuple[str, ...] = ()

    @property
    def is_feasible(self) -> bool:
        """Whether it can be had."""
        return self.reason is None

    @property
    def samples_per_second(self) -> float:
        """Of all replicas together."""
        return self.batch / self.step_seconds if self.step_seconds else 0.0

    def arguments(self) -> dict[str, Any]:
        """Arguments of :class:`DanonHybridStrategy`, of those that are not as by default."""
        layout = self.layout
        found: dict[str, Any] = {}
        if layout.pipeline > 1:
            found |= {
                "pipeline_parallel_size": layout.pipeline,
                "num_microbatches": layout.micro_batches,
                "schedule": layout.schedule,
                "stage_cut": list(self.stage_cut),
                "pipeline_placement": "across_nodes" if layout.across_nodes else "inside_nodes",
            }
            if layout.stages_per_rank > 1:
                found["stages_per_rank"] = layout.stages_per_rank
            if layout.checkpointing:
                found["activation_checkpointing"] = True
            if self.pipeline_layers is not None:
                found["pipeline_layers"] = self.pipeline_layers
        if layout.compression is not None:
            found["compression"] = layout.compression
        if layout.sharding:
            found["optimizer_sharding"] = True
        return found

    def strategy(self) -> DanonHybridStrategy:
        """For ``Trainer(strategy=…)``, with as many nodes and devices.

        Raises:
            ValueError: If the plan is not feasible.
        """
        if self.reason is not None:
            raise ValueError(f"this plan cannot be had: {self.reason}")
        return DanonHybridStrategy(**self.arguments())

    def overrides(self) -> list[str]:
        """For the command line of ``danon-train``."""
        values = [f"strategy={'pipeline' if self.layout.pipeline > 1 else 'hybrid'}"]
        values += [f"strategy.{name}={_in_hydra(value)}" for name, value in self.arguments().items()]
        return [
            *self.extra_overrides,
            *values,
            f"trainer.num_nodes={self.nodes}",
            f"trainer.devices={self.ranks_per_node}",
        ]

    def config_block(self) -> str:
        """The same as YAML: a ``strategy:`` block for a config of one's own."""
        lines = ["strategy:", "  _target_: danon_lightning.strategies.DanonHybridStrategy"]
        return "\n".join([*lines, *(f"  {name}: {_in_hydra(value)}" for name, value in self.arguments().items())])

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "layout": asdict(self.layout),
            "description": str(self.layout),
            "feasible": self.is_feasible,
            "reason": self.reason,
            "step_seconds": self.step_seconds,
            "compute_seconds": self.compute_seconds,
            "bubble": self.bubble,
            "exchange_seconds": self.exchange_seconds,
            "optimizer_seconds": self.optimizer_seconds,
            "samples_per_second": self.samples_per_second,
            "leaving_bytes": self.leaving_bytes,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "strategy": {"_target_": "danon_lightning.strategies.DanonHybridStrategy", **self.arguments()},
            "overrides": self.overrides(),
        }


def nearest_feasible(plan: Plan, plans: list[Plan]) -> Plan | None:
    """Of the plans that can be had, the one that differs least from one that cannot; the fastest of several."""
    feasible = [one for one in plans if one.is_feasible]
    return min(feasible, key=lambda one: (plan.layout.distance(one.layout), one.step_seconds), default=None)


def _in_hydra(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
