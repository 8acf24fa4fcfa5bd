"""Calls one function on several ranks, so that the body of a distributed test reads like one rank."""

import inspect
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from danon_lightning.testing.emulated_hosts import EmulatedHosts
from danon_lightning.testing.environment import LOOPBACK_ADDRESS, base_environment, check_shape, rank_environment
from danon_lightning.testing.forking import fork_server
from danon_lightning.testing.ports import reserved_port
from danon_lightning.testing.processes import ProcessSet

_RANK_MAIN = Path(__file__).with_name("rank_main.py")
# The other ranks may go on so long after the first failure, to report what they noticed of it.
_FAILURE_GRACE_SECONDS = 0.5
# From a rank's own dump of where it hangs, at the deadline, to its end.
_DUMP_SECONDS = 0.5
# A collective gives up so long after the deadline: where all ranks hang must be found before one of them raises.
_COLLECTIVE_GRACE_SECONDS = 10.0

_Result = TypeVar("_Result")


class RankFailedError(RuntimeError):
    """A rank raised or died.

    Attributes:
        rank: The first rank that did.
        rank_traceback: Its traceback; empty if it died without one, say by a signal.
    """

    def __init__(self, rank: int, rank_traceback: str, message: str) -> None:
        """Creates the error.

        Args:
            rank: See the attribute.
            rank_traceback: See the attribute.
            message: All that is known of all failed ranks.
        """
        super().__init__(message)
        self.rank = rank
        self.rank_traceback = rank_traceback


