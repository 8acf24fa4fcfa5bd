"""Bytes that leave a node in one exchange, as they follow from the algorithm.

n elements, M nodes of L ranks each, N = M·L ranks. A ring is laid through the nodes one after another, so that one of
its links leaves each node. Headers of the transport are not included (about 1 %).
"""

INT8_BLOCK = 256
INT4_BLOCK = 64
SIGN_BLOCK = 2048
DENSITY = 0.01
POWERSGD_RANK = 4


def flat_ring(elements: int, nodes: int, ranks_per_node: int, bytes_per_element: float) -> float:
    """All-reduce over all ranks alike: 2bn(N−1)/N, since each rank sends two times (N−1)/N of the message."""
    if nodes == 1:
        return 0.0
    ranks = nodes * ranks_per_node
    return 2 * bytes_per_element * elements * (ranks - 1) / ranks


def hierarchical(elements: int, nodes: int, bytes_per_element: float) -> float:
    """Sum inside each node, all-reduce the sums between nodes, each local rank its own part: 2bn(M−1)/M."""
    return 2 * bytes_per_element * elements * (nodes - 1) / nodes


def gathered_sparse(elements: int, nodes: int, density: float) -> float:
    """Each node sends k = density·n values with int32 indices to every other: 8k(M−1)."""
    return 8 * density * elements * (nodes - 1)


def low_rank_numel(rows: int, columns: int, matrices: int, rank: int) -> int:
    """Numbers in the two thin factors of all matrices, r·Σ(rows + columns), which are exchanged in place of these."""
    return rank * (rows + columns) * matrices
