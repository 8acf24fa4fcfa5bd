"""What runs on the ranks, one a host: the probe of the links, and timed steps with each exchange."""

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from danon_lightning.benchmark.scaling.exchanges import attach, compression_of
from danon_lightning.benchmark.scaling.workload import TimedStack, Workload
from danon_lightning.strategies import Mesh
from danon_lightning.strategies.communication.cost_model import (
    CodingCosts,
    Links,
    agree_on_costs,
    coding_costs,
    probe_links,
)

# DDP regroups its buckets after the first step, memory is touched for the first time, and thresholds settle.
WARMUP_STEPS = 3
PROBE_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """What a job shall do.

    Attributes:
        workload: What a step computes and exchanges.
        exchanges: Names of the exchanges, in order.
        steps: Measured steps of each.
    """

    workload: Workload
    exchanges: tuple[str, ...]
    steps: int


@dataclass(frozen=True)
class Measurement:
    """One exchange's figures, medians over steps; a step is one of the rank that took longest over it.

    Attributes:
        seconds: The whole step, from the beginning of the forward pass to the end of the backward pass.
        best_seconds: The shortest.
        exposed_seconds: From the last gradient to the end.
        payload_bytes: Bytes a step that the host that sends most has counted; None for plain DDP, which does not count.
        costs: What the exchange computes with, measured on all ranks at once.
    """

    seconds: float
    best_seconds: float
    exposed_seconds: float
    payload_bytes: float | None
    costs: CodingCosts


@dataclass(frozen=True)
class Outcome:
    """What a job has found.

    Attributes:
        links: The links; None with a single host, or if they could not be measured.
        probe_seconds: What measuring them took.
        measured: By exchange.
    """

    links: Links | None
    probe_seconds: float
    measured: Mapping[str, Measurement]


def measure(plan: Plan) -> Outcome:
    """Run a job; called on every rank with the process group initialised."""
    torch.set_num_threads(1)
    world_size = dist.get_world_size()
    start = time.perf_counter()
    mesh = Mesh.from_world(world_size, world_size, dist.get_rank())
    links = probe_links(mesh, time_limit=PROBE_SECONDS) if world_size > 1 else None
    seconds = time.perf_counter() - start
    return Outcome(links, seconds, {name: _measure(name, plan) for name in plan.exchanges})


def _measure(exchange: str, plan: Plan) -> Measurement:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # all ranks measure at the same time, as they will work at the same time
    costs = agree_on_costs(coding_costs(compression_of(exchange)))
    stack = TimedStack(plan.workload, rank)
    if world_size == 1:  # with nobody to exchange with there is nothing to set up
        times = [_step(stack, stack) for _ in range(WARMUP_STEPS + plan.steps)]
        return _combine(times[WARMUP_STEPS:], 1, None, costs)
    ddp = DistributedDataParallel(
        stack,
        bucket_cap_mb=plan.workload.bucket_bytes / 2**20,
        gradient_as_bucket_view=True,
        init_sync=False,  # the parameters are zero everywhere; sending them takes long on a slow link
    )
    communicator = attach(exchange)(ddp, world_size)
    sent = 0
    times = []
    for step in range(WARMUP_STEPS + plan.steps):
        if communicator is not None and step == WARMUP_STEPS:
            sent = communicator.stats()["inter_node_bytes"]
        times.append(_step(ddp, stack))
    payload = None
    if communicator is not None:
        counted = torch.tensor(float(communicator.stats()["inter_node_bytes"] - sent), dtype=torch.float64)
        dist.all_reduce(counted, dist.ReduceOp.MAX)
        payload = float(counted) / plan.steps
        communicator.close()
    found = _combine(times[WARMUP_STEPS:], world_size, payload, costs)
    del ddp, communicator
    gc.collect()  # a model and its hook refer to each other
    return found


def _step(model: torch.nn.Module, stack: TimedStack) -> tuple[float, float]:
    """Seconds of a step, and of its part after the last gradient."""
    model.zero_grad(set_to_none=False)  # keeps them in the buckets
    dist.barrier()
    start = time.perf_counter()
    model().backward()
    end = time.perf_counter()
    return end - start, end - stack.computed_at


def _combine(
    times: Sequence[tuple[float, float]], world_size: int, payload: float | None, costs: CodingCosts
) -> Measurement:
    by_rank = [torch.zeros(len(times), 2, dtype=torch.float64) for _ in range(world_size)]
    dist.all_gather(by_rank, torch.tensor(times, dtype=torch.float64))
    slowest = [max(tuple(one) for one in step) for step in torch.stack(by_rank, 1).tolist()]
    return Measurement(
        seconds=statistics.median(step for step, _ in slowest),
        best_seconds=min(step for step, _ in slowest),
        exposed_seconds=statistics.median(exposed for _, exposed in slowest),
        payload_bytes=payload,
        costs=costs,
    )
