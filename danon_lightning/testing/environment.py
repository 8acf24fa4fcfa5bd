"""The environment variables by which a rank learns its place."""

import os
import sys

from danon_lightning.testing.emulated_hosts import EmulatedHosts

LOOPBACK_ADDRESS = "127.0.0.1"
LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"

# What an outer launcher may have set; inherited, it would contradict what is set here.
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "SLURM_", "PET_")
_LAUNCHER_NAMES = frozenset(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE ROLE_NAME "
    "NODE_RANK MASTER_ADDR MASTER_PORT".split()
)


def is_of_launcher(name: str) -> bool:
    """Tells whether launchers set such a variable."""
    return name in _LAUNCHER_NAMES or name.startswith(_LAUNCHER_PREFIXES)


def base_environment(hosts: EmulatedHosts | None) -> dict[str, str]:
    """Returns this process's environment without an outer launcher's variables, and with the network to use.

    Args:
        hosts: The hosts to run on; None for loopback.
    """
    environment = {name: value for name, value in os.environ.items() if not is_of_launcher(name)}
    # Left to itself gloo looks up the host name, which emulated hosts share and laptops often cannot resolve.
    environment["GLOO_SOCKET_IFNAME"] = LOOPBACK_INTERFACE if hosts is None else hosts.interface
    # Many ranks share few cores.
    environment["OMP_NUM_THREADS"] = "1"
    return environment


def rank_environment(
    rank: int, *, nodes: int, ranks_per_node: int, master_address: str, master_port: int
) -> dict[str, str]:
    """Returns the variables that torchrun would set for this rank, and Lightning's NODE_RANK."""
    node, local_rank = divmod(rank, ranks_per_node)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(nodes * ranks_per_node),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "GROUP_RANK": str(node),
        "GROUP_WORLD_SIZE": str(nodes),
        "NODE_RANK": str(node),
        "MASTER_ADDR": master_address,
        "MASTER_PORT": str(master_port),
    }


def check_shape(nodes: int, ranks_per_node: int, hosts: EmulatedHosts | None) -> None:
    """Raises ValueError if so many ranks cannot be placed on the given hosts."""
    if nodes < 1 or ranks_per_node < 1:
        raise ValueError(f"there must be at least one node with one rank, got {nodes} nodes x {ranks_per_node} ranks")
    if hosts is not None and nodes > hosts.count:
        raise ValueError(f"{nodes} nodes need as many hosts, but there are {hosts.count}")
