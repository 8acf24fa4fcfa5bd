"""What a window of steps looks like over all ranks, and what a whole run has to say in the end."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from danon_lightning.callbacks.health import Finding
from danon_lightning.callbacks.performance_monitor.averages import mean

# Shares of a step from which on something should be done.
_MUCH_EXPOSED = 0.2
_UNEVEN = 0.9
_LARGE_BUBBLE = 1.5, 0.05
METRICS = (
    "communication_time",
    "computation_time",
    "synchronization_overhead",
    "bandwidth_utilization",
    "load_balance_score",
    "gradient_norm",
    "parameter_staleness",
)


@dataclass(frozen=True)
class RankWindow:
    """What one rank has measured in a window, as numbers that can be gathered. NaN for what is not known.

    Attributes:
        steps: Optimizer steps.
        step_seconds: All of them together; so are the following four.
        compute_seconds: Forward and backward passes, without what communication has added to them.
        exposed_seconds: What communication has added.
        hidden_seconds: Communication beside computing.
        inter_node_bytes: Sent to other nodes, together; so are the following two.
        intra_node_bytes: Sent inside the node.
        dense_bytes: Of the gradients of this rank.
        skipped_steps: How many.
        residual_norm: At the end.
        compression_ratio: Since the start of ``fit``.
        staleness: By how many steps parameters are behind.
        bubble: Of this rank's pipeline, as measured.
        ideal_bubble: The same, as the order of passes makes inevitable.
    """

    steps: float
    step_seconds: float
    compute_seconds: float
    exposed_seconds: float
    hidden_seconds: float
    inter_node_bytes: float
    intra_node_bytes: float
    dense_bytes: float
    skipped_steps: float
    residual_norm: float
    compression_ratio: float
    staleness: float
    bubble: float = math.nan
    ideal_bubble: float = math.nan

    def row(self) -> list[float]:
        """Plain numbers."""
        return list(astuple(self))

    @classmethod
    def of(cls, row: Sequence[float]) -> "RankWindow":
        """What :meth:`row` was made of.

        Args:
            row: From any rank.
        """
        return cls(*row)


@dataclass(frozen=True)
class Window:
    """A window over all ranks. Times and bytes are those of one step; NaN for what is not known.

    Attributes:
        step_seconds: Mean over the ranks; so are the following three.
        computation_seconds: Forward and backward passes.
        exposed_seconds: What communication has added.
        hidden_seconds: Communication beside computing.
        inter_node_bytes: That left a node; the mean over nodes.
        intra_node_bytes: That ranks of a node have sent each other; the mean over nodes.
        dense_bytes: Of the gradients; the mean over ranks.
        compression_ratio: Since the start of ``fit``.
        bandwidth: Bits/s at which a node has sent to other nodes while communication was at work; with one node, its
            ranks to each other.
        load_balance: Mean over ranks of what they compute, divided by that of the rank that computes longest.
        slowest: That rank.
        skipped_steps: In the whole window.
        residual_norm: Mean over the ranks.
        staleness: Of the rank that is behind most.
        bubble: Mean over the pipelines.
        ideal_bubble: The same.
    """

    step_seconds: float
    computation_seconds: float
    exposed_seconds: float
    hidden_seconds: float
    inter_node_bytes: float
    intra_node_bytes: float
    dense_bytes: float
    compression_ratio: float
    bandwidth: float
    load_balance: float
    slowest: int
    skipped_steps: float
    residual_norm: float
    staleness: float
    bubble: float
    ideal_bubble: float

    @property
    def communication_seconds(self) -> float:
        """Communication, hidden or not."""
        return self.exposed_seconds + self.hidden_seconds

    @property
    def exposed_share(self) -> float:
        """Of the step."""
        return self.exposed_seconds / self.step_seconds if self.step_seconds > 0 else math.nan


def over_ranks(rows: Sequence[Sequence[float]], nodes: int) -> Window:
    """Put together what the ranks have measured.

    Args:
        rows: One a rank, at least one step in each.
        nodes: How many nodes they are on.
    """
    ranks = [RankWindow.of(row) for row in rows]
    steps = ranks[0].steps

    def a_step(name: str) -> float:
        return mean([getattr(rank, name) for rank in ranks]) / steps

    compute = [rank.compute_seconds for rank in ranks]
    longest = max(compute)
    known = all(not math.isnan(seconds) for seconds in compute) and longest > 0
    inter, intra = (a_step(name) * len(ranks) / nodes for name in ("inter_node_bytes", "intra_node_bytes"))
    busy = a_step("exposed_seconds") + a_step("hidden_seconds")
    sent = inter if inter > 0 else intra
    return Window(
        step_seconds=a_step("step_seconds"),
        computation_seconds=a_step("compute_seconds"),
        exposed_seconds=a_step("exposed_seconds"),
        hidden_seconds=a_step("hidden_seconds"),
        inter_node_bytes=inter,
        intra_node_bytes=intra,
        dense_bytes=a_step("dense_bytes"),
        compression_ratio=mean([rank.compression_ratio for rank in ranks]),
        bandwidth=8 * sent / busy if busy > 0 and sent > 0 else math.nan,
        load_balance=mean(compute) / longest if known else math.nan,
        slowest=compute.index(longest) if known else 0,
        skipped_steps=max(rank.skipped_steps for rank in ranks),
        residual_norm=mean([rank.residual_norm for rank in ranks]),
        staleness=max(rank.staleness for rank in ranks),
        bubble=mean([rank.bubble for rank in ranks]),
        ideal_bubble=mean([rank.ideal_bubble for rank in ranks]),
    )


def values_to_log(window: Window, utilization: float, gradient_norm: float, nodes: int) -> dict[str, float]:
    """The tags of a window; what is not known has none.

    Args:
        window: Over all ranks.
        utilization: Of the bandwidth.
        gradient_norm: At its last step.
        nodes: How many there are.
    """
    found = {
        "exposed_seconds": window.exposed_seconds,
        "hidden_seconds": window.hidden_seconds,
        "computation_seconds": window.computation_seconds,
        "synchronization_overhead": window.exposed_share,
        "intra_node_bytes": window.intra_node_bytes,
        "dense_bytes": window.dense_bytes,
        "compression_ratio": window.compression_ratio,
        "bandwidth_mbit_per_second": window.bandwidth / 1e6,
        "bandwidth_utilization": utilization,
        "load_balance_score": window.load_balance,
        "skipped_steps": window.skipped_steps,
        "residual_norm": window.residual_norm,
        "parameter_staleness": window.staleness,
        "pipeline_bubble": window.bubble,
        "pipeline_bubble_ideal": window.ideal_bubble,
        "gradient_norm": gradient_norm,
    }
    if nodes > 1:
        found["inter_node_bytes"] = window.inter_node_bytes
        if window.dense_bytes > 0:
            found["inter_node_bytes_over_dense"] = window.inter_node_bytes / window.dense_bytes
    return {f"communication/{name}": value for name, value in found.items() if not math.isnan(value)}


class RunTotals:
    """Adds up windows, for findings."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._windows: list[tuple[float, Window]] = []

    def add(self, window: Window, steps: float) -> None:
        """Add one.

        Args:
            window: Over all ranks.
            steps: How many it has.
        """
        self._windows.append((steps, window))

    def _mean(self, name: str) -> float:
        known = [(steps, value) for steps, w in self._windows if not math.isnan(value := getattr(w, name))]
        steps = sum(steps for steps, _ in known)
        return sum(steps * value for steps, value in known) / steps if steps else math.nan

    def findings(self, *, ranks: int) -> list[Finding]:
        """What there is to say.

        Args:
            ranks: How many there are.
        """
        if not self._windows or ranks == 1:
            return []
        found = [*self._skipped(), *self._exposed(), *self._bubble(), *self._uneven()]
        step, bandwidth = self._mean("step_seconds"), self._mean("bandwidth")
        exposed, hidden = self._mean("exposed_seconds"), self._mean("hidden_seconds")
        if math.isnan(exposed) or step <= 0:
            text = "the strategy does not tell how long communication takes, nor what it sends"
        else:
            sent = self._mean("inter_node_bytes")
            sent, where = (sent, "left each node") if sent > 0 else (self._mean("intra_node_bytes"), "inside each node")
            text = f"exposed {exposed / step:.0%} of a step of {step:.3g} s, hidden {hidden / step:.0%}"
            if sent > 0:
                text += f"; {sent / 1e6:.3g} MB a step {where}"
            if bandwidth > 0:
                text += f", at {bandwidth / 1e6:,.0f} Mbit/s"
        return [*found, Finding("note", "communication", text)]

    def _skipped(self) -> list[Finding]:
        skipped = sum(w.skipped_steps for _, w in self._windows if not math.isnan(w.skipped_steps))
        if not skipped:
            return []
        steps = sum(steps for steps, _ in self._windows)
        text = f"{skipped:.0f} of {steps:.0f} steps were skipped, since gradients were not finite"
        return [Finding("warning", "skipped steps", text, "NaNDebugger finds where that begins")]

    def _exposed(self) -> list[Finding]:
        share = self._mean("exposed_seconds") / max(self._mean("step_seconds"), 1e-12)
        if not share >= _MUCH_EXPOSED:
            return []
        compressed = self._mean("compression_ratio") > 1.5
        advice = (
            "a stronger compression ('int4', 'topk', 'powersgd'), or accumulate_grad_batches to exchange less often"
            if compressed
            else "DanonHybridStrategy(compression='int8') sends a quarter, hierarchical=True sums inside each node "
            "first; or accumulate_grad_batches to exchange less often"
        )
        return [Finding("warning", "communication", f"communication added {share:.0%} of the time to steps", advice)]

    def _bubble(self) -> list[Finding]:
        bubble, ideal = self._mean("bubble"), self._mean("ideal_bubble")
        times, more = _LARGE_BUBBLE
        if not (bubble > times * ideal and bubble > ideal + more):
            return []
        text = f"the ranks of a pipeline were idle {bubble:.0%} of the time, the schedule makes {ideal:.0%} inevitable"
        advice = "stages that take equally long (stage_cut='measured'), and neighbouring stages on one node"
        return [Finding("warning", "pipeline bubble", text, advice)]

    def _uneven(self) -> list[Finding]:
        balance = self._mean("load_balance")
        if not balance < _UNEVEN:
            return []
        slowest = [w.slowest for _, w in self._windows if not math.isnan(w.load_balance)]
        rank = max(set(slowest), key=slowest.count)
        text = f"ranks compute for unevenly long (mean / longest = {balance:.2f}), rank {rank} for longest"
        staged = not math.isnan(self._mean("bubble"))
        advice = (
            "stages that take equally long: stage_cut='measured'"
            if staged
            else f"see what else runs where rank {rank} does, and whether its batches are larger"
        )
        return [Finding("warning", "load balance", text, advice)]
