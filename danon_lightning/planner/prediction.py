"""What a layout costs: its passes played through, its gradients exchanged, its memory counted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor

from danon_lightning.planner.cluster import Cluster
from danon_lightning.planner.layouts import Layout
from danon_lightning.planner.memory import activation_bytes, rank_memory, shard_numel
from danon_lightning.planner.plans import Plan
from danon_lightning.planner.profile import Part, Profile
from danon_lightning.planner.simulation import Route, Simulated, simulate
from danon_lightning.strategies import Mesh
from danon_lightning.strategies.communication.compressors import get_compressor
from danon_lightning.strategies.communication.cost_model import (
    CodingCosts,
    Levels,
    Links,
    coding_costs,
    ddp_buckets,
    predict_exchange,
)
from danon_lightning.strategies.communication.cost_model.prediction import Prediction
from danon_lightning.strategies.optimizer_checks import check_optimizer
from danon_lightning.strategies.pipeline.balance import balanced_cuts
from danon_lightning.strategies.pipeline.orders import Action, Compute, Transfer, rank_orders
from danon_lightning.strategies.pipeline.recording import Cuts

Named = list[tuple[str, Tensor]]
# What happens before the last stage's first pass: see what losses divide by.
_COUNT = "count"
# Small exchanges of a step: is the batch the same, what was logged (its size, and itself), which gradients are there.
_AGREEMENTS = 4


@dataclass(frozen=True)
class _Pipeline:
    """The passes of a step, which layouts that differ in the exchange alone share."""

    cuts: Cuts | None
    orders: list[list[Action]]
    simulated: Simulated


class Predictor:
    """Predicts layouts of one module on one cluster."""

    def __init__(
        self,
        profile: Profile,
        cluster: Cluster,
        batch: int,
        *,
        bucket_bytes: int = 25 << 20,
        pipeline_layers: str | None = None,
        costs: CodingCosts | None = None,
    ) -> None:
        """Start.

        Args:
            profile: Of the module.
            cluster: What to predict for.
            batch: Samples of a step, of all replicas together.
            bucket_bytes: Size of gradient buckets.
            pipeline_layers: Name of the blocks, where it was given.
            costs: What coding takes; None to measure it here.
        """
        self.profile, self.cluster, self.batch = profile, cluster, batch
        self._bucket_bytes, self._pipeline_layers, self._costs = bucket_bytes, pipeline_layers, costs
        self._pipelines: dict[Layout, _Pipeline] = {}
        self._exchanges: dict[tuple[object, ...], Prediction] = {}
        self._held: dict[Cuts | None, list[Named]] = {}

    def predict(self, layout: Layout) -> Plan:
        """What a layout costs, and whether it can be had.

        Args:
            layout: Of all ranks of the cluster.
        """
        links = self.cluster.links
        plan = Plan(layout, links.nodes, links.ranks_per_node, self.batch, pipeline_layers=self._pipeline_layers)
        reason = self._refused(layout)
        pipeline = self._pipeline_of(layout)
        if pipeline.cuts is not None:
            plan = replace(plan, stage_cut=tuple(pipeline.cuts.bounds[1:-1]))
            reason = reason or self._obstacle(pipeline.cuts)
        plan = self._with_time(plan, pipeline)
        plan = self._with_memory(plan, pipeline)
        limit = self.cluster.memory_bytes
        if reason is None and limit is not None and plan.memory.total > limit:
            reason = f"needs {format_bytes(plan.memory.total)} a rank, {format_bytes(limit)} are there"
        return replace(plan, reason=reason)

    # ---- whether it can be had

    def _refused(self, layout: Layout) -> str | None:
        compressor = get_compressor(layout.compression)
        if compressor is None:
            return None
        for optimizer in self.profile.optimizer.instances:
            try:
                check_optimizer(optimizer, compressor, None, clips=False)
            except ValueError as error:
                return str(error)
        return None

    def _obstacle(self, cuts: Cuts) -> str | None:
        for stage in range(1, cuts.stages):
            first = cuts.blocks_of(stage).start
            obstacle = self.profile.parts[first + 1].obstacle
            if obstacle is not None:
                return f"the step cannot be cut before block {first}: {obstacle}"
        return None

    # ---- time

    def samples_of_pass(self, layout: Layout) -> float:
        """Samples of a micro-batch."""
        return self.batch / layout.data / layout.micro_batches

    def _pipeline_of(self, layout: Layout) -> _Pipeline:
        key = replace(layout, compression=None, sharding=False)
        if key not in self._pipelines:
            self._pipelines[key] = self._play(key)
        return self._pipelines[key]

    def _play(self, layout: Layout) -> _Pipeline:
        samples = self.samples_of_pass(layout)
        if layout.pipeline == 1:
            order: list[Action] = [Compute("forward", 0, 0), Compute("backward", 0, 0)]
            return _Pipeline(None, [order], simulate([order], lambda one: self._pass_seconds(one, None, layout)))
        schedule = layout.resolved()
        cuts = balanced_cuts(self.profile.costs(max(1, round(samples))), schedule.stages)
        orders = rank_orders(schedule, layout.micro_batches)
        orders[schedule.rank_of(schedule.stages - 1)].insert(0, Compute(_COUNT, schedule.stages - 1, 0))
        routes = self._routes(layout, cuts)

        def route(transfer: Transfer) -> Route:
            return routes[transfer.kind, transfer.source]

        played = simulate(orders, lambda one: self._pass_seconds(one, cuts, layout), route)
        return _Pipeline(cuts, orders, played)

    def _pass_seconds(self, one: Compute, cuts: Cuts | None, layout: Layout) -> float:
        profile, samples = self.profile, self.samples_of_pass(layout)
        if one.kind == _COUNT:
            return profile.count_seconds * layout.micro_batches / self.cluster.speed
        parts = [profile.parts[index] for index in profile.parts_of(cuts, one.stage)]
        forward = sum(part.forward(samples) for part in parts)
        if one.kind == "forward":
            return (forward + profile.stage_seconds * (cuts is not None)) / self.cluster.speed
        backward = sum(part.backward(samples) for part in parts)
        if layout.checkpointing:
            backward += sum(part.forward(samples) for part in parts if part.is_block)
        # Gradients of activations and of weights are about as many multiplications each.
        share = 0.5 if cuts is not None and layout.resolved().splits_backward else 1.0
        return backward * share / self.cluster.speed

    def _routes(self, layout: Layout, cuts: Cuts) -> dict[tuple[str, int], Route]:
        """How activations and gradients go between stages, in the first replica, while others do the same."""
        links, schedule, samples = self.cluster.links, layout.resolved(), self.samples_of_pass(layout)
        mesh = layout.mesh(links.nodes, links.ranks_per_node)
        routes = {}
        for stage in range(cuts.stages):
            for kind, target in (("activation", stage + 1), ("gradient", stage - 1)):
                if not 0 <= target < cuts.stages:
                    continue
                part = self.profile.parts[cuts.blocks_of(max(stage, target)).start + 1]
                size = part.entering(samples) if kind == "activation" else part.returned(samples)
                source, goal = schedule.rank_of(stage), schedule.rank_of(target)
                routes[kind, stage] = _route(mesh, links, source, goal, size)
        return routes

    def _with_time(self, plan: Plan, pipeline: _Pipeline) -> Plan:
        layout, links = plan.layout, self.cluster.links
        mesh = layout.mesh(links.nodes, links.ranks_per_node)
        schedule = layout.resolved()
        played = pipeline.simulated
        ends = []
        leaving = [0.0] * links.nodes
        moved, exchanged = [], []
        for rank in range(layout.pipeline):
            held = self._held_by(layout, pipeline.cuts, rank)
            trained = [(name, parameter) for name, parameter in held if parameter.requires_grad]
            exchange = self._exchange(layout, pipeline, rank, trained)
            late = exchange.exposed_seconds if layout.pipeline == 1 else exchange.seconds
            numel = shard_numel(trained, layout.data) if layout.sharding else sum(p.numel() for _, p in trained)
            optimizer = numel * self.profile.optimizer.seconds_per_element / self.cluster.speed
            sent, spreading = self._spread(mesh, rank, trained) if layout.sharding else (0.0, 0.0)
            ends.append(played.ends[rank] + late + optimizer + spreading)
            moved.append(optimizer + spreading)
            exchanged.append(late)
            for node in {mesh.node_of(one) for one in mesh.ranks_across_replicas(rank)}:
                leaving[node] += exchange.inter_node_bytes + sent
        if pipeline.cuts is not None:
            for node, size in enumerate(self._travelling(layout, mesh, pipeline.cuts)):
                leaving[node] += size
        slowest = max(range(layout.pipeline), key=lambda rank: ends[rank])
        seconds = ends[slowest]
        if layout.pipeline > 1:
            crosses = len({mesh.node_of(rank) for rank in mesh.ranks_of_replica(0)}) > 1
            link = links.inter if crosses else links.intra
            seconds += _AGREEMENTS * math.ceil(math.log2(layout.pipeline)) * (link.latency_seconds if link else 0.0)
        return replace(
            plan,
            step_seconds=seconds,
            compute_seconds=max(played.busy),
            bubble=played.bubble if schedule.ranks > 1 else 0.0,
            exchange_seconds=exchanged[slowest],
            optimizer_seconds=moved[slowest],
            leaving_bytes=max(leaving),
        )

    def _held_by(self, layout: Layout, cuts: Cuts | None, rank: int) -> Named:
        """The parameters of a rank of the pipeline."""
        if cuts not in self._held:
            self._held[cuts] = (
                [list(self.profile.parameters())]
                if cuts is None
                else [list(x) for x in self.profile.parameters_of(cuts)]
            )
        held = self._held[cuts]
        if cuts is None:
            return held[0]
        return list(
            {id(p): (name, p) for stage in layout.resolved().stages_of(rank) for name, p in held[stage]}.values()
        )

    def _exchange(self, layout: Layout, pipeline: _Pipeline, rank: int, trained: Named) -> Prediction:
        if layout.data == 1 or not trained:
            return Prediction(0.0, 0.0, 0.0, 0.0, 0)
        key = (replace(layout, sharding=False), rank)
        if key not in self._exchanges:
            links = group_links(
                layout.mesh(self.cluster.links.nodes, self.cluster.links.ranks_per_node), self.cluster.links
            )
            ready = None
            if layout.pipeline == 1:
                buckets = [list(bucket) for bucket in ddp_buckets(trained, self._bucket_bytes)]
                ready = self._ready(layout, buckets)
            else:
                buckets = _in_order(trained, self._bucket_bytes)
            self._exchanges[key] = predict_exchange(
                buckets, links, compression=layout.compression, costs=self._coding(layout.compression), ready=ready
            )
        return self._exchanges[key]

    def _ready(self, layout: Layout, buckets: Sequence[Sequence[tuple[str, Tensor]]]) -> list[float]:
        """When the gradients of each bucket are there, in seconds of the backward pass."""
        samples, parts = self.samples_of_pass(layout), self.profile.parts
        done = list(accumulate(part.backward(samples) / self.cluster.speed for part in reversed(parts)))[::-1]
        times = [max(done[self.profile.part_of(name)] for name, _ in bucket) for bucket in buckets]
        times = list(accumulate(times, max))
        # Gradients that are handed over last are so at the very end: what comes after the last one cannot be hidden.
        return [*times[:-1], done[0]]

    def _coding(self, compression: str | None) -> CodingCosts:
        costs = self._costs if self._costs is not None else coding_costs(compression)
        return costs.times(1 / self.cluster.speed)

    def _spread(self, mesh: Mesh, rank: int, trained: Named) -> tuple[float, float]:
        """Bytes that a node sends while replicas hand out what they have moved, and the seconds that it takes."""
        links = group_links(mesh, self.cluster.links)
        total = float(sum(parameter.nbytes for _, parameter in trained))
        others = mesh.data_parallel_size - 1
        if not others:
            return 0.0, 0.0
        # In a ring, out of each node by one of its links.
        sent = total * others / (others + 1)
        if links.inter is not None:
            return sent, others * links.inter.latency_seconds + sent / links.inter.bytes_per_second
        assert links.intra is not None
        return 0.0, others * links.intra.latency_seconds + total * others / links.intra.bytes_per_second

    def _travelling(self, layout: Layout, mesh: Mesh, cuts: Cuts) -> list[float]:
        """What each node sends to others between stages."""
        schedule, samples = layout.resolved(), self.samples_of_pass(layout)
        leaving = [0.0] * mesh.num_nodes
        for replica in range(layout.data):
            ranks = mesh.ranks_of_replica(replica)
            for stage in range(1, cuts.stages):
                part = self.profile.parts[cuts.blocks_of(stage).start + 1]
                before, after = (mesh.node_of(ranks[schedule.rank_of(one)]) for one in (stage - 1, stage))
                if before != after:
                    leaving[before] += part.entering(samples) * layout.micro_batches
                    leaving[after] += part.returned(samples) * layout.micro_batches
        return leaving

    # ---- memory

    def _with_memory(self, plan: Plan, pipeline: _Pipeline) -> Plan:
        layout, profile = plan.layout, self.profile
        mesh = layout.mesh(plan.nodes, plan.ranks_per_node)
        links = group_links(mesh, self.cluster.links)
        levels = Levels.of(links.nodes, links.ranks_per_node, compressed=layout.compression is not None)
        samples = self.samples_of_pass(layout)
        schedule = layout.resolved()
        found = []
        for rank in range(layout.pipeline):
            stages: dict[int, Sequence[Part]] = {
                stage: [profile.parts[index] for index in profile.parts_of(pipeline.cuts, stage)]
                for stage in schedule.stages_of(rank)
            }
            activations = activation_bytes(pipeline.orders[rank], stages, samples, layout)
            held = self._held_by(layout, pipeline.cuts, rank)
            found.append(rank_memory(held, profile.optimizer, activations, layout, levels, self._bucket_bytes))
        return replace(plan, memory=max(found, key=lambda one: one.total))


def group_links(mesh: Mesh, links: Links) -> Links:
    """What the replicas of one stage have of the links, while those of others exchange too.

    Args:
        mesh: Where they are.
        links: Of the cluster.
    """
    local = mesh.replicas_per_node
    nodes = max(1, mesh.data_parallel_size // local)
    together = Links(
        nodes,
        local,
        intra=links.intra if local > 1 else None,
        inter=links.inter if nodes > 1 else None,
        shared_memory=links.shared_memory,
    )
    return together.shared_by(max(1, mesh.ranks_per_node // local))


def _route(mesh: Mesh, links: Links, source: int, target: int, size: float) -> Route:
    """From a rank of a pipeline to another one, while those of other replicas do the same."""
    if source == target:
        return Route()
    ways = [
        (mesh.node_of(mesh.rank_at(replica, source)), mesh.node_of(mesh.rank_at(replica, target)))
        for replica in range(mesh.data_parallel_size)
    ]
    node, goal = ways[0]
    crosses = node != goal
    link = links.inter if crosses else links.intra
    if link is None:
        return Route()
    share = sum(one[0] == node and (one[0] != one[1]) == crosses for one in ways)
    return Route(
        wire=("inter" if crosses else "intra", node),
        latency=link.latency_seconds,
        occupation=size * share / link.bytes_per_second,
        overhead=link.overhead_seconds + link.overhead_seconds_per_byte * size,
    )


def _in_order(parameters: Named, bucket_bytes: int) -> list[Named]:
    """Buckets as ``GradientCommunicator.average`` makes them."""
    buckets: list[Named] = [[]]
    room = 0
    for name, parameter in parameters:
        if buckets[-1] and (parameter.nbytes > room or parameter.dtype != buckets[-1][0][1].dtype):
            buckets.append([])
        if not buckets[-1]:
            room = bucket_bytes
        buckets[-1].append((name, parameter))
        room -= parameter.nbytes
    return buckets


def format_bytes(size: float) -> str:
    """Such as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.3g} TiB"


__all__ = ["Predictor", "format_bytes", "group_links"]
