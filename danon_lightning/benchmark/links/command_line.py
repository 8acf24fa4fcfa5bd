"""The command line of ``danon-bench links``."""

import argparse
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from danon_lightning.arguments import output_file, positive_float, positive_int, rate
from danon_lightning.benchmark.communication.measurement import default_step_limit
from danon_lightning.benchmark.communication.workload import Workload
from danon_lightning.benchmark.environment import describe_environment, describe_machine
from danon_lightning.benchmark.json_file import write_json
from danon_lightning.benchmark.links.exchanges import EXCHANGES
from danon_lightning.benchmark.links.job import WARMUP_STEPS, Outcome, Plan, measure
from danon_lightning.benchmark.links.report import (
    LEGEND,
    algorithm_line,
    check_line,
    check_table,
    links_table,
    pairwise_lines,
    to_json,
)
from danon_lightning.benchmark.network import format_rate, loopback_reason, open_network
from danon_lightning.strategies import Mesh
from danon_lightning.testing import EmulatedHosts, RankFailedError, run_distributed

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DEFAULT_MBIT = 1000.0
_DEFAULT_CHECK_MBIT = [1000.0, 100.0]
# Importing torch and Lightning on all ranks at once takes its time on few cores.
_START_SECONDS = 300.0

_DESCRIPTION = """\
Measures latency and bandwidth of the links, inside nodes and between them, with all ranks sending at once as they do in
an exchange of gradients. Bandwidth is that of a whole node, of payload.

Under torchrun (or any launcher that sets RANK and WORLD_SIZE) it measures the cluster that it runs on: one line a node,

  torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
      -m danon_lightning.benchmark.command_line links --json links.json

Otherwise it starts the ranks by itself, on emulated hosts whose links have a chosen rate (root on Linux), or on the
loopback of this machine."""

_EXAMPLES = """\
examples:
  danon-bench links --nodes 4 --ranks 1 --mbit 100 --pairwise   emulated hosts, every two of them too
  danon-bench links --json links.json                           two emulated hosts of two ranks, kept in a file
  danon-bench links --check                                     is what is predicted true? (1 Gbit/s and 100 Mbit/s)

With --check other work on the machine disturbs: where coding counts, and not the link, a prediction is as good as the
processors are idle, both while costs are measured and while gradients are exchanged.

The exit code is 1 if the links could not be measured, else 0: how far off predictions are is a result."""


def add_parser(subparsers: "Subparsers") -> None:
    """Add the subcommand."""
    width = max(map(len, EXCHANGES))
    exchanges = "\n".join(f"  {exchange.name:{width}}  {exchange.description}" for exchange in EXCHANGES.values())
    parser = subparsers.add_parser(
        "links",
        help="latency and bandwidth of links, and whether predictions from them are true",
        description=_DESCRIPTION,
        epilog=f"what predictions are checked with:\n{exchanges}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--nodes", type=positive_int, metavar="N", help="hosts to emulate (default: 2; under torchrun, the real ones)")
    add("--ranks", type=positive_int, metavar="N", help="ranks on each of them (default: 2)")
    add(
        "--mbit",
        type=rate,
        nargs="+",
        metavar="RATE",
        help="rates of each host's link in Mbit/s, 0 for unshaped (default: 1000; with --check 1000 100)",
    )
    add("--pairwise", action="store_true", help="measure the link between every two nodes too, for the order of a ring")
    add(
        "--message-mb",
        type=positive_float,
        default=4.0,
        metavar="MB",
        help="what a rank sends at a time; less than %(default)g reads too much",
    )
    add(
        "--time-limit",
        type=positive_float,
        default=60.0,
        metavar="SECONDS",
        help="an operation that takes longer has failed (default: %(default)g)",
    )
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="what gradients lie on, under torchrun: cpu measures gloo, cuda nccl (default: %(default)s)",
    )
    add("--check", action="store_true", help="exchange gradients, and compare with what is predicted")
    add(
        "--elements-m",
        type=positive_float,
        default=10.0,
        metavar="MILLIONS",
        help="gradient elements of a check in millions, in six matrices (default: %(default)g)",
    )
    add("--steps", type=positive_int, default=7, metavar="N", help="exchanges that count (default: %(default)s)")
    add(
        "--only",
        choices=list(EXCHANGES),
        nargs="+",
        default=list(EXCHANGES),
        metavar="NAME",
        help="what to check, of the list below (default: all)",
    )
    add("--json", type=output_file, metavar="FILE", help="write the links to this file, for danon-plan")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments say, and print it.

    Args:
        args: Parsed arguments of this subcommand.

    Returns:
        The exit code: 1 if links could not be measured, else 0.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_on_cluster(args)
    nodes, ranks = args.nodes or 2, args.ranks or 2
    _check(args, nodes, ranks)
    console = Console(highlight=False)
    rates = _rates(args, nodes, console)
    failed = False
    with open_network(nodes) as hosts:
        for mbit in rates:
            if hosts is not None:
                hosts.set_rate(mbit)
            plan = _plan(args, nodes)
            step_limit = default_step_limit(Workload.of_size(nodes, ranks, plan.elements), mbit)
            limit = _START_SECONDS + 10 * plan.time_limit
            limit += len(plan.exchanges) * (60 + (WARMUP_STEPS + plan.steps) * step_limit)
            try:
                [outcome, *_] = run_distributed(
                    measure, nodes * ranks, plan, timeout=limit, ranks_per_node=ranks, hosts=hosts
                )
            except (RankFailedError, TimeoutError) as error:
                console.print(f"[red]{format_rate(mbit)}: the job has failed.[/]")
                console.print(str(error), markup=False)
                failed = True
                continue
            network = "emulated hosts" if hosts is not None else "loopback"
            environment = describe_environment() | {"network": network}
            failed |= not _report(args, console, outcome, nodes, ranks, f"{network}, {format_rate(mbit)}", environment)
    return 1 if failed else 0