def run_distributed(
    function: Callable[..., _Result],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    ranks_per_node: int | None = None,
    hosts: EmulatedHosts | None = None,
    env: Mapping[str, str] | None = None,
) -> list[_Result]:
    """Calls ``function(*args)`` in `world_size` fresh processes that share an initialised gloo process group.

        def average(value):
            tensor = torch.tensor(value * dist.get_rank())
            dist.all_reduce(tensor)
            return tensor.item() / dist.get_world_size()

        def test_average():
            assert run_distributed(average, 2, 3.0) == [1.5, 1.5]

    The function must be at module level, in a test module, a script or anything importable: each process loads that
    module anew, by name or from its file, with all that it imports. Only what takes long to import and does not change,
    such as torch, Lightning and this package, is there already: on Linux, unless there are `hosts`, the processes are
    forked from a server (``fork_server.py``) that the first call starts and that ends with this process. Test modules
    need no ``__init__.py`` and may share file names; code of a ``conftest.py`` is not run. The environment variables
    are those of torchrun (and Lightning's NODE_RANK), so that a Lightning ``Trainer(devices=ranks_per_node,
    num_nodes=...)`` finds its place; MASTER_PORT is free. Arguments and results are pickled, tensors by value. What the
    ranks print to stdout is printed here once all have returned.

    Args:
        function: What to call on each rank.
        world_size: Number of ranks.
        *args: Arguments, the same for every rank.
        timeout: Seconds until all must have returned, the start of the processes (not of the server) included.
        ranks_per_node: Simulates ``world_size / ranks_per_node`` nodes in LOCAL_RANK, LOCAL_WORLD_SIZE and GROUP_RANK;
            by default one node, or an equal share for each of `hosts`.
        hosts: Emulated hosts to run on, one for each node; by default everything runs on loopback.
        env: Further environment variables.

    Returns:
        What the function returned, by rank.

    Raises:
        RankFailedError: A rank raised or died; the others have been killed.
        TimeoutError: The time was up; the message says where each remaining rank was.
        ValueError: The function is not at module level, or the ranks cannot be divided as asked.
    """
    module, file = _source_of(function)
    if ranks_per_node is None:
        ranks_per_node = world_size if hosts is None else world_size // hosts.count
    nodes = world_size // max(ranks_per_node, 1)
    check_shape(nodes, ranks_per_node, hosts)
    if nodes * ranks_per_node != world_size:
        raise ValueError(f"{world_size} ranks cannot be divided into nodes of {ranks_per_node}")

    environment = {**base_environment(hosts), **(env or {})}
    # Forks would be on this host. On emulated ones a prefix to the command puts processes there.
    server = fork_server(environment) if hosts is None else None
    with ProcessSet() as ranks, reserved_port(() if hosts is None else hosts.command_prefix(0)) as port:
        job = {
            "module": module,
            "file": file,
            "qualname": function.__qualname__,
            "args": pickle.dumps(args),
            "folder": str(ranks.directory),
            "store": str(ranks.directory / "store"),
            "sys_path": [os.path.abspath(entry) for entry in sys.path],
            "collective_timeout": timeout + _COLLECTIVE_GRACE_SECONDS,
            "deadline": time.monotonic() + timeout,
        }
        job_file = ranks.directory / "job"
        job_file.write_bytes(pickle.dumps(job))
        for rank in range(world_size):
            place = rank_environment(
                rank,
                nodes=nodes,
                ranks_per_node=ranks_per_node,
                master_address=LOOPBACK_ADDRESS if hosts is None else hosts.address(0),
                master_port=port,
            )
            prefix = [] if hosts is None else hosts.command_prefix(rank // ranks_per_node)
            ranks.start(
                [*prefix, sys.executable, str(_RANK_MAIN), str(job_file)],
                env={**environment, **place, **(env or {})},
                name=str(rank),
                server=server,
            )
        timed_out = ranks.wait(timeout + _DUMP_SECONDS, failure_grace=_FAILURE_GRACE_SECONDS)
        _raise_failure(ranks, timed_out, timeout)
        for rank, process in enumerate(ranks.processes):
            for line in process.stdout.splitlines():
                print(f"[rank {rank}] {line}")
        return [pickle.loads((ranks.directory / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _source_of(function: Callable[..., Any]) -> tuple[str, str]:
    """Returns the name and the file of the module in which other processes find the function."""
    qualname = getattr(function, "__qualname__", None)
    if qualname is None or "<" in qualname:
        raise ValueError(f"{qualname or function!r} is not at module level, so other processes cannot import it")
    module = inspect.getmodule(function)
    if module is None or getattr(module, "__file__", None) is None:
        raise ValueError(f"{qualname} is not defined in a file, so other processes cannot import it")
    if module.__name__ == "__main__":
        # Results of a class of this script come back under the name that the script has in the ranks.
        sys.modules["__mp_main__"] = module
    return module.__name__, os.path.abspath(str(module.__file__))


def _raise_failure(ranks: ProcessSet, timed_out: bool, timeout: float) -> None:
    codes = [process.returncode for process in ranks.processes]
    reports: dict[int, dict[str, Any]] = {}
    for rank in range(len(codes)):
        path = ranks.directory / f"{rank}.error"
        if path.exists():
            reports[rank] = pickle.loads(path.read_bytes())
    # A rank that died without a word is the cause of what the others report; else the cause was reported first.
    died = [
        rank
        for rank, code in enumerate(codes)
        if code is not None
        and rank not in reports
        and not (code == 0 and (ranks.directory / f"{rank}.result").exists())
    ]
    reported = sorted(reports, key=lambda rank: reports[rank]["time"])
    failed = [*died, *reported]
    if failed:
        texts = []
        for rank in failed:
            code = codes[rank]
            end = f"died by signal {-code}" if code is not None and code < 0 else f"ended early with exit code {code}"
            texts.append(f"rank {rank} " + (f"raised\n{reports[rank]['traceback']}" if rank in reports else end))
            texts += [text for text in (ranks.processes[rank].stdout, ranks.processes[rank].stderr) if text.strip()]
        first = failed[0]
        raise RankFailedError(first, reports[first]["traceback"] if first in reports else "", "\n".join(texts))
    if timed_out:
        texts = [f"not all ranks returned within {timeout:g} s"]
        for rank, code in enumerate(codes):
            stacks = ranks.directory / f"{rank}.stacks"
            if code is None:
                texts.append(f"rank {rank} was at\n{stacks.read_text() if stacks.exists() else 'its start'}")
        raise TimeoutError("\n".join(texts))
