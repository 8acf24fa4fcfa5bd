"""The figures: what was measured on so many hosts, and what is projected for more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from danon_lightning.benchmark.scaling.job import Measurement, Outcome
from danon_lightning.benchmark.scaling.prediction import StepPrediction, predict_step, with_hosts
from danon_lightning.benchmark.scaling.workload import Workload
from danon_lightning.strategies.communication.cost_model import CodingCosts, Links


@dataclass(frozen=True)
class Row:
    """One exchange on so many hosts at one rate.

    Attributes:
        exchange: Its name.
        hosts: Number of hosts, a rank on each.
        mbit: Rate of each host's link in Mbit/s; None for unshaped.
        status: Whether it was measured, or its job has failed.
        single_seconds: Median step on one host, without an exchange.
        message: Why it was not measured, in one line.
        detail: The whole report.
        measured: Its figures; None if it was not measured.
        predicted: What the cost model says; None if the links could not be measured.
        link_mbit: Bandwidth between hosts as probed, of payload, in Mbit/s.
    """

    exchange: str
    hosts: int
    mbit: float | None
    status: Literal["finished", "failed"]
    single_seconds: float
    message: str = ""
    detail: str = ""
    measured: Measurement | None = None
    predicted: StepPrediction | None = None
    link_mbit: float | None = None

    @property
    def speedup(self) -> float | None:
        """Throughput of the hosts, as a multiple of that of one; each of them has a batch like that of one."""
        return self.hosts * self.single_seconds / self.measured.seconds if self.measured else None

    @property
    def exposed(self) -> float | None:
        """Share of the step that is communication and not hidden."""
        return self.measured.exposed_seconds / self.measured.seconds if self.measured else None

    @property
    def predicted_speedup(self) -> float | None:
        """The same as the cost model has it."""
        return self.hosts * self.single_seconds / self.predicted.seconds if self.predicted else None

    @property
    def error(self) -> float | None:
        """How far off the predicted step is, as a share of the measured one."""
        if self.predicted is None or self.measured is None:
            return None
        return self.predicted.seconds / self.measured.seconds - 1


@dataclass(frozen=True)
class Projection:
    """What the cost model says of a cluster that was not measured, larger and otherwise the same.

    Attributes:
        exchange: Name of the exchange.
        hosts: Number of hosts.
        mbit: Rate of each host's link in Mbit/s; None for unshaped.
        single_seconds: Median step on one host, measured.
        predicted: The step.
    """

    exchange: str
    hosts: int
    mbit: float | None
    single_seconds: float
    predicted: StepPrediction

    @property
    def speedup(self) -> float:
        """Throughput as a multiple of that of one host."""
        return self.hosts * self.single_seconds / self.predicted.seconds

    @property
    def exposed(self) -> float:
        """Share of the step that is communication and not hidden."""
        return self.predicted.exposed_seconds / self.predicted.seconds


def rows_of(
    outcome: Outcome, exchanges: Sequence[str], hosts: int, mbit: float | None, workload: Workload, single: float
) -> list[Row]:
    """The rows of a job that has come to its end.

    Args:
        outcome: What it has found.
        exchanges: Names of the exchanges.
        hosts: Number of hosts.
        mbit: Rate of their links.
        workload: What was measured.
        single: Median step on one host.
    """
    rows = []
    for name in exchanges:
        measured, links = outcome.measured[name], outcome.links
        predicted = None if links is None else predict_step(name, workload, single, links, measured.costs)
        rate = links.inter.bytes_per_second * 8 / 1e6 if links is not None and links.inter is not None else None
        rows.append(Row(name, hosts, mbit, "finished", single, "", "", measured, predicted, rate))
    return rows


def project(
    exchanges: Sequence[str],
    hosts: Sequence[int],
    mbit: float | None,
    workload: Workload,
    single: float,
    links: Links,
    costs: Mapping[str, CodingCosts],
) -> list[Projection]:
    """What more hosts would do, each with processors of its own.

    Args:
        exchanges: Names of the exchanges.
        hosts: Numbers of hosts.
        mbit: Rate of their links.
        workload: Gradients and computing of each.
        single: Median step on one host.
        links: As measured among few enough hosts that they did not wait for one another's processors.
        costs: Of coding, by exchange, as measured by a rank that was alone.
    """
    return [
        Projection(
            name, count, mbit, single, predict_step(name, workload, single, with_hosts(links, count), costs[name])
        )
        for name in exchanges
        for count in hosts
    ]