def _run_on_cluster(args: argparse.Namespace) -> int:
    """What each rank of a launched job does."""
    if args.mbit or args.ranks:
        args.parser.error("arguments --mbit, --ranks: under a launcher the links and ranks are those that there are")
    world_size = int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or world_size // (args.nodes or 1)
    nodes = args.nodes or max(1, world_size // local)
    if world_size < 2 or nodes * local != world_size:
        args.parser.error(
            f"{world_size} rank(s) on {nodes} node(s): links need at least two, and as many on every node (--nodes)"
        )
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        outcome = measure(_plan(args, nodes))
        if dist.get_rank() != 0:
            return 0 if outcome.links is not None else 1
        environment = describe_machine(args.device) | {"network": "this cluster"}
        shown = _report(args, Console(highlight=False), outcome, nodes, local, "this cluster", environment)
        return 0 if shown else 1
    finally:
        dist.destroy_process_group()


def _plan(args: argparse.Namespace, nodes: int) -> Plan:
    return Plan(
        nodes=nodes,
        device=args.device,
        time_limit=args.time_limit,
        message_bytes=round(args.message_mb * 2**20),
        pairwise=args.pairwise and nodes > 1,
        exchanges=tuple(name for name in EXCHANGES if name in args.only) if args.check else (),
        elements=args.elements_m * 1e6,
        steps=args.steps,
    )


def _report(
    args: argparse.Namespace,
    console: Console,
    outcome: Outcome,
    nodes: int,
    ranks: int,
    network: str,
    environment: dict[str, Any],
) -> bool:
    """Print an outcome and write it; returns whether there is one."""
    title = f"{Mesh(nodes, ranks, 0)}, {network}"
    if outcome.links is None:
        console.print(f"[red]{title}: the links could not be measured.[/] A rank has said why, above.")
        return False
    console.print(links_table(outcome.links, f"{title} (probe: {outcome.probe_seconds:.1f} s)"))
    for line in (*pairwise_lines(outcome.links), algorithm_line(outcome.links), ""):
        console.print(line, soft_wrap=True)
    if outcome.checks:
        console.print(check_table(outcome.checks, f"{title}, {args.elements_m:g} M float32 gradients"))
        console.print(LEGEND, check_line(outcome.checks), "", sep="\n", soft_wrap=True)
    if args.json:
        arguments = {
            "nodes": nodes,
            "ranks": ranks,
            "mbit": args.mbit,
            "message_mb": args.message_mb,
            "device": args.device,
            "elements_m": args.elements_m,
            "steps": args.steps,
        }
        write_json(args.json, to_json(outcome, arguments, environment))
        console.print(f"written: {args.json}", soft_wrap=True, markup=False)
    return True


def _check(args: argparse.Namespace, nodes: int, ranks: int) -> None:
    """Refuse what the parser alone cannot see to be wrong."""
    error = args.parser.error
    if nodes * ranks == 1:
        error("arguments --nodes 1 --ranks 1: a single rank has no links, raise one of them")
    if nodes == 1 and any(args.mbit or []):
        error("argument --mbit: with --nodes 1 there is no link to shape; raise --nodes, or leave --mbit out")
    if args.json and len(args.mbit or (_DEFAULT_CHECK_MBIT if args.check and nodes > 1 else [1])) > 1:
        error("argument --json: the file describes one cluster, so give --mbit one rate")
    if args.device == "cuda":
        error("argument --device: emulated hosts have no GPUs of their own; start it under torchrun")
    try:
        EmulatedHosts(nodes)
    except ValueError as reason:
        error(f"argument --nodes: {reason}")


def _rates(args: argparse.Namespace, nodes: int, console: Console) -> list[float | None]:
    """The rates to measure at, after a word on those that cannot be had."""
    reason = loopback_reason(nodes)
    if reason is None:
        return list(dict.fromkeys(args.mbit or (_DEFAULT_CHECK_MBIT if args.check else [_DEFAULT_MBIT])))
    if nodes > 1:
        console.print(
            f"[yellow]No emulated hosts: {escape(reason)}.[/] All ranks run on the loopback of this machine, whose "
            "links cannot be shaped. With root on Linux (and iproute2) hosts are emulated."
        )
    return [None]
