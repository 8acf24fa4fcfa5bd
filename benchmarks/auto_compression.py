"""Is ``compression="auto"`` right? What it chooses, beside all that it could have chosen, measured on the same links.

    python benchmarks/auto_compression.py --json auto.json --plot auto.png        # as root on Linux; half an hour
    python benchmarks/auto_compression.py --models embeddings --mbit 1000 0       # a part of it
    python benchmarks/auto_compression.py --models convolutions --mbit 100 --no-changes --seconds 5

Two emulated hosts of two ranks train three models of different character, at each rate with plain DDP, with each
candidate of "auto", and with "auto" itself, from its first step on. Once that has settled, all take turns of half
a second (a multiple of the steps that lie between two looks of "auto", so that it pays for each), again and again:
whatever else the machine does disturbs them alike. A step counts as long as it takes the slowest rank; of the ratios
to the turn of "auto" in the same round the median counts. What is clearly slower than the best has few turns. Which
candidate is the best is told by one half of the rounds, and how it compares by the other half.

Then, for each model, "auto" trains on while the rate of the links changes, from the slowest to each other one and back.

What should come out: "auto" takes at most 1.05 times as long as the best of its candidates and as plain DDP, and 20
steps after a change of bandwidth it has a choice of which the same can be said, and another 40 steps later too. What
it tries in between is part of the time that it takes.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from auto_compression_ranks import ANSWER_STEPS, AUTO, BLOCK_STEPS, DDP, KINDS, Plan, measure
from rich.console import Console
from rich.table import Table

import danon_lightning
from danon_lightning.arguments import add_output_files, positive_float, positive_int, rate
from danon_lightning.benchmark.environment import describe_environment
from danon_lightning.benchmark.json_file import write_json
from danon_lightning.benchmark.network import format_rate
from danon_lightning.benchmark.plotting import missing_reason
from danon_lightning.testing import EmulatedHosts, run_distributed

NODES, RANKS = 2, 2
TARGET = 1.05


@dataclass(frozen=True)
class Verdict:
    """What is to be said of "auto" with one model at one rate.

    Attributes:
        seconds: Step by name.
        best: The candidate that was measured as the fastest.
        to_best: Step by name, as a multiple of the fastest candidate's: of the one that is the fastest in one half of
            the rounds, measured in the other half; the mean of both ways. The fastest of eight in the same rounds owes
            part of its lead to luck.
        to_ddp: Step of "auto" as a multiple of plain DDP's.
        choice: The candidate that "auto" had chosen. What ``to_best`` has more for "auto" is what it costs to choose.
    """

    seconds: dict[str, float]
    best: str
    to_best: dict[str, float]
    to_ddp: float
    choice: str


def verdict_of(found: Mapping[str, Any]) -> Verdict:
    """Compare what the ranks have measured of one model at one rate.

    Each turn is held against that of "auto" in the same round, as a machine is faster at one time than at another; of
    these ratios the median counts.
    """
    turns = found["turns"]
    to_auto = {
        name: [own / of_auto for own, of_auto in zip(seconds, turns[AUTO], strict=False)]
        for name, seconds in turns.items()
    }
    usual = {name: statistics.median(ratios) for name, ratios in to_auto.items()}
    # A single round is both halves.
    halves = [
        {name: statistics.median(ratios[half::2] or ratios) for name, ratios in to_auto.items()} for half in (0, 1)
    ]
    in_the_race = [name for name in turns if name not in (DDP, AUTO) and len(turns[name]) == len(turns[AUTO])]
    bests = [min(in_the_race, key=half.__getitem__) for half in halves]
    return Verdict(
        {name: statistics.median(turns[AUTO]) * ratio for name, ratio in usual.items()},
        min(in_the_race, key=usual.__getitem__),
        {name: (halves[1][name] / halves[1][bests[0]] + halves[0][name] / halves[0][bests[1]]) / 2 for name in turns},
        1 / usual[DDP],
        found["choice"],
    )


def is_right(change: Mapping[str, Any], verdicts: Mapping[float | None, Verdict]) -> bool:
    """Whether a change of bandwidth was answered in time, and for good, by what the measured medians say is right."""
    at_rate = verdicts[change["to"]]
    return max(at_rate.to_best[change[when]] for when in ("answer", "choice")) <= TARGET


class Listener:
    """Does what rank 0 asks for, and prints what it says, while the ranks run."""

    def __init__(self, folder: str, hosts: EmulatedHosts | None, console: Console) -> None:
        """Take the folder through which rank 0 speaks."""
        self._folder, self._hosts, self._console = Path(folder), hosts, console
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    def _run(self) -> None:
        while not self._ended.wait(0.01):
            for path in sorted(self._folder.glob("*.json")):
                said = json.loads(path.read_text())
                if "say" in said:
                    self._console.print(said["say"], highlight=False)
                elif self._hosts is not None:
                    self._hosts.set_rate(said["mbit"])
                path.unlink()

    def __enter__(self) -> "Listener":
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End."""
        self._ended.set()
        self._thread.join()


