"""In which order a ring visits the nodes where links differ."""

import itertools
from collections.abc import Iterator, Sequence

from danon_lightning.strategies.communication.cost_model.links import check_bandwidths

# (n − 1)! orders: 5,040 for eight nodes.
_EXACT_UP_TO = 8
# Greedy rings that are improved.
_STARTS = 7


def slowest_link(order: Sequence[int], bandwidth: Sequence[Sequence[float]]) -> float:
    """The bandwidth of a ring: that of the slowest of its links, ``order[i]`` to ``order[i + 1]`` and last to first."""
    return min(bandwidth[a][b] for a, b in zip(order, [*order[1:], order[0]], strict=True))


def ring_order(bandwidth: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """The order of nodes in which the slowest link of the ring is as fast as can be (a bottleneck travelling salesman).

    Exact for up to eight nodes. Beyond, a ring is built greedily from several nodes and improved by reversing
    parts and moving nodes (2-opt and Or-opt) as long as that helps: at least as good as the given order, and usually
    the best, but not always.

    Args:
        bandwidth: ``bandwidth[i][j]`` from node i to node j, in any unit; the diagonal does not count. It need not be
            symmetric: data goes round in the returned direction.

    Returns:
        All nodes, node 0 first. Of equally good orders the one whose links are faster in sum, and then the first in
        lexicographic order where the search is exact.

    Raises:
        ValueError: If it is no square matrix of positive numbers.

    Reference:
        Croes, "A Method for Solving Traveling-Salesman Problems", Operations Research 6(6), 1958, for 2-opt.
    """
    matrix = tuple(tuple(float(value) for value in row) for row in bandwidth)
    check_bandwidths(matrix)
    nodes = range(len(matrix))
    if len(nodes) <= 2:
        return tuple(nodes)
    if len(nodes) <= _EXACT_UP_TO:
        orders = ((0, *rest) for rest in itertools.permutations(nodes[1:]))
        return max(orders, key=lambda order: _value(order, matrix))
    starts = [tuple(nodes), *(_greedy(start, matrix) for start in nodes[:_STARTS])]
    best = max((_improve(start, matrix) for start in starts), key=lambda order: _value(order, matrix))
    first = best.index(0)
    return best[first:] + best[:first]


def _value(order: Sequence[int], matrix: tuple[tuple[float, ...], ...]) -> tuple[float, float]:
    """What is maximised: the slowest link, and then the sum of all."""
    links = [matrix[a][b] for a, b in zip(order, [*order[1:], order[0]], strict=True)]
    return min(links), sum(links)


def _greedy(start: int, matrix: tuple[tuple[float, ...], ...]) -> tuple[int, ...]:
    """Always on to the node with the fastest link."""
    order, left = [start], set(range(len(matrix))) - {start}
    while left:
        here = order[-1]
        order.append(max(left, key=lambda node: (matrix[here][node], -node)))
        left.remove(order[-1])
    return tuple(order)


def _improve(order: tuple[int, ...], matrix: tuple[tuple[float, ...], ...]) -> tuple[int, ...]:
    """Take the first better neighbour until there is none."""
    value = _value(order, matrix)
    while True:
        for candidate in _neighbours(order):
            candidate_value = _value(candidate, matrix)
            if candidate_value > value:
                order, value = candidate, candidate_value
                break
        else:
            return order


def _neighbours(order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    size = len(order)
    for i, j in itertools.combinations(range(size + 1), 2):
        if j - i > 1:
            yield order[:i] + order[i:j][::-1] + order[j:]
    for at in range(size):
        rest = order[:at] + order[at + 1 :]
        for to in range(size):
            if to != at:
                yield rest[:to] + (order[at],) + rest[to:]
