"""The command line of ``danon-bench attention``."""

import argparse
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from danon_lightning.arguments import (
    add_modules,
    add_output_files,
    format_length,
    length,
    positive_float,
    positive_int,
)
from danon_lightning.benchmark.attention.contenders import Contender, contenders
from danon_lightning.benchmark.attention.export import to_json
from danon_lightning.benchmark.attention.measurement import Setting, measure_length, measure_state
from danon_lightning.benchmark.attention.plot import save_plot
from danon_lightning.benchmark.attention.report import (
    DIRECTION_NAMES,
    LEGEND,
    notes,
    state_tables,
    summary,
    time_tables,
)
from danon_lightning.benchmark.attention.results import Row, StateRow
from danon_lightning.benchmark.environment import describe_machine
from danon_lightning.benchmark.json_file import write_json
from danon_lightning.benchmark.plotting import missing_reason
from danon_lightning.benchmark.progress import ProgressDisplay

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DEFAULT_LENGTHS = [2**power for power in range(10, 21)]
_DEFAULT_FIT = [16 * 1024, 256 * 1024]

_DESCRIPTION = """\
Measures what attention costs by the length of the sequence: time, memory, and the state of the streaming form. The
core alone is measured, on given q, k, v and x, batch 1, float32: projections and MLP are the same for all.

Each cell runs in a fresh process with one thread, so that what is killed for lack of memory loses only its own cell.
On CPU time is that of the processor, not of the clock, and memory is what the process holds; on CUDA time is that of
the clock, and memory what torch has allocated. What counts is the ratio to torch's full causal attention ("sdpa"),
which is measured at the same lengths in the same run. Where a run would take longer than --budget it is left out."""

_EXAMPLES = """\
examples:
  danon-bench attention                                             all of it, for some hours
  danon-bench attention --lengths 1k 4k 16k --repeats 5             shorter ones
  danon-bench attention --variants sdpa msra --direction forward --json run.json --plot run.png
  danon-bench attention --heads 1 --lengths 1M --direction forward  the memory of a million tokens
  danon-bench attention --import my_package.my_variant --variants sdpa my_variant

What cannot be measured gets a line that says why. The exit code is 1 if that was a failure of a variant of this
package, 0 otherwise."""


