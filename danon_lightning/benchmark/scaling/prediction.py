"""What a step takes, by the cost model: computing, and what of the exchange is not hidden behind it."""

from dataclasses import dataclass, replace

from danon_lightning.benchmark.scaling.exchanges import DDP, compression_of
from danon_lightning.benchmark.scaling.workload import Workload
from danon_lightning.strategies.communication.cost_model import CodingCosts, Links, predict_exchange
from danon_lightning.strategies.communication.cost_model.textbook import ring


@dataclass(frozen=True)
class StepPrediction:
    """One step.

    Attributes:
        seconds: Of the whole step.
        exposed_seconds: Of these, from the last gradient to the last mean.
        inter_node_bytes: What leaves the host that sends most.
    """

    seconds: float
    exposed_seconds: float
    inter_node_bytes: float


def predict_step(
    exchange: str, workload: Workload, compute_seconds: float, links: Links | None, costs: CodingCosts
) -> StepPrediction:
    """What a step takes with an exchange.

    Plain DistributedDataParallel is taken to all-reduce its buckets by ring, one after another as they become ready.

    Args:
        exchange: Its name.
        workload: The gradients.
        compute_seconds: Forward and backward pass on one host, as measured.
        links: The cluster; None for a single host, which exchanges nothing.
        costs: What coding and copying take.
    """
    if links is None or links.world_size == 1:
        return StepPrediction(compute_seconds, 0.0, 0.0)
    buckets, ready = workload.buckets(), workload.ready_seconds(compute_seconds)
    if exchange == DDP:
        rings = [ring(sum(4 * matrix.numel() for _, matrix in bucket), links) for bucket in buckets]
        now = 0.0
        for moment, one in zip(ready, rings, strict=True):
            now = max(now, moment) + one.seconds
        exposed, leaving = now - ready[-1], sum(one.inter_node_bytes for one in rings)
    else:
        found = predict_exchange(buckets, links, compression=compression_of(exchange), costs=costs, ready=ready)
        exposed, leaving = found.exposed_seconds, found.inter_node_bytes
    return StepPrediction(compute_seconds + exposed, exposed, leaving)


def with_hosts(links: Links, hosts: int) -> Links:
    """The same links in a cluster of another size."""
    return replace(links, nodes=hosts, pairwise=None)
