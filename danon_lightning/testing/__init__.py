"""Several nodes on one machine: emulated hosts, and launchers that leave no process behind.

For tests, benchmarks and whoever wants to try a distributed run before there is a cluster. The launchers run on Linux
and macOS, emulated hosts only on Linux. Nothing here needs the rest of the package; only the server that ranks are
forked from imports it, because most of them do.
"""

from danon_lightning.testing.distributed import RankFailedError, run_distributed
from danon_lightning.testing.emulated_hosts import EmulatedHosts
from danon_lightning.testing.launch import RankResult, launch_ranks, torchrun
from danon_lightning.testing.ports import reserved_port
from danon_lightning.testing.processes import ProcessResult

__all__ = [
    "EmulatedHosts",
    "ProcessResult",
    "RankFailedError",
    "RankResult",
    "launch_ranks",
    "reserved_port",
    "run_distributed",
    "torchrun",
]
