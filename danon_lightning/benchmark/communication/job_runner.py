"""Starts one job, watches it, and finds out how far it came and what stopped it."""

import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danon_lightning.benchmark.communication.job import (
    SETUP_SECONDS,
    WARMUP_STEPS,
    Measurement,
    Plan,
    Progress,
    measure,
)
from danon_lightning.testing import EmulatedHosts, RankFailedError, run_distributed

# Importing torch and Lightning on all ranks at once takes its time on few cores.
_START_SECONDS = 300.0
_POLL_SECONDS = 0.2

# Called, from another thread, with where a job is.
Report = Callable[[Progress], None]


@dataclass(frozen=True)
class JobFailure:
    """What stopped a job.

    Attributes:
        status: Whether a rank failed by itself or had to be ended.
        message: One line: what happened, and in which step.
        detail: The traceback, or where the rank hung.
        started: Whether a variant was under way; otherwise none of them is to blame.
    """

    status: Literal["crashed", "hung"]
    message: str
    detail: str
    started: bool


def run_job(
    plan: Plan, hosts: EmulatedHosts | None, report: Report
) -> tuple[dict[str, Measurement], JobFailure | None]:
    """Run a job to its end; no process of it is left then.

    Args:
        plan: What to do.
        hosts: Where; None for loopback.
        report: Is told where the job is.

    Returns:
        The measurements it came to, by variant, and what stopped it, if anything did.
    """
    # Each rank looks after itself by the step; this is only for what happens outside of a variant.
    limit = _START_SECONDS + len(plan.variants) * (2 * SETUP_SECONDS + (WARMUP_STEPS + plan.steps) * plan.step_limit)
    failure = None
    with tempfile.TemporaryDirectory(prefix="danon-bench-") as name:
        folder = Path(name)
        try:
            with _reporting(folder, report):
                run_distributed(
                    measure,
                    plan.workload.world_size,
                    plan,
                    folder,
                    timeout=limit,
                    ranks_per_node=plan.workload.ranks_per_node,
                    hosts=hosts,
                )
        except (RankFailedError, TimeoutError) as error:
            failure = _explain(error, folder, limit)
        files = {variant: folder / f"{variant}.json" for variant, _ in plan.variants}
        measured = {v: Measurement(**json.loads(file.read_text())) for v, file in files.items() if file.exists()}
    return measured, failure


@contextmanager
def _reporting(folder: Path, report: Report) -> Iterator[None]:
    """Passes a job's progress on while it runs."""
    ended = threading.Event()

    def poll() -> None:
        last = None
        while not ended.wait(_POLL_SECONDS):
            now = _progress(folder, rank=0)
            if now is not None and now != last:
                report(now)
            last = now

    thread = threading.Thread(target=poll, name="benchmark-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _progress(folder: Path, rank: int) -> Progress | None:
    file = folder / f"{rank}.progress"
    return Progress(**json.loads(file.read_text())) if file.exists() else None


def _explain(error: RankFailedError | TimeoutError, folder: Path, limit: float) -> JobFailure:
    rank = 0 if isinstance(error, TimeoutError) else error.rank
    progress = _progress(folder, rank)
    started = progress is not None
    place = "before the first variant" if progress is None else progress.place
    if isinstance(error, TimeoutError):
        return JobFailure("hung", f"hung after {limit:.0f} s {place}", str(error), started)
    stacks = (folder / f"{rank}.hang").read_text() if (folder / f"{rank}.hang").exists() else ""
    # What faulthandler writes before it ends the process: Timeout (0:00:34)!
    hung = re.match(r"Timeout \((\d+):(\d+):([\d.]+)\)", stacks)
    if hung:
        seconds = 3600 * int(hung[1]) + 60 * int(hung[2]) + float(hung[3])
        return JobFailure("hung", f"hung after {round(seconds, 1):g} s {place}", stacks, started)
    reason = folder / f"{rank}.error"
    text = reason.read_text() if reason.exists() else _last_words(str(error))
    return JobFailure("crashed", f"crashed {place}: {text}", error.rank_traceback or str(error), started)


def _last_words(report: str) -> str:
    """How a rank ended that raised nothing: "rank 2 died by signal 6", and what C++ threw, if it did."""
    end, *output = report.splitlines()
    thrown = [line.strip() for line in output if line.strip().startswith("what():")]
    return f"{end}: {thrown[0].removeprefix('what():').strip()}" if thrown else end
