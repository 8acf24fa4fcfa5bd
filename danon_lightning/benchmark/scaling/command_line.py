"""The command line of ``danon-bench scaling``."""

import argparse
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from danon_lightning.arguments import add_output_files, positive_float, positive_int, rate
from danon_lightning.benchmark.environment import describe_environment
from danon_lightning.benchmark.json_file import write_json
from danon_lightning.benchmark.network import format_rate, loopback_reason, open_network
from danon_lightning.benchmark.plotting import missing_reason
from danon_lightning.benchmark.progress import ProgressDisplay
from danon_lightning.benchmark.scaling.exchanges import DEFAULT, exchange_names
from danon_lightning.benchmark.scaling.job import WARMUP_STEPS, Outcome, Plan
from danon_lightning.benchmark.scaling.plot import save_plot
from danon_lightning.benchmark.scaling.report import LEGEND, notes, projection_table, rate_table, summary, to_json
from danon_lightning.benchmark.scaling.results import Projection, Row, Setting, probed_links, project, rows_of
from danon_lightning.benchmark.scaling.runner import JobFailedError, run_job
from danon_lightning.benchmark.scaling.workload import Workload
from danon_lightning.strategies.communication.cost_model import Links
from danon_lightning.testing import EmulatedHosts

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


@dataclass(frozen=True)
class Preset:
    """Sizes that belong together.

    Attributes:
        elements_m: Gradient elements in millions.
        layers: Number of layers that share them.
        compute_ms: Forward and backward pass of a step.
        bucket_mb: Size of a bucket in MiB.
        description: A few words of help.
        dilation: How many times slower time passes; None for as many as it takes.
    """

    elements_m: float
    layers: int
    compute_ms: float
    bucket_mb: float
    description: str
    dilation: float | None = None


PRESETS = {
    "mixed": Preset(1.2, 16, 50.0, 0.5, "dense gradients hide at 10 Gbit/s, not at 1 Gbit/s and less"),
    # Links are idle most of the time, whatever their rate: there is no need to go slower.
    "hidden": Preset(0.59, 16, 1000.0, 0.140625, "dense gradients fit behind the computing, even at 100 Mbit/s", 1.0),
}
_DEFAULT_PRESET = "mixed"
_DEFAULT_HOSTS = [2, 4, 8]
_DEFAULT_RATES = [100.0, 1000.0, 10000.0]
# What the hosts together may send and receive; more than two cores can bear would measure the cores.
_MOST_MBIT = 4000.0
_DEFAULT_PROJECTED = [64, 512, 4096]

_DESCRIPTION = f"""\
Measures how much faster several hosts train than one, data-parallel, each with a batch of the same size, and how much
of the exchange of gradients is not hidden behind the backward pass. Hosts are emulated, with one rank each and links of
a chosen rate. They share the processors of this machine; so computing is replaced by waiting for as long, the layers'
gradients coming one after another as in a real backward pass, in buckets that are exchanged meanwhile. There is no
optimizer step.

What is exchanged is real, and so is the processor time that takes. Where it is more than these processors can do, time
is dilated (Gupta et al., "To Infinity and Beyond: Time-Warped Network Emulation", NSDI 2006): links are, say, ten times
slower and waiting takes ten times as long, so that all else, latency and coding too, is ten times faster beside them.
Ratios stay as they are, and seconds are printed divided by that factor, which stands in the title.

The median step counts, after {WARMUP_STEPS} steps of warm-up. Beside it stands what the cost model predicts, from a
probe of the links, the time to code gradients and the step on one host; then what is projected for clusters that nobody
has measured here. For that codes take what they take a rank that is alone, links have the bandwidth of the fewest hosts
however many there are, and latency grows with the hosts that one sends to as it does between those measured."""

_EXAMPLES = """\
examples:
  danon-bench scaling --json scaling.json --plot scaling.png    all of it, for some minutes
  danon-bench scaling --preset hidden                           gradients that fit behind the computing
  danon-bench scaling --mbit 1000 --hosts 2 4 --only ddp int8   less of it
  danon-bench scaling --elements-m 7 --compute-ms 250 --project 16 32
                                                                a model of one's own

The exit code is 1 if a job failed, else 0: how far off predictions are is a result."""


