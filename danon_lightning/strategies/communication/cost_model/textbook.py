"""Time and traffic of the classic all-reduce algorithms, and which of them suits a message.

Legend: b bytes, M nodes × L ranks, N = M·L; α and β of each level as in :class:`Link`, so that each rank of a node has
β/L while all send. Arithmetic is left out: it is much the same for all, n(N−1) additions.

Rings and trees are laid through the nodes one after another, so that one of their links leaves each node. What goes on
inside nodes and between them at the same time counts once, as the slower of the two.

Reference:
    Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1), 2005;
    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69(2), 2009.
"""

import math
import warnings
from collections.abc import Callable

from danon_lightning.strategies.communication.cost_model.links import Link, Links
from danon_lightning.strategies.communication.cost_model.prediction import Prediction

# Needs no knowledge of the links to be within a factor of two of the best for large messages on equal ones.
SAFE_ALGORITHM = "ring"


def ring(num_bytes: float, links: Links) -> Prediction:
    """Reduce-scatter, then all-gather, round a ring of all ranks (Patarasuk and Yuan).

    With all ranks alike, T = 2(N−1)·α + 2·b·(N−1)/N / β.
    """
    steps = 2 * (links.world_size - 1)
    over_each_link = steps * num_bytes / links.world_size
    # Of the L links that begin in a node one leaves it; all stay inside if there is only one node.
    leaving = over_each_link if links.nodes > 1 else 0.0
    inside = over_each_link * (links.ranks_per_node - (links.nodes > 1))
    within = _seconds(links.intra, inside, steps) if links.ranks_per_node > 1 else 0.0
    seconds = max(within, _seconds(links.inter, leaving, steps))
    return Prediction(seconds, leaving, inside, 0.0, steps, seconds)


def halving_doubling(num_bytes: float, links: Links) -> Prediction:
    """Recursive halving, then doubling, first among the ranks of a node (Thakur et al., after Rabenseifner).

    With all ranks alike, T = 2·log₂N·α + 2·b·(N−1)/N / β where N is a power of two. Otherwise as many as the next lower
    power of two, P, do that, and each of the rest hands one of them its message and fetches the result: 2(α + b/β)
    more, with (P−1)/P. Where neither M nor L is such a power the steps do not follow nodes: all ranks of a node then
    send to other ones at once.
    """
    local, nodes = links.ranks_per_node, links.nodes
    if _is_power_of_two(local) and _is_power_of_two(nodes):
        # A rank sends b(1 − 1/L) inside, and of what is left for it to sum, b/L, a part of 1 − 1/M to others; twice.
        inside, leaving = 2 * num_bytes * (local - 1), 2 * num_bytes * (1 - 1 / nodes)
        inner_steps, outer_steps = 2 * int(math.log2(local)), 2 * int(math.log2(nodes))
        seconds = _seconds(links.intra, inside, inner_steps) + _seconds(links.inter, leaving, outer_steps)
        return Prediction(seconds, leaving, inside, 0.0, inner_steps + outer_steps, seconds)
    powers = 1 << (links.world_size.bit_length() - 1)
    has_rest = powers < links.world_size
    steps = 2 * int(math.log2(powers)) + 2 * has_rest
    by_rank = 2 * num_bytes * (1 - 1 / powers) + 2 * num_bytes * has_rest
    link = links.inter if nodes > 1 else links.intra
    # One of those that take part sends the message on once; one of the rest only sends it, and waits.
    sent = local * (2 * num_bytes * (1 - 1 / powers) + num_bytes * has_rest)
    seconds = _seconds(link, local * by_rank, steps)
    return Prediction(seconds, sent if nodes > 1 else 0.0, 0.0 if nodes > 1 else sent, 0.0, steps, seconds)


def pipelined_tree(num_bytes: float, links: Links) -> Prediction:
    """Reduce up a binary tree and broadcast down again in small segments, two trees at once (Sanders et al.).

    With all ranks alike, T = 2·log₂N·α + 2·b/β, which fine segments approach from above: the latency of each segment is
    left out. With several nodes there is a tree between them, of one rank each, and one inside each.

    Reference:
        Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel
        Computing 35(12), 2009.
    """
    local, nodes = links.ranks_per_node, links.nodes
    inner_steps, outer_steps = 2 * math.ceil(math.log2(local)), 2 * math.ceil(math.log2(nodes))
    latency = _seconds(links.intra, 0, inner_steps) + _seconds(links.inter, 0, outer_steps)
    leaving = 2 * num_bytes if nodes > 1 else 0.0
    # The busiest ranks send 2·b with their share of the bandwidth.
    busiest = 2 * num_bytes * local if local > 1 else 0.0
    seconds = latency + max(_seconds(links.intra, busiest, 0), _seconds(links.inter, leaving, 0))
    return Prediction(seconds, leaving, 2 * num_bytes * (local - 1), 0.0, inner_steps + outer_steps, seconds)


def hierarchical(num_bytes: float, links: Links) -> Prediction:
    """Reduce-scatter inside each node, all-reduce of each rank's part between nodes, all-gather inside.

    T = 2(L−1)·α + 2·b·(L−1) / β inside, and between nodes what L rings of b/L side by side take, or halving and
    doubling if that is faster and M a power of two. A node sends 2·b·(M−1)/M to others, as little as is possible.
    """
    local, nodes = links.ranks_per_node, links.nodes
    inside, leaving = 2 * num_bytes * (local - 1), 2 * num_bytes * (1 - 1 / nodes)
    inner_steps, outer_steps = 2 * (local - 1), 2 * (nodes - 1)
    if _is_power_of_two(nodes):
        outer_steps = 2 * int(math.log2(nodes))
    seconds = _seconds(links.intra, inside, inner_steps) + _seconds(links.inter, leaving, outer_steps)
    return Prediction(seconds, leaving, inside, 0.0, inner_steps + outer_steps, seconds)


ALL_REDUCE: dict[str, Callable[[float, Links], Prediction]] = {
    "ring": ring,
    "halving_doubling": halving_doubling,
    "pipelined_tree": pipelined_tree,
    "hierarchical": hierarchical,
}


def best_all_reduce(num_bytes: float, links: Links | None) -> str:
    """The algorithm of :data:`ALL_REDUCE` that takes the least time.

    Args:
        num_bytes: Size of the message, not negative.
        links: What is known about the links; None if nothing is (a failed probe, say): the safe choice then, the ring,
            with a warning.

    Raises:
        ValueError: If ``num_bytes`` is negative.
    """
    if num_bytes < 0:
        raise ValueError(f"num_bytes={num_bytes} must not be negative")
    if links is None:
        warnings.warn("nothing is known about the links: all-reduce by ring, the safe choice", stacklevel=2)
        return SAFE_ALGORITHM
    known = links
    return min(ALL_REDUCE, key=lambda name: ALL_REDUCE[name](num_bytes, known).seconds)


def _seconds(link: Link | None, num_bytes: float, steps: float) -> float:
    return 0.0 if link is None else link.seconds(num_bytes, steps)


def _is_power_of_two(value: int) -> bool:
    return value & (value - 1) == 0