def table_of(model: Mapping[str, Any], found: Mapping[str, Any], verdict: Verdict) -> Table:
    """All ways to exchange of one model at one rate, measured and, where "auto" knows them, predicted."""
    table = Table(
        title=f"{model['model']}, {model['parameters'] / 1e6:.1f} M parameters, {format_rate(found['mbit'])}",
        title_justify="left",
    )
    table.add_column("exchange", no_wrap=True)
    for heading in ("s/step", "best ÷", "ddp ÷", "predicted", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = verdict.seconds[verdict.best]
    for name, seconds in verdict.seconds.items():
        predicted = found["predicted"].get(name)
        table.add_row(
            f"auto: {found['choice']}" if name == AUTO else name,
            f"{seconds:.4f}",
            f"{best / seconds:.2f}",
            f"{verdict.seconds[DDP] / seconds:.2f}",
            "-" if predicted is None else f"{predicted:.4f}",
            "-" if predicted is None else f"{predicted / seconds - 1:+.0%}",
        )
    steps = len(found["first_seconds"])
    table.caption = (
        f"auto ÷ best fixed ({verdict.best}) = {verdict.to_best[AUTO]:.3f}, auto ÷ ddp = {verdict.to_ddp:.3f}; what it "
        f"has chosen ÷ best = {verdict.to_best[verdict.choice]:.3f}. Settled after {found['settled_after']} steps; to "
        f"set up took {found['setup_seconds']:.1f} s longer than dense, and the first {steps} steps "
        f"{found['lost_seconds']:.1f} s longer than as many later ones."
    )
    table.caption_justify = "left"
    return table


def changes_table(model: Mapping[str, Any], verdicts: Mapping[float | None, Verdict]) -> Table:
    """What became of one model's changes of bandwidth."""
    table = Table(title=f"{model['model']}, bandwidth changed in mid-run", title_justify="left")
    for heading in ("bandwidth", "before", f"+{ANSWER_STEPS} steps", "÷ best", "at last", ""):
        table.add_column(heading, no_wrap=True)
    for one in model["changes"]:
        at_rate = verdicts[one["to"]]
        table.add_row(
            f"{format_rate(one['from'])} to {format_rate(one['to'])}", one["choice_before"], one["answer"],
            f"{at_rate.to_best[one['answer']]:.3f}", one["choice"],
            "right" if is_right(one, verdicts) else "WRONG",
        )  # fmt: skip
    return table


def summary(models: Sequence[Mapping[str, Any]], verdicts: Mapping[str, Mapping[float | None, Verdict]]) -> list[str]:
    """How often what should come out has come out."""
    all_verdicts = [verdict for by_rate in verdicts.values() for verdict in by_rate.values()]
    changes = [is_right(one, verdicts[model["model"]]) for model in models for one in model["changes"]]
    lines = [
        f"auto within {TARGET} of the best fixed choice: {sum(v.to_best[AUTO] <= TARGET for v in all_verdicts)} of "
        f"{len(all_verdicts)} (at worst {max(v.to_best[AUTO] for v in all_verdicts):.3f})",
        f"auto within {TARGET} of plain DDP: {sum(v.to_ddp <= TARGET for v in all_verdicts)} of {len(all_verdicts)} "
        f"(at worst {max(v.to_ddp for v in all_verdicts):.3f})",
    ]
    if changes:
        lines.append(
            f"changes of bandwidth answered within {ANSWER_STEPS} steps, by a choice within {TARGET} of the best: "
            f"{sum(changes)} of {len(changes)}"
        )
    return lines


def save_plot(
    models: Sequence[Mapping[str, Any]], verdicts: Mapping[str, Mapping[float | None, Verdict]], path: Path
) -> None:
    """Draw steps as bars, a chart for each model and rate; marks are predictions."""
    from matplotlib.figure import Figure

    rates = [found["mbit"] for found in models[0]["rates"]]
    figure = Figure(figsize=(5 * len(rates), 3.2 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), len(rates), squeeze=False)
    for row, model in zip(grid, models, strict=True):
        for axes, found in zip(row, model["rates"], strict=True):
            seconds = verdicts[model["model"]][found["mbit"]].seconds
            names = [f"auto: {found['choice']}" if name == AUTO else name for name in seconds]
            colors = ["black" if name == DDP else "tab:orange" if name == AUTO else "tab:blue" for name in seconds]
            axes.barh(names, list(seconds.values()), color=colors)
            predicted = [(place, found["predicted"].get(name)) for place, name in enumerate(seconds)]
            known = [(place, value) for place, value in predicted if value is not None]
            axes.plot([value for _, value in known], [place for place, _ in known], "|", color="red", markersize=12)
            axes.invert_yaxis()
            axes.set(title=f"{model['model']}, {format_rate(found['mbit'])}", xlabel="seconds a step (red: predicted)")
    figure.savefig(path, format="png", dpi=110)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(KINDS), default=list(KINDS), help="which (default: all)")
    add("--mbit", type=rate, nargs="+", help="rates of each host's link, 0 for unshaped (default: 100 1000 0)")
    add("--rounds", type=positive_int, default=4, help="turns of each exchange, at least (default: %(default)s)")
    add("--seconds", type=positive_float, default=90, help="that turns go on for, at least (default: %(default)s)")
    add("--settle", type=positive_int, default=60, help='steps that "auto" has to settle (default: %(default)s)')
    add("--no-changes", action="store_true", help="leave out the changes of bandwidth")
    add("--timeout", type=positive_float, default=3600, help="seconds for all (default: %(default)s)")
    add_output_files(parser, "step times")
    args = parser.parse_args(arguments)
    unavailable = EmulatedHosts.unavailable_reason()
    if args.mbit and unavailable:
        parser.error(f"argument --mbit: without emulated hosts links cannot be shaped ({unavailable})")
    if args.settle < ANSWER_STEPS:
        parser.error(f"argument --settle: give at least the {ANSWER_STEPS} steps in which a change is to be answered")
    if args.plot and missing_reason():
        parser.error(f"argument --plot: {missing_reason()}")
    args.models, args.mbit = list(dict.fromkeys(args.models)), list(dict.fromkeys(args.mbit or [100.0, 1000.0, None]))
    return args


