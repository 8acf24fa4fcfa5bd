"""The command line of ``danon-bench communication``."""

import argparse
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from danon_lightning.arguments import add_output_files, positive_float, positive_int, rate
from danon_lightning.benchmark.communication.export import to_json
from danon_lightning.benchmark.communication.job import WARMUP_STEPS, Progress
from danon_lightning.benchmark.communication.measurement import Setting, default_step_limit, measure_variants
from danon_lightning.benchmark.communication.plot import save_plot
from danon_lightning.benchmark.communication.report import (
    LEGEND,
    any_of_ours_failed,
    crossover_table,
    notes,
    rate_table,
    summary,
)
from danon_lightning.benchmark.communication.results import Row
from danon_lightning.benchmark.communication.variants import VARIANTS
from danon_lightning.benchmark.communication.workload import MATRICES, Workload
from danon_lightning.benchmark.environment import describe_environment
from danon_lightning.benchmark.json_file import write_json
from danon_lightning.benchmark.network import format_rate, loopback_reason, open_network
from danon_lightning.benchmark.plotting import missing_reason
from danon_lightning.benchmark.progress import ProgressDisplay
from danon_lightning.strategies import Mesh
from danon_lightning.testing import EmulatedHosts

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DEFAULT_RATES = [100.0, 1000.0, None]

_DESCRIPTION = f"""\
Measures how long a step takes whose gradients are exchanged in different ways, on emulated hosts whose links have a
chosen rate. The gradients are given, the same for all, so that next to no computation hides the exchange. A step is
timed from barrier to barrier on the slowest rank; the median counts, after {WARMUP_STEPS} steps of warm-up.

What counts is the ratio to plain DistributedDataParallel ("flat"), which is measured in the same job, on the same
links; seconds depend on the machine. Emulated hosts share its processors. They need root on Linux; elsewhere all ranks
run on the loopback of this machine, which is said, and only "unshaped" is measured."""

_EXAMPLES = """\
examples:
  danon-bench communication                                     all of it, for a quarter of an hour
  danon-bench communication --mbit 1000 --only flat dense int8  one rate, three exchanges
  danon-bench communication --mbit 100 200 500 1000 2000 5000 0 --json run.json --plot run.png
                                                                where the lines cross
  danon-bench communication --nodes 1 --ranks 4                 one host

A variant that crashes or hangs gets a line that says so, and the others are measured all the same. The exit code is 1
if that happened to one of this package, 0 otherwise: what becomes of torch's own hooks is a result."""


