"""Starts one job and sees it to its end."""

from danon_lightning.benchmark.scaling.job import PROBE_SECONDS, WARMUP_STEPS, Outcome, Plan, measure
from danon_lightning.testing import EmulatedHosts, RankFailedError, run_distributed

# Importing torch and Lightning on all ranks at once takes its time on few cores.
_START_SECONDS = 300.0
# A step may take so long on a busy machine, beside its computing, and so many times what the wire needs.
_LEAST_STEP_LIMIT = 30.0
_SLACK = 4.0
_ASSUMED_UNSHAPED_MBIT = 1000.0


class JobFailedError(RuntimeError):
    """A job has come to no result.

    Attributes:
        detail: All that is known: tracebacks, or where ranks hung.
    """

    def __init__(self, message: str, detail: str) -> None:
        """Creates the error.

        Args:
            message: What happened, in one line.
            detail: See the attribute.
        """
        super().__init__(message)
        self.detail = detail


def time_limit(plan: Plan, hosts: int, mbit: float | None) -> float:
    """Seconds that no job takes which does not hang."""
    # A gathered code, in the worst case, goes to each of the others as it is.
    wire = 8 * plan.workload.num_bytes * max(2, hosts - 1) / (1e6 * (mbit or _ASSUMED_UNSHAPED_MBIT))
    step = _LEAST_STEP_LIMIT + plan.workload.compute_seconds + _SLACK * wire
    return _START_SECONDS + 10 * PROBE_SECONDS + len(plan.exchanges) * (WARMUP_STEPS + plan.steps) * step


def run_job(plan: Plan, hosts: int, mbit: float | None, network: EmulatedHosts | None) -> Outcome:
    """Run a job to its end; no process of it is left then.

    Args:
        plan: What to do.
        hosts: Number of hosts, a rank on each.
        mbit: Rate of their links, which tells how long it may take; None for unshaped.
        network: At least as many emulated hosts; None for loopback.

    Raises:
        JobFailedError: If a rank failed, or the job hung.
    """
    limit = time_limit(plan, hosts, mbit)
    try:
        return run_distributed(measure, hosts, plan, timeout=limit, ranks_per_node=1, hosts=network)[0]
    except RankFailedError as error:
        lines = [line for line in error.rank_traceback.strip().splitlines() if line.strip()]
        raise JobFailedError(f"rank {error.rank} failed: {lines[-1] if lines else 'it died'}", str(error)) from error
    except TimeoutError as error:
        raise JobFailedError(f"hung: not all ranks returned within {limit:.0f} s", str(error)) from error
