"""What runs on the ranks: variants one after another, each with warm-up and measured steps.

Results go to a folder as they come, so that a variant that crashes or hangs takes only itself along:

    NAME.json         the finished measurement of a variant; rank 0 writes it
    RANK.progress     which variant the rank is at, and in which step
    RANK.error        the first line of its exception
    RANK.hang         where it was when a step took too long; empty otherwise
"""

import faulthandler
import gc
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from danon_lightning.benchmark.communication.variants import Attach, Exchange
from danon_lightning.benchmark.communication.workload import GivenGradients, Workload

# DDP regroups its buckets after the first step, memory is touched for the first time, and thresholds settle.
WARMUP_STEPS = 3
# From one variant's last step to the next one's first: no part of a step, but a hang as well if it takes for ever.
SETUP_SECONDS = 120.0


@dataclass(frozen=True)
class Plan:
    """What a job shall do.

    Attributes:
        workload: What is exchanged among whom.
        variants: Names and set-up functions, in order.
        steps: Measured steps of each.
        step_limit: A step that takes more seconds is a hang, and ends the job.
        interface: The network interface whose bytes leave the node, or None if there is no such thing.
    """

    workload: Workload
    variants: tuple[tuple[str, Attach], ...]
    steps: int
    step_limit: float
    interface: str | None


@dataclass(frozen=True)
class Measurement:
    """One variant's figures.

    Attributes:
        seconds: Median step; a step lasts as long as on the slowest rank.
        best_seconds: Shortest step.
        egress_bytes: Bytes that left a node in a step by its interface's own count, or None without one.
        payload_bytes: Bytes for other nodes that the ranks of a node counted themselves, or None if they do not count.
    """

    seconds: float
    best_seconds: float
    egress_bytes: float | None
    payload_bytes: float | None


@dataclass(frozen=True)
class Progress:
    """Where a job is: the variant, and the step counted from 1, warm-up included."""

    variant: str
    step: int
    steps: int

    @property
    def place(self) -> str:
        """For a report: ``in step 4 of 8``."""
        return f"in step {self.step} of {self.steps}" if self.step else "while it was set up"


def measure(plan: Plan, folder: Path) -> None:
    """Run a job; called on every rank with the process group initialised."""
    torch.set_num_threads(1)
    rank = dist.get_rank()
    # Never closed: the interpreter writes to its descriptor when a time is up, and the last limit is for the exit.
    stacks = open(folder / f"{rank}.hang", "w")
    try:
        for name, attach in plan.variants:
            _limit(SETUP_SECONDS, stacks)
            measurement = _measure_variant(plan, name, attach, folder, stacks)
            if rank == 0:
                _write(folder / f"{name}.json", asdict(measurement))
            dist.barrier()  # a rank that fails in the next one shall not make this one seem to have failed
        _limit(SETUP_SECONDS, stacks)
    except Exception as error:
        (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}".splitlines()[0])
        raise


def _limit(seconds: float, stacks: TextIO) -> None:
    """End this process unless this is called again in time; works even if the interpreter itself is stuck."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=stacks)


def _measure_variant(plan: Plan, name: str, attach: Attach, folder: Path, stacks: TextIO) -> Measurement:
    steps = WARMUP_STEPS + plan.steps
    rank = dist.get_rank()
    _write(folder / f"{rank}.progress", asdict(Progress(name, 0, steps)))
    ddp = DistributedDataParallel(
        GivenGradients(plan.workload, rank),
        bucket_cap_mb=plan.workload.bucket_mb,
        gradient_as_bucket_view=True,
        init_sync=False,  # the parameters are zero everywhere; sending them takes long on a slow link
    )
    exchange = attach(ddp, plan.workload.nodes)
    seconds: list[float] = []
    before: dict[str, int] = {}
    for step in range(steps):
        _limit(plan.step_limit, stacks)
        _write(folder / f"{rank}.progress", asdict(Progress(name, step + 1, steps)))
        if step == WARMUP_STEPS:
            before = _counters(plan.interface, exchange)
        ddp.zero_grad(set_to_none=False)  # keeps them in the buckets
        dist.barrier()
        start = time.perf_counter()
        ddp().backward()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    sent = {counter: end - before[counter] for counter, end in _counters(plan.interface, exchange).items()}
    _limit(SETUP_SECONDS, stacks)
    by_rank: list[Any] = [None] * plan.workload.world_size
    dist.all_gather_object(by_rank, (seconds[WARMUP_STEPS:], sent))
    if exchange is not None:
        exchange.close()
    del ddp, exchange
    gc.collect()  # a model and its hook refer to each other
    return combine(plan.workload, [times for times, _ in by_rank], [counts for _, counts in by_rank])


def _counters(interface: str | None, exchange: Exchange | None) -> dict[str, int]:
    """The bytes that left this host ("egress"), and those this rank counted for other nodes ("payload"), so far."""
    counters = {}
    if interface is not None:
        counters["egress"] = int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())
    if exchange is not None:
        counters["payload"] = exchange.stats()["inter_node_bytes"]
    return counters


def combine(workload: Workload, seconds: Sequence[Sequence[float]], sent: Sequence[Mapping[str, int]]) -> Measurement:
    """Make one measurement of those of all ranks.

    Args:
        workload: The layout of the ranks.
        seconds: By rank, then by step.
        sent: By rank: bytes in all these steps, where they were counted; "egress" is the same for all ranks of a node.
    """
    slowest = [max(times) for times in zip(*seconds, strict=True)]

    def busiest_node(counter: str, ranks: int) -> float | None:
        """Bytes a step of the node that sends most, as the sum of its first ``ranks`` ranks."""
        if counter not in sent[0]:
            return None
        nodes = range(0, workload.world_size, workload.ranks_per_node)
        return max(sum(counts[counter] for counts in sent[n : n + ranks]) for n in nodes) / len(slowest)

    return Measurement(
        seconds=statistics.median(slowest),
        best_seconds=min(slowest),
        egress_bytes=busiest_node("egress", 1),
        payload_bytes=busiest_node("payload", workload.ranks_per_node),
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    # In one step: the reader never sees half a file.
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)