def add_parser(subparsers: "Subparsers") -> None:
    """Add the subcommand."""
    width = max(map(len, PRESETS))
    presets = "\n".join(
        f"  {name:{width}}  {one.elements_m:g} M elements in {one.layers} layers, {one.compute_ms:g} ms, buckets of "
        f"{one.bucket_mb:g} MiB:\n  {'':{width}}  {one.description}"
        for name, one in PRESETS.items()
    )
    parser = subparsers.add_parser(
        "scaling",
        help="speed-up and exposed communication by number of hosts, measured, predicted, projected",
        description=_DESCRIPTION,
        epilog=f"presets:\n{presets}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--hosts",
        type=positive_int,
        nargs="+",
        default=_DEFAULT_HOSTS,
        metavar="N",
        help="numbers of hosts, a rank on each (default: 2 4 8); one host is always measured",
    )
    add(
        "--mbit",
        type=rate,
        nargs="+",
        metavar="RATE",
        help="rates of each host's link in Mbit/s, 0 for unshaped (default: 100 1000 10000)",
    )
    add(
        "--only",
        choices=exchange_names(),
        nargs="+",
        default=DEFAULT,
        metavar="NAME",
        help=f"exchanges, of: {', '.join(exchange_names())} (default: {' '.join(DEFAULT)})",
    )
    add("--preset", choices=list(PRESETS), default=_DEFAULT_PRESET, help="sizes, see below (default: %(default)s)")
    add("--elements-m", type=positive_float, metavar="MILLIONS", help="gradient elements, in place of the preset's")
    add("--layers", type=positive_int, metavar="N", help="layers that share them, likewise")
    add("--compute-ms", type=positive_float, metavar="MS", help="forward and backward pass of a step, likewise")
    add("--bucket-mb", type=positive_float, metavar="MIB", help="size of a gradient bucket, likewise")
    add(
        "--dilation",
        type=positive_float,
        metavar="N",
        help="how many times slower time passes (default: the preset's, or as two cores need it)",
    )
    add("--steps", type=positive_int, default=7, metavar="N", help="steps that count (default: %(default)s)")
    add(
        "--project",
        type=positive_int,
        nargs="*",
        default=_DEFAULT_PROJECTED,
        metavar="N",
        help="numbers of hosts to project to (default: 64 512 4096); with no number none",
    )
    add_output_files(parser, "them")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments say, and print it as it comes.

    Args:
        args: Parsed arguments of this subcommand.

    Returns:
        The exit code: 1 if a job failed, else 0.
    """
    counts = _check(args)
    console = Console(highlight=False)
    emulated = loopback_reason(counts[-1]) is None
    rates = _rates(args, counts[-1], console)
    workload = workload_of(args)
    exchanges = tuple(name for name in exchange_names() if name in args.only)
    plan = Plan(workload, exchanges, args.steps)
    title = (
        f"{workload.elements / 1e6:.3g} M float32 gradients, {1e3 * workload.compute_seconds:g} ms of computing a step"
    )
    arguments = {
        "hosts": counts,
        "mbit": rates,
        "only": list(exchanges),
        "elements": workload.elements,
        "layers": workload.layers,
        "compute_ms": 1e3 * workload.compute_seconds,
        "bucket_bytes": workload.bucket_bytes,
        "steps": args.steps,
        "dilation": args.dilation,
        "project": args.project,
    }
    environment = describe_environment() | {"network": "emulated hosts" if emulated else "loopback"}
    console.print(
        f"torch {environment['torch']}, {environment['cores']} cores for all hosts, compiled kernels: "
        f"{'yes' if environment['kernels'] else 'no'}; {title}, in {len(workload.buckets())} buckets\n\n{LEGEND}\n",
        soft_wrap=True,
    )
    rows: list[Row] = []
    projections: list[Projection] = []
    probed: dict[float | None, list[Links]] = {}
    jobs = [(mbit, count) for mbit in rates for count in counts]
    with open_network(counts[-1]) as hosts, ProgressDisplay(console, 1 + len(jobs)) as display:
        display.show("one host", f"{len(exchanges)} exchanges", 0)
        try:
            alone = run_job(plan, 1, None, hosts)
        except JobFailedError as error:
            console.print(f"[red]one host, which all others are compared to, failed:[/] {escape(str(error))}")
            console.print(error.detail, markup=False)
            return 1
        # It is the same whatever is not exchanged.
        single = min(measurement.seconds for measurement in alone.measured.values())
        costs = {name: measured.costs for name, measured in alone.measured.items()}
        console.print(f"one host: {1e3 * single:.1f} ms a step\n")
        for mbit in rates:
            dilation = args.dilation or PRESETS[args.preset].dilation or dilation_for(counts[-1], mbit)
            dilated = workload.dilated(dilation)
            waiting = dilated.compute_seconds - workload.compute_seconds
            setting = Setting(exchanges, mbit, dilated, single + waiting, dilation)
            slow = None if mbit is None else mbit / dilation
            if hosts is not None:
                hosts.set_rate(slow)
            outcomes: dict[int, Outcome | JobFailedError] = {}
            for count in counts:
                done = 1 + jobs.index((mbit, count))
                display.show(f"{format_rate(mbit)}: {count} hosts", f"{len(exchanges)} exchanges", done)
                try:
                    outcomes[count] = run_job(replace(plan, workload=dilated), count, slow, hosts)
                except JobFailedError as error:
                    outcomes[count] = error
            probed[mbit] = probed_links(outcomes)
            found = rows_of(setting, outcomes)
            projected = project(setting, args.project, probed[mbit], costs)
            rows += found
            projections += projected
            at_rate = format_rate(mbit) + ("" if dilation == 1 else f" (time dilated {dilation:g} ×)")
            console.print(rate_table(found, f"{at_rate}: {title}"))
            if projected:
                console.print(projection_table(projected, f"more hosts at {at_rate}"))
            elif args.project:
                console.print("Nothing is projected: that needs the links of at least two numbers of hosts.")
            console.print(*notes(found), "", sep="\n", soft_wrap=True)
            if args.json:  # each time: who interrupts the rest keeps this
                write_json(args.json, to_json(arguments, environment, rows, projections, probed))
    if args.plot:
        save_plot(rows, projections, title, args.plot)
    console.print(summary(rows, [file for file in (args.json, args.plot) if file]), soft_wrap=True, markup=False)
    return 1 if any(row.status == "failed" for row in rows) else 0


def dilation_for(hosts: int, mbit: float | None) -> float:
    """How many times slower this machine has to go at it to move what all hosts may send at once."""
    return 1.0 if mbit is None else float(max(1, math.ceil(hosts * mbit / _MOST_MBIT)))


def workload_of(args: argparse.Namespace) -> Workload:
    """The sizes of the preset, and what other arguments say in their place."""
    preset = PRESETS[args.preset]
    return Workload.of_size(
        1e6 * (args.elements_m or preset.elements_m),
        args.layers or preset.layers,
        (args.compute_ms or preset.compute_ms) / 1e3,
        args.bucket_mb or preset.bucket_mb,
    )


def _check(args: argparse.Namespace) -> list[int]:
    """Refuse what the parser alone cannot see to be wrong; returns the numbers of hosts in rising order, from 2."""
    error = args.parser.error
    counts = sorted(set(args.hosts) - {1})
    if not counts:
        error("argument --hosts 1: one host is always measured; say how many to compare it with")
    try:
        EmulatedHosts(counts[-1])
    except ValueError as reason:
        error(f"argument --hosts: {reason}")
    if args.project and min(args.project) < 2:
        error("argument --project: a single host exchanges nothing; give numbers of at least 2")
    if args.plot and missing_reason():
        error(f"argument --plot: {missing_reason()}")
    return counts


def _rates(args: argparse.Namespace, hosts: int, console: Console) -> list[float | None]:
    """The rates to measure at, after a word on those that cannot be had."""
    reason = loopback_reason(hosts)
    if reason is None:
        return list(dict.fromkeys(args.mbit or _DEFAULT_RATES))
    console.print(
        f"[yellow]No emulated hosts: {escape(reason)}.[/] All ranks run on the loopback of this machine: there are no "
        'links to shape, so only "unshaped" is measured. With root on Linux (and iproute2) hosts are emulated.'
    )
    return [None]