def add_parser(subparsers: "Subparsers") -> None:
    """Add the subcommand."""
    known = contenders()
    width = max(map(len, known))
    listed = "\n".join(f"  {contender.name:{width}}  {contender.description}" for contender in known.values())
    parser = subparsers.add_parser(
        "attention",
        help="attention mechanisms: time, memory and streaming state, by sequence length",
        description=_DESCRIPTION,
        epilog=f"what can be measured:\n{listed}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--lengths",
        type=length,
        nargs="+",
        default=_DEFAULT_LENGTHS,
        metavar="N",
        help="tokens, such as 4096, 16k or 1M (default: 1k 2k 4k ... 1M)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help='what to measure, of the list below (default: all); ratios need "sdpa"',
    )
    add_modules(parser)
    parser.add_argument(
        "--direction",
        choices=list(DIRECTION_NAMES),
        nargs="+",
        default=list(DIRECTION_NAMES),
        help='"forward": without a graph; "both": forward and the gradients of all inputs and parameters '
        "(default: one after the other)",
    )
    parser.add_argument("--heads", type=positive_int, default=4, metavar="H", help="default: %(default)s")
    parser.add_argument("--head-dim", type=positive_int, default=64, metavar="D", help="default: %(default)s")
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=3,
        metavar="N",
        help="runs of a cell, of which the median counts: fewer where they exceed the budget, more where they are "
        "short (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=positive_float,
        default=100.0,
        metavar="SECONDS",
        help="a cell whose single run would take longer, as its shorter lengths have it, is left out; streaming ends "
        "there too (default: %(default)g)",
    )
    parser.add_argument(
        "--memory-limit",
        type=positive_float,
        metavar="GB",
        help="what a cell may hold beyond its inputs, on CPU (default: most of what is free)",
    )
    parser.add_argument(
        "--fit",
        type=length,
        nargs=2,
        default=_DEFAULT_FIT,
        metavar=("FROM", "TO"),
        help="lengths over which growth exponents are fitted (default: 16k 256k)",
    )
    parser.add_argument(
        "--state",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether to measure streaming (default: yes)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    add_output_files(parser, "all figures")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments say, and print it.

    Args:
        args: Parsed arguments of this subcommand.

    Returns:
        The exit code: 1 if a registered variant failed, else 0.
    """
    chosen = _check(args)
    console = Console(highlight=False)
    memory_limit = None if args.memory_limit is None else int(args.memory_limit * 1e9)
    setting = Setting(args.heads, args.head_dim, args.device, args.repeats, args.budget, memory_limit)
    lengths = sorted(set(args.lengths))
    directions = [direction for direction in DIRECTION_NAMES if direction in args.direction]
    fit = (args.fit[0], args.fit[1])
    environment = describe_machine(args.device)
    arguments = {
        "variants": [contender.name for contender in chosen],
        "lengths": lengths,
        "directions": directions,
        "fit": list(fit),
        **{name: getattr(args, name) for name in ("heads", "head_dim", "repeats", "budget", "memory_limit", "modules")},
    }
    title = f"H = {args.heads}, d = {args.head_dim}, float32, {environment.get('gpu', 'one thread')}"
    console.print(f"torch {environment['torch']}, {environment['processor']}\n\n{LEGEND}\n", markup=False)

    rows: list[Row] = []
    states: list[StateRow] = []

    def keep() -> None:
        if args.json:  # each time: who interrupts the rest keeps this
            write_json(args.json, to_json(arguments, environment, rows, states, fit))

    streaming = [contender for contender in chosen if contender.ours] if args.state else []
    cells = len(directions) * len(lengths) * len(chosen)
    with ProgressDisplay(console, cells + len(streaming)) as display:
        for direction in directions:
            for tokens in lengths:
                subject = f"{DIRECTION_NAMES[direction]}, {format_length(tokens)}"
                order = {contender.name: len(rows) + i for i, contender in enumerate(chosen)}
                show = partial(_show, display, subject, order)
                rows += measure_length(chosen, tokens, direction, setting, rows, show)
                keep()
            measured = [row for row in rows if row.direction == direction]
            console.print(*time_tables(rows, direction, fit, title), *notes(measured), "", sep="\n")
        for index, contender in enumerate(streaming):
            display.show("streaming", contender.name, cells + index)
            states += measure_state(contender, lengths, setting)
            keep()
    if states:
        cache_bytes = 2 * args.heads * args.head_dim * 4
        console.print(*state_tables(states, cache_bytes, title), *notes(states), "", sep="\n")
    if args.plot:
        save_plot(rows, states, [contender.name for contender in chosen if contender.ours], title, args.plot)
    files = [file for file in (args.json, args.plot) if file]
    console.print(summary([*rows, *states], files), soft_wrap=True, markup=False)
    return 1 if _any_of_ours_failed([*rows, *states], {contender.name: contender for contender in chosen}) else 0


def _show(display: ProgressDisplay, subject: str, order: Mapping[str, int], contender: str) -> None:
    display.show(subject, contender, order[contender])


def _check(args: argparse.Namespace) -> list[Contender]:
    """Refuse what the parser alone cannot see to be wrong, and return what is to be measured."""
    error = args.parser.error
    known: dict[str, Contender] = contenders()  # now, with what --import has brought
    unknown = [name for name in args.variants or [] if name not in known]
    if unknown:
        error(f"argument --variants: there is no {unknown[0]!r}: choose from {', '.join(known)}")
    if args.fit[0] >= args.fit[1]:
        error("argument --fit: the first length must be the smaller one")
    if args.head_dim % 2:
        error(f"argument --head-dim: {args.head_dim} is odd, and positions are rotated in pairs; use an even number")
    if args.device == "cuda" and not torch.cuda.is_available():
        error("argument --device: there is no CUDA device here")
    if args.plot and missing_reason():
        error(f"argument --plot: {missing_reason()}")
    return [contender for name, contender in known.items() if args.variants is None or name in args.variants]


def _any_of_ours_failed(rows: list[Row | StateRow], chosen: Mapping[str, Contender]) -> bool:
    """Whether a registered variant was not measured for another reason than time."""
    return any(chosen[row.contender].ours and row.status in ("crashed", "killed", "too slow") for row in rows)
