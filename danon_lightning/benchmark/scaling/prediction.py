"""What a step takes, by the cost model: computing, and what of the exchange is not hidden behind it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from danon_lightning.benchmark.scaling.exchanges import DDP, compression_of
from danon_lightning.benchmark.scaling.workload import Workload
from danon_lightning.strategies.communication.cost_model import CodingCosts, Links, predict_exchange
from danon_lightning.strategies.communication.cost_model.textbook import ring

# Threads of torch's gloo process group, each of which works at one all-reduce.
_GLOO_THREADS = 2


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

    Plain DistributedDataParallel is taken to all-reduce its buckets by ring as they become ready, two at a time: they
    share the link, but the latency of one passes while the other sends.

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
        exposed = _last_mean(ready, [one.seconds for one in rings], ring(0, links).seconds) - ready[-1]
        leaving = sum(one.inter_node_bytes for one in rings)
    else:
        found = predict_exchange(buckets, links, compression=compression_of(exchange), costs=costs, ready=ready)
        exposed, leaving = found.exposed_seconds, found.inter_node_bytes
    return StepPrediction(compute_seconds + exposed, exposed, leaving)


def _last_mean(ready: Sequence[float], seconds: Sequence[float], latency: float) -> float:
    """When the last of several all-reduces ends that begin when they are ready and a thread is free for them.

    Args:
        ready: When each is ready.
        seconds: What each takes if it is alone.
        latency: The part of that which does not keep the link busy.
    """
    ended: list[float] = []
    link_is_free = 0.0
    for moment, alone in zip(ready, seconds, strict=True):
        begin = max(moment, ended[-_GLOO_THREADS] if len(ended) >= _GLOO_THREADS else 0.0)
        link_is_free = max(link_is_free, begin) + alone - latency
        ended.append(max(begin + alone, link_is_free))
    return max(ended)


def links_of(probed: Sequence[Links], hosts: int, exchange: str) -> Links:
    """The links of a cluster, as an exchange uses them.

    Links that were probed are taken as they were found; but in a ring a host sends to one other at a time, so that its
    link is that of the smallest cluster. Those of a cluster that was not probed are those of the smallest one, whose
    ranks wait least for one another's processors. Where a host sends to all others, each of these adds to latency and
    overhead what it adds to the overhead from one probe to the next: processor time, which waiting does not spoil.

    Args:
        probed: Of at least one number of hosts, with a rank each; of two for a cluster that is not among them.
        hosts: Number of hosts.
        exchange: Its name.
    """
    first = min(probed, key=lambda links: links.nodes)
    found = next((links for links in probed if links.nodes == hosts), first)
    assert first.inter is not None and found.inter is not None
    inter = found.inter
    if exchange == DDP:
        inter = first.inter
    elif found.nodes != hosts:
        more = (hosts - first.nodes) * _overhead_of_a_peer(probed)
        inter = replace(
            inter,
            latency_seconds=inter.latency_seconds + more,
            overhead_seconds=inter.overhead_seconds + more,
        )
    return replace(found, nodes=hosts, inter=inter, pairwise=None)


def _overhead_of_a_peer(probed: Sequence[Links]) -> float:
    """Seconds that each host more keeps a thread busy by: the slope of a line through all probes, at least 0."""
    points = [(links.nodes, links.inter.overhead_seconds) for links in probed if links.inter is not None]
    slope, _ = statistics.linear_regression(*zip(*points, strict=True))
    return max(0.0, slope)
