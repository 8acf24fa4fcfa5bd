"""Which ranks exchange with which: the levels of an exchange on a given cluster."""

import hashlib
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from danon_lightning.strategies.communication import shared_memory
from danon_lightning.strategies.communication.levels import GroupLevel, Level
from danon_lightning.strategies.communication.stats import CommunicationStats
from danon_lightning.strategies.mesh import Mesh
from danon_lightning.strategies.process_groups import own_group

# By which launchers number the nodes: torchrun, SLURM, Lightning.
_NODE_VARIABLES = ("GROUP_RANK", "SLURM_NODEID", "NODE_RANK")


def check_hierarchical(hierarchical: object) -> None:
    """Raise a ValueError unless ``hierarchical`` is True, False or "auto"."""
    if hierarchical not in (True, False, "auto"):
        raise ValueError(f"hierarchical={hierarchical!r} must be True, False or 'auto'")


def uses_two_levels(mesh: Mesh, hierarchical: bool | Literal["auto"]) -> bool:
    """Whether nodes are summed inside first on this mesh.

    Args:
        mesh: Layout of the ranks.
        hierarchical: True for two levels, False for one, "auto" for two wherever there are several nodes with several
            ranks each.

    Raises:
        ValueError: If ``hierarchical`` is none of the three, or is True on a mesh that has only one level.
    """
    possible = 1 < mesh.replicas_per_node < mesh.data_parallel_size
    check_hierarchical(hierarchical)
    if hierarchical is True and not possible:
        raise ValueError(
            f"hierarchical=True needs several nodes with several replicas each, but this job has {mesh}: "
            "use hierarchical='auto' or False"
        )
    return possible and bool(hierarchical)


def node_identity() -> int:
    """A number that ranks of one node share and others, as far as one can tell, do not."""
    for name in _NODE_VARIABLES:
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return int.from_bytes(hashlib.blake2b(socket.gethostname().encode(), digest_size=7).digest(), "little")


def check_placement(mesh: Mesh, identities: Sequence[int]) -> None:
    """Raise a ValueError if ranks are not numbered node by node.

    Args:
        mesh: Layout of the ranks as the job was told.
        identities: The :func:`node_identity` of each rank.
    """
    if len(set(identities)) == 1:
        return  # one machine, or several that call themselves the same
    for rank, identity in enumerate(identities):
        first = mesh.ranks_of_node(mesh.node_of(rank))[0]
        if identity != identities[first]:
            raise ValueError(
                f"ranks {first} and {rank} are taken to be on the same node ({mesh}), but they run on different ones: "
                "the ranks are placed in turns (cyclically), and every exchange would cross the network needlessly. "
                "Number them node by node (SLURM: --distribution=block; mpirun: --map-by slot)"
            )


def group_of_all(mesh: Mesh, device: torch.device, timeout: timedelta | None) -> dist.ProcessGroup | None:
    """Create a group of all ranks, and see whether they are placed as ``mesh`` says. Collective.

    Returns:
        The group; None for a single rank.

    Raises:
        ValueError: See :func:`check_placement`.
    """
    if mesh.world_size == 1:
        return None
    group = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    mine = torch.tensor([node_identity()], dtype=torch.int64, device=device)
    identities = [torch.empty_like(mine) for _ in range(mesh.world_size)]
    dist.all_gather(identities, mine, group=group)
    check_placement(mesh, [int(identity) for identity in identities])
    return group


def build_levels(
    mesh: Mesh,
    hierarchical: bool | Literal["auto"],
    *,
    compressed: bool,
    row_bytes: int,
    device: torch.device,
    timeout: timedelta | None,
    stats: CommunicationStats,
) -> tuple[Level, GroupLevel]:
    """Create the private process groups of an exchange. Collective: every rank must call it at the same point.

    Private groups keep the exchange apart from whatever else the job communicates, and in an order of its own. Ranks of
    one node share memory where they can (CPU only).

    Args:
        mesh: Layout of the ranks.
        hierarchical: See :func:`uses_two_levels`, which raises what this raises.
        compressed: Whether what is not inside a node is compressed. Where all replicas are on one node, it
            decides whether ranks exchange codes (to see what compression does) or dense values.
        row_bytes: Largest row of the inner level.
        device: Where gradients lie: decides between nccl and gloo.
        timeout: How long an operation may take before the job is given up; None for torch's default.
        stats: Where to count the bytes.

    Returns:
        The inner and the outer level.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    two_levels = uses_two_levels(mesh, hierarchical)

    def level(groups: list[list[int]]) -> GroupLevel:
        ranks, group = own_group(groups, mesh.rank, backend, timeout)
        remote = [mesh.node_of(rank) != mesh.node for rank in ranks]
        return GroupLevel(ranks, ranks.index(mesh.rank), remote, group, device, stats)

    alike = mesh.groups_of_replicas()
    alone = [[rank] for rank in range(mesh.world_size)]
    if two_levels:
        inner, outer = level(mesh.groups_inside_nodes()), level(mesh.groups_across_nodes())
    elif mesh.replicas_per_node == mesh.data_parallel_size and not compressed:
        inner, outer = level(alike), level(alone)
    else:
        return level(alone), level(alike)
    if device.type == "cuda" or inner.group is None:
        return inner, outer
    shared = shared_memory.connect(
        inner.ranks, inner.index, inner.group, row_bytes=row_bytes, timeout=timeout, stats=stats
    )
    if shared is None:
        return inner, outer
    inner.close()
    return shared, outer