def main() -> None:
    """Measure and print."""
    args = parsed()
    console = Console(highlight=False)
    unavailable = EmulatedHosts.unavailable_reason()
    if unavailable is not None:
        console.print(f"No emulated hosts ({unavailable}): all ranks on the loopback of this machine, unshaped.")
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        nullcontext() if unavailable else EmulatedHosts(NODES) as hosts,
        Listener(folder, hosts, console),
    ):
        plan = Plan(
            NODES, tuple(args.models), None if unavailable else tuple(args.mbit), args.rounds, args.seconds,
            args.settle, not args.no_changes, folder,
        )  # fmt: skip
        models = run_distributed(measure, NODES * RANKS, plan, timeout=args.timeout, ranks_per_node=RANKS, hosts=hosts)[
            0
        ]
    verdicts = {model["model"]: {one["mbit"]: verdict_of(one) for one in model["rates"]} for model in models}
    for model in models:
        by_rate = verdicts[model["model"]]
        for found in model["rates"]:
            console.print(table_of(model, found, by_rate[found["mbit"]]))
            for step, _, sentence in found["decisions"]:
                console.print(f"  step {step}: {sentence}", soft_wrap=True)
        if model["changes"]:
            console.print(changes_table(model, by_rate))
            for text in model["changes"][0]["warnings"]:
                console.print(f"  warning: {text}", soft_wrap=True)
    for line in summary(models, verdicts):
        console.print(line, soft_wrap=True)
    console.print(f"It took {(time.perf_counter() - start) / 60:.1f} minutes.")
    if args.json:
        write_json(args.json, {
            "benchmark": "auto_compression", "version": danon_lightning.__version__,
            "environment": describe_environment(), "block_steps": BLOCK_STEPS,
            "arguments": {key: value for key, value in vars(args).items() if key not in ("json", "plot")},
            "models": models,
            "verdicts": {
                name: [{"mbit": mbit, **asdict(one)} for mbit, one in by_rate.items()]
                for name, by_rate in verdicts.items()
            },
        })  # fmt: skip
    if args.plot:
        save_plot(models, verdicts, args.plot)


if __name__ == "__main__":
    main()
