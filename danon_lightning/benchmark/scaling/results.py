"""The figures: what was measured on so many hosts, and what is projected for more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from danon_lightning.benchmark.scaling.job import Measurement, Outcome
from danon_lightning.benchmark.scaling.prediction import StepPrediction, links_of, predict_step
from danon_lightning.benchmark.scaling.runner import JobFailedError
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
        dilation: All seconds here are so many times as long as they stand for, and the link was as much slower.
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
    dilation: float = 1.0

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
        dilation: As in :class:`Row`.
    """

    exchange: str
    hosts: int
    mbit: float | None
    single_seconds: float
    predicted: StepPrediction
    dilation: float = 1.0

    @property
    def speedup(self) -> float:
        """Throughput as a multiple of that of one host."""
        return self.hosts * self.single_seconds / self.predicted.seconds

    @property
    def exposed(self) -> float:
        """Share of the step that is communication and not hidden."""
        return self.predicted.exposed_seconds / self.predicted.seconds


@dataclass(frozen=True)
class Setting:
    """What the rows at one rate have in common.

    Attributes:
        exchanges: Names of the exchanges.
        mbit: Rate of each host's link in Mbit/s; None for unshaped.
        workload: Gradients and computing, as long as it is waited for.
        single_seconds: Median step on one host, without an exchange, as long.
        dilation: How many times longer than what it stands for.
    """

    exchanges: tuple[str, ...]
    mbit: float | None
    workload: Workload
    single_seconds: float
    dilation: float = 1.0


def rows_of(setting: Setting, outcomes: Mapping[int, Outcome | JobFailedError]) -> list[Row]:
    """The rows of all jobs at one rate, by exchange.

    Args:
        setting: What they have in common.
        outcomes: What became of them, by number of hosts.
    """
    probed = probed_links(outcomes)
    rows = []
    for name in setting.exchanges:
        for hosts, outcome in outcomes.items():
            common = (name, hosts, setting.mbit)
            if isinstance(outcome, JobFailedError):
                text, detail = str(outcome), outcome.detail
                failed = Row(*common, "failed", setting.single_seconds, text, detail, dilation=setting.dilation)
                rows.append(failed)
                continue
            measured, predicted, rate = outcome.measured[name], None, None
            if outcome.links is not None and outcome.links.inter is not None:
                links = links_of(probed, hosts, name)
                predicted = predict_step(name, setting.workload, setting.single_seconds, links, measured.costs)
                rate = setting.dilation * outcome.links.inter.bytes_per_second * 8 / 1e6
            row = Row(*common, "finished", setting.single_seconds, "", "", measured, predicted, rate, setting.dilation)
            rows.append(row)
    return rows


def probed_links(outcomes: Mapping[int, Outcome | JobFailedError]) -> list[Links]:
    """The links of those jobs that could measure them."""
    return [one.links for one in outcomes.values() if isinstance(one, Outcome) and one.links is not None]


def project(
    setting: Setting, hosts: Sequence[int], probed: Sequence[Links], costs: Mapping[str, CodingCosts]
) -> list[Projection]:
    """What more hosts would do, each with processors of its own.

    Args:
        setting: Exchanges, gradients and computing of each.
        hosts: Numbers of hosts.
        probed: The links of clusters of other sizes; with fewer than two of these nothing is projected.
        costs: Of coding, by exchange, as measured by a rank that was alone.
    """
    if len(probed) < 2:
        return []
    found = []
    for name in setting.exchanges:
        for count in hosts:
            links, single = links_of(probed, count, name), setting.single_seconds
            predicted = predict_step(name, setting.workload, single, links, costs[name])
            found.append(Projection(name, count, setting.mbit, single, predicted, setting.dilation))
    return found
