"""The command line of ``danon-bench recall``."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from danon_lightning.arguments import (
    add_modules,
    add_output_files,
    length,
    natural,
    positive_float,
    positive_int,
)
from danon_lightning.benchmark.environment import describe_machine
from danon_lightning.benchmark.json_file import write_json
from danon_lightning.benchmark.plotting import missing_reason
from danon_lightning.benchmark.progress import ProgressDisplay
from danon_lightning.benchmark.recall.export import to_json
from danon_lightning.benchmark.recall.measurement import Setting, train_all
from danon_lightning.benchmark.recall.model import Matched, matched
from danon_lightning.benchmark.recall.mqar import MQAR
from danon_lightning.benchmark.recall.plot import save_plot
from danon_lightning.benchmark.recall.report import LEGEND, notes, parameter_lines, result_tables, summary_line
from danon_lightning.benchmark.recall.results import Budget, Run
from danon_lightning.benchmark.recall.settings import FULL, SIZES, Sizes, trained_settings
from danon_lightning.benchmark.recall.tasks import BYTES, TextData

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# Tokens of the vocabulary for each pair, unless told otherwise.
_TOKENS_PER_PAIR = 8

_DESCRIPTION = """\
Trains small models that differ in their attention only, and measures what they have learned: "mqar" is multi-query
associative recall (Arora et al. 2023), the share of queries answered with the value that the key had; "text" is bits a
byte on the sources of Python's standard library, on files that were held out.

All models have as many parameters as that with full attention, within 3 %, which the width of their MLP is adjusted
for. Every one is trained with several seeds, always to the last step: what looks solved on the way may fall back. Then
each is trained again for as long as full attention took, in as many steps as fit."""

_EXAMPLES = """\
examples:
  danon-bench recall                                             128 tokens, 8 pairs, 500 steps, 5 seeds
  danon-bench recall --length 256 --pairs 16 --steps 750         harder
  danon-bench recall --task text --json text.json --plot text.png
  danon-bench recall --variants full msra --seeds 1 --no-equal-time
  danon-bench recall --length 256 --pairs 16 --set msra.block_size=32
  danon-bench recall --import my_package.my_variant --variants full my_variant

The same seed gives the same figures on the same machine, whatever runs beside it; times are not the same. The exit code
is 1 if a run failed, 0 otherwise."""


def add_parser(subparsers: "Subparsers") -> None:
    """Add the subcommand."""
    known = trained_settings()
    width = max(map(len, known))
    listed = "\n".join(f"  {label:{width}}  {setting.description}" for label, setting in known.items())
    parser = subparsers.add_parser(
        "recall",
        help="attention mechanisms: recall and bits a byte at equal parameters, steps and time",
        description=_DESCRIPTION,
        epilog=f"what can be trained:\n{listed}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=list(SIZES), default="mqar", help="default: %(default)s")
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help='what to train, of the list below (default: all); equal time needs "full"',
    )
    add_modules(parser)
    parser.add_argument(
        "--seeds", type=positive_int, default=5, metavar="N", help="trainings of each, with a seed each (default: 5)"
    )
    parser.add_argument(
        "--first-seed", type=natural, default=0, metavar="N", help="others follow from here (default: 0)"
    )
    parser.add_argument("--length", type=length, metavar="N", help=f"tokens of a sequence ({_default('length')})")
    parser.add_argument("--steps", type=positive_int, metavar="N", help=f"({_default('steps')})")
    parser.add_argument("--batch", type=positive_int, metavar="N", help=f"sequences of a batch ({_default('batch')})")
    parser.add_argument("--layers", type=positive_int, metavar="N", help=f"({_default('layers')})")
    parser.add_argument("--hidden", type=positive_int, metavar="D", help=f"model width ({_default('hidden')})")
    parser.add_argument("--heads", type=positive_int, metavar="H", help=f"({_default('heads')})")
    parser.add_argument(
        "--learning-rate", type=positive_float, metavar="RATE", help=f"its peak ({_default('learning_rate')})"
    )
    parser.add_argument("--pairs", type=positive_int, default=8, metavar="N", help="of mqar (default: %(default)s)")
    parser.add_argument(
        "--vocabulary", type=positive_int, metavar="N", help=f"tokens of mqar (default: {_TOKENS_PER_PAIR} a pair)"
    )
    parser.add_argument(
        "--generator",
        choices=["uniform", "zoology"],
        default="uniform",
        help='of mqar: "uniform": queries anywhere, blanks between them; "zoology": as published, most queries soon '
        "after the pairs, random tokens between them (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        type=_field,
        nargs="+",
        default=[],
        metavar="NAME.FIELD=VALUE",
        dest="changes",
        help="fields of the configs to set otherwise than here for the task; those of a component also in the hybrid",
    )
    parser.add_argument(
        "--equal-time",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether to train again in the time of full attention (default: yes)",
    )
    parser.add_argument(
        "--jobs", type=positive_int, metavar="N", help="trainings at the same time (default: as many as cores)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    add_output_files(parser, "the figure against steps")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Train what the arguments say, and print it.

    Args:
        args: Parsed arguments of this subcommand.

    Returns:
        The exit code: 1 if a run failed, else 0.
    """
    labels = _check(args)
    sizes = _sizes(args)
    task = _task(args, sizes)
    changed = _by_label(args.changes)
    models = _models(args, labels, sizes, BYTES if task is None else task.vocabulary, changed)
    console = Console(highlight=False)
    environment = describe_machine(args.device)
    jobs = args.jobs or (1 if args.device == "cuda" else environment["cores"])
    setting = Setting(task, sizes, range(args.first_seed, args.first_seed + args.seeds), jobs, args.device)
    arguments = {
        "task": args.task,
        "variants": labels,
        "seeds": args.seeds,
        "first_seed": args.first_seed,
        "jobs": jobs,
        "equal_time": args.equal_time,
        "sizes": asdict(sizes),
        "mqar": None if task is None else asdict(task),
        "modules": args.modules,
        "set": changed,
    }
    title = _title(args, sizes, task)
    console.print(
        f"torch {environment['torch']}, {environment['processor']}, {jobs} at the same time\n{title}\n\n{LEGEND}\n",
        *parameter_lines(models),
        "",
        sep="\n",
        markup=False,
    )

    runs: list[Run] = []

    def keep(ended: Run) -> None:
        runs.append(ended)
        if args.json:  # each time: who interrupts the rest keeps this
            write_json(args.json, to_json(arguments, environment, models, runs, args.task))

    budgets: list[Budget] = ["steps", "time"] if args.equal_time and FULL in labels else ["steps"]
    with ProgressDisplay(console, len(budgets) * len(models) * args.seeds - (len(budgets) - 1) * args.seeds) as display:
        for budget in budgets:
            before = len(runs)

            def show(subject: str, detail: str, done: int, *, before: int = before, budget: str = budget) -> None:
                display.show(f"equal {budget}: {subject}", detail, before + done)

            train_all(models, setting, budget, list(runs), show=show, keep=keep)
    runs.sort(key=lambda run: (budgets.index(run.budget), labels.index(run.label), run.seed))
    if args.json:
        write_json(args.json, to_json(arguments, environment, models, runs, args.task))
    console.print(*result_tables(runs, args.task), *notes(runs), "", sep="\n")
    if args.plot:
        save_plot(runs, args.task, title, args.plot)
    files = [file for file in (args.json, args.plot) if file]
    console.print(summary_line(runs, files), soft_wrap=True, markup=False)
    return 1 if any(run.status != "finished" for run in runs) else 0


