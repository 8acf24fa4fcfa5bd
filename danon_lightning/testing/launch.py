"""Runs programs as the ranks of a distributed job on one machine, and collects how each of them ended."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from danon_lightning.testing.emulated_hosts import EmulatedHosts
from danon_lightning.testing.environment import LOOPBACK_ADDRESS, base_environment, check_shape, rank_environment
from danon_lightning.testing.ports import reserved_port
from danon_lightning.testing.processes import ProcessResult, ProcessSet

_DEFAULT_TIMEOUT_SECONDS = 120.0
# After a failure, so long others may go on to report what they noticed of it.
_RANK_GRACE_SECONDS = 1.0
# An agent notices a failure elsewhere with its next heartbeat, and then stops its own ranks.
_AGENT_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class RankResult(ProcessResult):
    """How one rank ended.

    Attributes:
        rank: Its global rank.
    """

    rank: int

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return f"rank {self.rank}"


def launch_ranks(
    command: Sequence[str] | Callable[[int], Sequence[str]],
    *,
    nodes: int = 1,
    ranks_per_node: int = 1,
    hosts: EmulatedHosts | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = _DEFAULT_TIMEOUT_SECONDS,
    failure_grace: float | None = _RANK_GRACE_SECONDS,
    log_directory: Path | str | None = None,
) -> list[RankResult]:
    """Runs one process a rank and waits for all of them.

    Each process gets the variables for ``init_method="env://"`` (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), its place
    (LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, NODE_RANK), GLOO_SOCKET_IFNAME and OMP_NUM_THREADS=1. No process that a
    rank starts outlives this call, nor this process.

    Args:
        command: Program and arguments; or a function from the rank to them.
        nodes: Number of nodes.
        ranks_per_node: Number of ranks on each.
        hosts: Emulated hosts to run on, one for each node; by default everything runs on loopback.
        env: Further environment variables, which take precedence.
        timeout: Seconds after which those that still run are killed.
        failure_grace: Seconds after the first failure at which the others are killed; None lets them run on.
        log_directory: A folder where their outputs, ``rank-0.out`` and so on, are kept; by default they are kept only
            in the results.

    Returns:
        How each rank ended, by rank.

    Raises:
        ValueError: There are fewer hosts than nodes, or no ranks at all.
    """
    check_shape(nodes, ranks_per_node, hosts)
    with ProcessSet(log_directory) as ranks, _meeting_point(hosts) as (address, port):
        for rank in range(nodes * ranks_per_node):
            place = rank_environment(
                rank, nodes=nodes, ranks_per_node=ranks_per_node, master_address=address, master_port=port
            )
            arguments = command(rank) if callable(command) else command
            ranks.start(
                [*_prefix(hosts, rank // ranks_per_node), *arguments],
                env={**base_environment(hosts), **place, **(env or {})},
                name=f"rank-{rank}",
            )
        timed_out = ranks.wait(timeout, failure_grace=failure_grace)
        return [
            RankResult(**vars(ranks.result(rank, node=rank // ranks_per_node, timed_out=timed_out)), rank=rank)
            for rank in range(nodes * ranks_per_node)
        ]


def torchrun(
    command_args: Sequence[str],
    *,
    nodes: int,
    ranks_per_node: int,
    hosts: EmulatedHosts | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = _DEFAULT_TIMEOUT_SECONDS,
    max_restarts: int = 0,
    failure_grace: float | None = _AGENT_GRACE_SECONDS,
    log_directory: Path | str | None = None,
) -> list[ProcessResult]:
    """Runs one torchrun agent a node, as on a cluster, and waits for all of them.

    The agents meet by the c10d rendezvous, whose store is on node 0. On emulated hosts torchrun numbers the nodes in
    the order of the hosts; without, in the order of the agents' process ids.

    Args:
        command_args: What follows torchrun's options: a script or ``-m`` and a module, then its arguments.
        nodes: Number of agents.
        ranks_per_node: Number of ranks that each of them starts.
        hosts: Emulated hosts to run on, one for each node; by default all agents share this machine's loopback.
        env: Further environment variables, which take precedence.
        timeout: Seconds after which agents that still run are killed, with their ranks.
        max_restarts: How often torchrun may start all ranks anew after a failure.
        failure_grace: Seconds after the first agent's failure at which the others are killed; None lets them run on.
        log_directory: A folder where their outputs, ``node-0.out`` and so on, are kept; by default they are kept only
            in the results.

    Returns:
        How each agent ended, by node. The outputs of its ranks are among its own.

    Raises:
        ValueError: There are fewer hosts than nodes, or no ranks at all.
    """
    check_shape(nodes, ranks_per_node, hosts)
    with ProcessSet(log_directory) as agents, _meeting_point(hosts) as (address, port):
        for node in range(nodes):
            options = [
                f"--nnodes={nodes}",
                f"--nproc-per-node={ranks_per_node}",
                f"--max-restarts={max_restarts}",
                f"--rdzv-id=danon-{port}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={address}:{port}",
                # torchrun would look for its own host name's address, which an emulated host does not have.
                f"--rdzv-conf=is_host={'true' if node == 0 else 'false'}",
                f"--local-addr={address if hosts is None else hosts.address(node)}",
            ]
            agents.start(
                [*_prefix(hosts, node), sys.executable, "-m", "torch.distributed.run", *options, *command_args],
                env={**base_environment(hosts), **(env or {})},
                name=f"node-{node}",
            )
        timed_out = agents.wait(timeout, failure_grace=failure_grace)
        return [agents.result(node, node=node, timed_out=timed_out) for node in range(nodes)]


@contextmanager
def _meeting_point(hosts: EmulatedHosts | None) -> Iterator[tuple[str, int]]:
    """Yields an address and a port of node 0 for the store."""
    with reserved_port(_prefix(hosts, 0)) as port:
        yield (LOOPBACK_ADDRESS if hosts is None else hosts.address(0)), port


def _prefix(hosts: EmulatedHosts | None, node: int) -> list[str]:
    return [] if hosts is None else hosts.command_prefix(node)
