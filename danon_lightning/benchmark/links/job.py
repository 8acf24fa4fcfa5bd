"""What runs on the ranks: the probe, and, for a check, exchanges of given gradients beside what is predicted."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket

from danon_lightning.benchmark.communication.workload import MATRICES, Workload
from danon_lightning.benchmark.links.exchanges import EXCHANGES, Exchange
from danon_lightning.strategies import GradientCommunicator, Mesh
from danon_lightning.strategies.communication.cost_model import (
    CodingCosts,
    Links,
    agree_on_costs,
    coding_costs,
    predict_exchange,
    probe_links,
)
from danon_lightning.strategies.communication.cost_model.prediction import Prediction
from danon_lightning.strategies.communication.cost_model.textbook import ring

# Memory is touched for the first time, and thresholds settle.
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Plan:
    """What a job shall do.

    Attributes:
        nodes: Number of nodes.
        device: Where gradients lie: "cpu" or "cuda".
        time_limit: Of the probe, in seconds.
        message_bytes: Of the probe.
        pairwise: Whether to measure every two nodes too.
        exchanges: Names of the exchanges to check predictions with; may be none.
        elements: Gradient elements of these, about.
        steps: Measured exchanges of each, after the warm-up.
    """

    nodes: int
    device: str
    time_limit: float
    message_bytes: int
    pairwise: bool
    exchanges: tuple[str, ...] = ()
    elements: float = 10e6
    steps: int = 7


@dataclass(frozen=True)
class Check:
    """One exchange, predicted and measured.

    Attributes:
        exchange: Its name.
        predicted: What the cost model says.
        costs: The coding costs that it says it with.
        seconds: Measured: from the first bucket to the last mean on the slowest rank; the median.
        best_seconds: The shortest.
        inter_node_bytes: Counted, of the node that sends most; None for torch's own all-reduce.
    """

    exchange: str
    predicted: Prediction
    costs: CodingCosts
    seconds: float
    best_seconds: float
    inter_node_bytes: float | None

    @property
    def error(self) -> float:
        """How far off the prediction is, as a share of what was measured."""
        return self.predicted.seconds / self.seconds - 1


@dataclass(frozen=True)
class Outcome:
    """What a job has found.

    Attributes:
        links: The links; None if they could not be measured.
        probe_seconds: What that took.
        checks: One for each exchange.
    """

    links: Links | None
    probe_seconds: float
    checks: tuple[Check, ...]


def measure(plan: Plan) -> Outcome:
    """Run a job; called on every rank with the process group initialised."""
    torch.set_num_threads(1)
    mesh = Mesh.from_world(dist.get_world_size(), plan.nodes, dist.get_rank())
    start = time.perf_counter()
    links = probe_links(
        mesh,
        device=plan.device,
        time_limit=plan.time_limit,
        message_bytes=plan.message_bytes,
        pairwise=plan.pairwise,
    )
    seconds = time.perf_counter() - start
    if links is None:
        return Outcome(None, seconds, ())
    checks = [_check(EXCHANGES[name], plan, links, mesh) for name in plan.exchanges]
    return Outcome(links, seconds, tuple(checks))


def _check(exchange: Exchange, plan: Plan, links: Links, mesh: Mesh) -> Check:
    workload = Workload.of_size(plan.nodes, mesh.ranks_per_node, plan.elements)
    device = torch.device(plan.device)
    generator = torch.Generator().manual_seed(mesh.rank)
    gradients = [torch.randn(workload.side**2, generator=generator).to(device) for _ in range(MATRICES)]
    model = nn.ParameterList(nn.Parameter(torch.zeros(workload.side, workload.side)) for _ in range(MATRICES))
    costs = CodingCosts()
    if exchange.ours:
        dist.barrier()  # all ranks measure at the same time, as they will work at the same time
        costs = agree_on_costs(coding_costs(exchange.compression, device), device=device)
        predicted = predict_exchange(
            [[parameter] for parameter in model.named_parameters()],
            links,
            compression=exchange.compression,
            hierarchical=exchange.hierarchical,
            costs=costs,
            device=device,
        )
        communicator = GradientCommunicator(
            model, mesh, compression=exchange.compression, hierarchical=exchange.hierarchical, device=device
        )
        try:
            seconds = _time(lambda: _exchange(communicator, list(model), gradients), plan.steps, device)
            stats = communicator.stats()
        finally:
            communicator.close()
        sent = torch.tensor([0.0] * mesh.num_nodes, dtype=torch.float64, device=device)
        sent[mesh.node] = stats["inter_node_bytes"] / stats["steps"]
        dist.all_reduce(sent)
        return Check(exchange.name, predicted, costs, *seconds, inter_node_bytes=float(sent.max()))
    rings = [ring(gradient.nbytes, links) for gradient in gradients]
    predicted = Prediction(
        seconds=sum(one.seconds for one in rings),
        inter_node_bytes=sum(one.inter_node_bytes for one in rings),
        intra_node_bytes=sum(one.intra_node_bytes for one in rings),
        coding_seconds=0.0,
        steps=sum(one.steps for one in rings),
    )
    return Check(exchange.name, predicted, costs, *_time(lambda: _reduce(gradients), plan.steps, device), None)


def _exchange(
    communicator: GradientCommunicator, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]
) -> None:
    """Hand all buckets over as DistributedDataParallel does, and wait for their means."""
    last = len(gradients) - 1
    buckets = [
        _Bucket(gradient, [parameter], index, index == last)
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True))
    ]
    futures = [communicator.hook(communicator, cast(GradBucket, bucket)) for bucket in buckets]
    for future in futures:
        future.wait()


def _reduce(gradients: Sequence[Tensor]) -> None:
    """As DistributedDataParallel does it by itself."""
    works = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
    for work in works:
        work.wait()
    for gradient in gradients:
        gradient.div_(dist.get_world_size())


def _time(operation: Callable[[], None], steps: int, device: torch.device) -> tuple[float, float]:
    """Median and shortest time on the slowest rank."""
    seconds = []
    for _ in range(WARMUP_STEPS + steps):
        dist.barrier()
        start = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds[WARMUP_STEPS:], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist()), float(slowest.min())


@dataclass(frozen=True)
class _Bucket:
    """What a communication hook asks a bucket of gradients for."""

    values: Tensor
    of: list[nn.Parameter]
    number: int
    last: bool

    def buffer(self) -> Tensor:
        return self.values

    def parameters(self) -> list[nn.Parameter]:
        return self.of

    def index(self) -> int:
        return self.number

    def is_last(self) -> bool:
        return self.last


def check_to_json(check: Check) -> dict[str, Any]:
    """All there is to keep of a check, as JSON can hold it."""
    return {**asdict(check), "error": check.error}