def add_parser(subparsers: "Subparsers") -> None:
    """Add the subcommand."""
    width = max(map(len, VARIANTS))
    variants = "\n".join(f"  {variant.name:{width}}  {variant.description}" for variant in VARIANTS.values())
    parser = subparsers.add_parser(
        "communication",
        help="gradient exchanges: seconds and bytes a step, by algorithm and bandwidth",
        description=_DESCRIPTION,
        epilog=f"what can be measured:\n{variants}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--nodes", type=positive_int, default=2, metavar="N", help="hosts to emulate (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks", type=positive_int, default=2, metavar="N", help="ranks on each of them (default: %(default)s)"
    )
    parser.add_argument(
        "--mbit",
        type=rate,
        nargs="+",
        metavar="RATE",
        help="rates of each host's link in Mbit/s, 0 for unshaped (default: 100 1000 0; with one node: 0)",
    )
    parser.add_argument(
        "--elements-m",
        type=positive_float,
        default=25.0,
        metavar="MILLIONS",
        help="gradient elements in millions, rounded to six square matrices with a bucket each (default: %(default)g)",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        default=5,
        metavar="N",
        help="measured steps of each variant (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        type=_variant,
        nargs="+",
        default=list(VARIANTS),
        metavar="NAME",
        help='what to measure, of the list below (default: all); ratios need "flat"',
    )
    parser.add_argument(
        "--step-limit",
        type=positive_float,
        metavar="SECONDS",
        help="a step that takes longer is a hang: its job is killed (default: 30, and four times what flat needs on "
        "the wire)",
    )
    add_output_files(parser, "step time against bandwidth")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments say, and print it as it comes.

    Args:
        args: Parsed arguments of this subcommand.

    Returns:
        The exit code: 1 if a variant of this package failed, else 0.
    """
    _check(args)
    console = Console(highlight=False)
    emulated = loopback_reason(args.nodes) is None
    rates = _rates(args, console)
    variants = [variant for variant in VARIANTS.values() if variant.name in args.only]
    workload = Workload.of_size(args.nodes, args.ranks, args.elements_m * 1e6)
    layout = Mesh(workload.nodes, workload.ranks_per_node, rank=0)
    title = f"{layout}, {workload.elements / 1e6:.3g} M float32 gradients in {MATRICES} buckets"
    arguments = {
        "nodes": workload.nodes,
        "ranks": workload.ranks_per_node,
        "mbit": rates,
        "elements": workload.elements,
        "steps": args.steps,
        "only": [variant.name for variant in variants],
        "step_limit": args.step_limit,
    }
    environment = describe_environment() | {"network": "emulated hosts" if emulated else "loopback"}
    console.print(
        f"torch {environment['torch']}, {environment['cores']} cores for all ranks, compiled kernels: "
        f"{'yes' if environment['kernels'] else 'no'}; every variant: {WARMUP_STEPS} + {args.steps} steps\n\n{LEGEND}\n"
    )

    rows: list[Row] = []
    with open_network(args.nodes) as hosts, ProgressDisplay(console, len(rates) * len(variants)) as display:
        for mbit in rates:
            if hosts is not None:
                hosts.set_rate(mbit)
            limit = args.step_limit or default_step_limit(workload, mbit)
            setting = Setting(workload, hosts, mbit, args.steps, limit)
            report = partial(_show, display, mbit, {v.name: len(rows) + i for i, v in enumerate(variants)})
            measured = measure_variants(variants, setting, report)
            rows += measured
            console.print(rate_table(measured, f"{title}, {format_rate(mbit)}"), *notes(measured), "", sep="\n")
            if args.json:  # each time: who interrupts the rest keeps this
                write_json(args.json, to_json(arguments, environment, rows))
    if len(rates) > 1:
        console.print(crossover_table(rows))
    if args.plot:
        save_plot(rows, title, args.plot)
    console.print(summary(rows, [file for file in (args.json, args.plot) if file]), soft_wrap=True, markup=False)
    return 1 if any_of_ours_failed(rows) else 0


def _show(display: ProgressDisplay, mbit: float | None, order: Mapping[str, int], progress: Progress) -> None:
    subject = f"{format_rate(mbit)}: {progress.variant}"
    display.show(subject, f"step {progress.step} of {progress.steps}", order[progress.variant])


def _variant(text: str) -> str:
    if text not in VARIANTS:
        raise argparse.ArgumentTypeError(f"there is no {text!r}: choose from {', '.join(VARIANTS)}")
    return text


def _check(args: argparse.Namespace) -> None:
    """Refuse what the parser alone cannot see to be wrong."""
    error = args.parser.error
    if args.nodes * args.ranks == 1:
        error("arguments --nodes 1 --ranks 1: a single rank has nobody to exchange gradients with, raise one of them")
    if args.nodes == 1 and any(args.mbit or []):
        error("argument --mbit: with --nodes 1 there is no link to shape; raise --nodes, or leave --mbit out")
    try:
        EmulatedHosts(args.nodes)
    except ValueError as reason:
        error(f"argument --nodes: {reason}")
    if args.plot and missing_reason():
        error(f"argument --plot: {missing_reason()}")


def _rates(args: argparse.Namespace, console: Console) -> list[float | None]:
    """The rates to measure at, after a word on those that cannot be had."""
    reason = loopback_reason(args.nodes)
    if reason is None:
        return list(dict.fromkeys(args.mbit or _DEFAULT_RATES))
    if args.nodes > 1:
        console.print(
            f"[yellow]No emulated hosts: {escape(reason)}.[/] All ranks run on the loopback of this machine: there are "
            'no links to shape, so only "unshaped" is measured, and nobody counts the bytes that leave a host. With '
            "root on Linux (and iproute2) hosts are emulated."
        )
    return [None]