def _check(args: argparse.Namespace) -> list[str]:
    """Refuse what the parser alone cannot see to be wrong, and return what is to be trained."""
    error = args.parser.error
    known = trained_settings()  # now, with what --import has brought
    unknown = [label for label in args.variants or [] if label not in known]
    if unknown:
        error(f"argument --variants: there is no {unknown[0]!r}: choose from {', '.join(known)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        error("argument --device: there is no CUDA device here")
    if args.plot and missing_reason():
        error(f"argument --plot: {missing_reason()}")
    for label, field, _ in args.changes:
        if label not in known:
            error(f"argument --set: there is no {label!r} to set {field!r} of: choose from {', '.join(known)}")
    return [label for label in known if args.variants is None or label in args.variants]


def _sizes(args: argparse.Namespace) -> Sizes:
    """The sizes of the task, with what was given in their place."""
    return Sizes(**{name: getattr(args, name) or default for name, default in asdict(SIZES[args.task]).items()})


def _task(args: argparse.Namespace, sizes: Sizes) -> MQAR | None:
    try:
        if args.task == "mqar":
            vocabulary = args.vocabulary or _TOKENS_PER_PAIR * args.pairs
            return MQAR(sizes.length, args.pairs, vocabulary, args.generator)
        # Once, before all runs do it at the same time.
        TextData(sizes.length, sizes.batch, seed=0)
    except (ValueError, OSError) as reason:
        args.parser.error(str(reason))
    return None


def _models(
    args: argparse.Namespace,
    labels: list[str],
    sizes: Sizes,
    vocabulary: int,
    changed: dict[str, dict[str, Any]],
) -> dict[str, Matched]:
    parser: argparse.ArgumentParser = args.parser
    try:
        return {label: matched(label, args.task, sizes, vocabulary, changed) for label in labels}
    except (TypeError, ValueError) as reason:
        parser.error(str(reason))


def _title(args: argparse.Namespace, sizes: Sizes, task: MQAR | None) -> str:
    what = f"{sizes.length} bytes" if task is None else f"{sizes.length} tokens, {task.pairs} pairs, {task.generator}"
    return (
        f"{args.task}, {what}; {sizes.layers} x D = {sizes.hidden}, H = {sizes.heads}; batch {sizes.batch}, "
        f"learning rate {sizes.learning_rate:g}, {args.seeds} seeds"
    )


def _field(text: str) -> tuple[str, str, Any]:
    """Read a field of the config of a line: the line, the field, and its value (JSON, or else text)."""
    name, equals, value = text.partition("=")
    label, dot, field = name.partition(".")
    if not (equals and dot and label and field):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME.FIELD=VALUE, such as msra.block_size=32")
    try:
        return label, field, json.loads(value)
    except ValueError:
        return label, field, value


def _by_label(changes: Sequence[tuple[str, str, Any]]) -> dict[str, dict[str, Any]]:
    changed: dict[str, dict[str, Any]] = {}
    for label, field, value in changes:
        changed.setdefault(label, {})[field] = value
    return changed


def _default(name: str) -> str:
    return "default: " + ", ".join(f"{getattr(sizes, name):g} for {task}" for task, sizes in SIZES.items())
