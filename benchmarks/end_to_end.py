"""Time to the same quality: a language model trained over slow links, with each way to exchange its gradients.

    python benchmarks/end_to_end.py                                    # as root on Linux; an hour on two cores
    python benchmarks/end_to_end.py --mbit 100 --runs int8 topk@1.5 periodic --json run.json --plot run.png
    python benchmarks/end_to_end.py --runs compression=powersgd,bucket_cap_mb=5 every_n_steps=100,compression=int8

Two emulated hosts of two ranks train full attention on the text of Python's own standard library, by Lightning, from
the same weights on the same batches. What is compared is how long each run trains until its validation loss is within
``--tolerance`` of what dense gradients reach in the end, and how many bytes leave a host until then. Time counts from
the first step, set-up and validation left out.

A run is "ddp", "dense", a compressor, "auto", "async", "periodic", or arguments of DanonHybridStrategy; "@1.5" gives it
half as many steps again. The optimizer is AdamW, but OneBitAdam for "sign", which AdamW does not tolerate. Dense
gradients and plain DDP are always among them. What a run learns in so many steps does not depend on the rate of the
links; so each is trained once, at the first rate, and at the others ``--timed-steps`` are timed, whose losses must be
those of the whole run. DDP averages the same gradients as the dense exchange, in another order: it too is timed only,
and its losses are compared with the dense ones. ``--full`` trains all in full. ``--learned FILE`` keeps what runs have
learned: what is in it is only timed the next time.
"""

import argparse
import ast
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

import danon_lightning
from danon_lightning.arguments import output_file, positive_float, positive_int
from danon_lightning.benchmark.environment import describe_environment
from danon_lightning.benchmark.network import format_rate
from danon_lightning.data import ByteTextDataModule
from danon_lightning.models import FullAttentionLightning
from danon_lightning.strategies import DanonHybridStrategy, PeriodicSync, available_compressors
from danon_lightning.testing import EmulatedHosts, run_distributed

NODES, RANKS = 2, 2
# Memory is touched for the first time, and thresholds settle.
WARMUP_STEPS = 3
# Replicas that never synchronise show what a step computes.
ALONE = "alone"
# What a run may say of its periods.
PERIODIC = [field.name for field in fields(PeriodicSync)]


@dataclass(frozen=True)
class Sizes:
    """The model, the data, and how long it is trained."""

    width: int
    layers: int
    context: int
    batch: int
    steps: int
    validate_every: int
    validation_windows: int
    learning_rate: float
    seed: int


@dataclass
class Trained:
    """What one rank has seen of a run: points of its validation, and what its steps took and lost."""

    points: list[tuple[int, float, float]] = field(default_factory=list)  # step, seconds, bits/byte
    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sent: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class Result:
    """One run at one rate."""

    name: str
    mbit: float
    step_seconds: float
    megabytes_a_step: float
    curve: list[tuple[int, float, float]]
    source: str
    seconds_to_target: float | None = None
    megabytes_to_target: float | None = None


def strategy_of(name: str) -> Any:
    """What to give a Trainer as strategy.

    Raises:
        ValueError: If there is no such thing.
    """
    name = name.partition("@")[0]
    if name == "ddp":
        return "ddp"
    if name == ALONE:
        return DanonHybridStrategy(sync_mode=PeriodicSync(every_n_steps=10**9))
    options: dict[str, Any] = {}
    if "=" not in name:
        name = {"dense": "compression=None", "async": "sync_mode=async", "periodic": "sync_mode=periodic"}.get(
            name, f"compression={name}"
        )
    for part in name.split(","):
        key, _, value = part.partition("=")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            options[key] = value
    periodic = {name: options.pop(name) for name in PERIODIC if name in options}
    if periodic:
        options["sync_mode"] = PeriodicSync(**periodic)
    try:
        return DanonHybridStrategy(**options)
    except TypeError as error:
        raise ValueError(str(error)) from error


def steps_of(name: str, steps: int) -> int:
    """Optimizer steps of a run."""
    return round(steps * float(name.partition("@")[2] or 1))


def depends_on_time(name: str) -> bool:
    """Whether what a run learns, or what its steps take, cannot be told from a few of them."""
    return any(word in name for word in ("auto", "periodic", "sign", *PERIODIC))


def train(name: str, sizes: Sizes, stop_after: int | None) -> Trained:
    """Runs on each rank."""
    torch.set_num_threads(1)
    pl.seed_everything(sizes.seed, verbose=False)
    steps = steps_of(name, sizes.steps)
    model = FullAttentionLightning(
        {"hidden_size": sizes.width, "num_layers": sizes.layers, "num_heads": 8, "max_sequence_length": sizes.context},
        {
            "name": "onebit_adam" if "sign" in name else "adamw",
            "learning_rate": sizes.learning_rate,
            "warmup_steps": max(1, steps // 20),
        },
    )
    data = ByteTextDataModule(
        context_length=sizes.context,
        global_batch_size=sizes.batch,
        val_windows=sizes.validation_windows,
        seed=sizes.seed,
    )
    recorder = Recorder(stop_after)
    trainer = pl.Trainer(
        accelerator="cpu", strategy=strategy_of(name), devices=RANKS, num_nodes=NODES, max_steps=steps,
        val_check_interval=sizes.validate_every, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        limit_val_batches=0 if stop_after else None, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[recorder],
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    recorder.trained.parameters = sum(parameter.numel() for parameter in model.parameters())
    return recorder.trained


class Recorder(pl.Callback):
    """Notes time, bytes and losses while a run trains, not while it validates."""

    def __init__(self, stop_after: int | None) -> None:
        """Take after how many steps to stop; None for all."""
        self.trained = Trained()
        self._stop_after = stop_after
        [self._file] = (
            path / "statistics" / "tx_bytes" for path in Path("/sys/class/net").iterdir() if path.name != "lo"
        )
        self._seconds = 0.0

    def on_train_start(self, *args: Any) -> None:
        """Start the clock."""
        self._resume()

    def on_validation_start(self, *args: Any) -> None:
        """Stop it."""
        self._pause()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note the point, and start it again."""
        bits = float(trainer.callback_metrics["val/bits_per_byte"])
        self.trained.points.append((trainer.global_step, self._seconds, bits))
        self._resume()

    def on_train_batch_start(self, *args: Any) -> None:
        """Begin a step."""
        self._step_start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        """End it."""
        self.trained.step_seconds.append(time.perf_counter() - self._step_start)
        self.trained.losses.append(float(outputs["loss"]))
        if self._stop_after is not None and trainer.global_step >= self._stop_after:
            trainer.should_stop = True

    def on_train_end(self, *args: Any) -> None:
        """Stop the clock for good."""
        self._pause()

    def _resume(self) -> None:
        self._start, self._sent = time.perf_counter(), int(self._file.read_text())

    def _pause(self) -> None:
        self._seconds += time.perf_counter() - self._start
        self.trained.sent += int(self._file.read_text()) - self._sent


def first_below(curve: Sequence[tuple[int, float, float]], target: float) -> tuple[float, float] | None:
    """Step and seconds at which a curve first comes down to a target, on straight lines between its points."""
    before = None
    for step, seconds, bits in curve:
        if bits <= target:
            if before is None or before[2] == bits:
                return float(step), seconds
            share = (before[2] - target) / (before[2] - bits)
            return before[0] + share * (step - before[0]), before[1] + share * (seconds - before[1])
        before = step, seconds, bits
    return None


def loss_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of two runs' losses over the steps that both have, as a share of the loss."""
    return max((abs(a - b) / abs(b) for a, b in zip(one, other, strict=False)), default=0.0)


def mean_step(trained: Trained) -> float:
    """Mean step without the warm-up."""
    counted = trained.step_seconds[WARMUP_STEPS:] or trained.step_seconds
    return sum(counted) / len(counted)


def write_learned(file: Path, sizes: Sizes, runs: dict[str, list[Trained]]) -> None:
    """Keep what runs have learned."""
    content = {"sizes": asdict(sizes), "runs": {name: [asdict(rank) for rank in ranks] for name, ranks in runs.items()}}
    file.write_text(json.dumps(content) + "\n")


def read_learned(file: Path, sizes: Sizes) -> dict[str, list[Trained]]:
    """What was kept.

    Raises:
        ValueError: If it is of other sizes.
    """
    content = json.loads(file.read_text())
    if content["sizes"] != asdict(sizes):
        raise ValueError(f"{file} is of other sizes, {content['sizes']}: name another file, or give those")
    return {name: [Trained(**rank) for rank in ranks] for name, ranks in content["runs"].items()}


class Runs:
    """Trains what has to be trained, and times the rest."""

    def __init__(self, args: argparse.Namespace, sizes: Sizes, hosts: EmulatedHosts) -> None:
        """Take what all runs have in common."""
        self._sizes, self._timed_steps, self._full = sizes, args.timed_steps, args.full
        self._hosts, self._timeout, self._file = hosts, args.timeout, args.learned
        # By name, then by rank.
        self.whole = read_learned(args.learned, sizes) if args.learned and args.learned.exists() else {}

    def run(self, name: str, mbit: float) -> Result:
        """One run at one rate, at which the links already are."""
        learned = "dense" if name == "ddp" else name
        whole = self._full or (learned not in self.whole and name != ALONE) or depends_on_time(name)
        ranks = run_distributed(
            train, NODES * RANKS, name, self._sizes, None if whole else self._timed_steps,
            timeout=self._timeout, hosts=self._hosts,
        )  # fmt: skip
        seconds = max(map(mean_step, ranks))
        megabytes = max(rank.sent for rank in ranks) / len(ranks[0].losses) / 1e6
        if name == ALONE:
            return Result(name, mbit, seconds, megabytes, [], "")
        if whole:
            self.whole[name] = ranks
            if self._file:
                write_learned(self._file, self._sizes, self.whole)
            return Result(name, mbit, seconds, megabytes, ranks[0].points, "trained at this rate")
        known = self.whole[learned]
        difference = max(loss_difference(a.losses, b.losses) for a, b in zip(ranks, known, strict=True))
        source = f"{self._timed_steps} steps timed, all ranks' losses those of {learned} within {difference:.1e}"
        # As the whole run had it, its first steps took longer.
        start = sum(ranks[0].step_seconds[:WARMUP_STEPS]) - WARMUP_STEPS * seconds
        curve = [(step, start + step * seconds, bits) for step, _, bits in known[0].points]
        return Result(name, mbit, seconds, megabytes, curve, source)


def with_target(result: Result, target: float) -> Result:
    """The result with what it takes to come down to so many bits a byte."""
    found = first_below(result.curve, target)
    if found is None:
        return result
    step, seconds = found
    return replace(result, seconds_to_target=seconds, megabytes_to_target=step * result.megabytes_a_step)


def table_of(results: Sequence[Result], alone: Result, title: str) -> Table:
    """The figures at one rate; DDP is among them, and all others are compared with it. ``end``: bits a byte."""
    ddp = next(result for result in results if result.name == "ddp")
    table = Table(title=title, title_justify="left")
    table.add_column("run", overflow="fold", min_width=12)
    for heading in ("s/step", "target, s", "ddp ÷", "MB/step", "ddp ÷", "end"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in results:
        ratio = "-"
        if one.seconds_to_target and ddp.seconds_to_target:
            ratio = f"{ddp.seconds_to_target / one.seconds_to_target:.2f}"
        table.add_row(
            one.name,
            f"{one.step_seconds:.3f}",
            "never" if one.seconds_to_target is None else f"{one.seconds_to_target:.1f}",
            ratio,
            f"{one.megabytes_a_step:.3f}",
            f"{ddp.megabytes_a_step / one.megabytes_a_step:.1f}",
            f"{one.curve[-1][2]:.3f}" if one.curve else "-",
        )
    bound = ddp.step_seconds / alone.step_seconds
    table.caption = (
        f"A step computes for {alone.step_seconds:.3f} s without any exchange, so none that takes as many steps can be "
        f"more than {ddp.step_seconds:.3f} / {alone.step_seconds:.3f} = {bound:.1f} times as fast as DDP."
    )
    table.caption_justify = "left"
    return table


def save_plot(results: Sequence[Result], targets: dict[float, float], title: str, path: Path) -> None:
    """Draw bits a byte against seconds, a chart for each rate."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one.name for one in results if one.name != "ddp"))
    # There are ten colours; then come other marks.
    styles = {name: {"color": f"C{index % 10}", "marker": ".x+"[index // 10 % 3]} for index, name in enumerate(names)}
    styles["ddp"] = {"color": "black", "linestyle": "--", "marker": "."}
    figure = Figure(figsize=(7 * len(targets), 5), layout="constrained")
    for axes, (mbit, target) in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets.items(), strict=True):
        for one in results:
            if one.mbit == mbit and one.curve:
                _, seconds, bits = zip(*one.curve, strict=True)
                axes.plot(seconds, bits, label=one.name, **styles[one.name])
        axes.axhline(target, color="grey", linewidth=0.8, label="target")
        axes.set(xscale="log", xlabel="seconds of training", ylabel="validation bits a byte", title=format_rate(mbit))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(lambda x, position: f"{x:g}" if f"{x:e}"[0] in "25" else "")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, format="png", dpi=150)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    default_runs = [*available_compressors(), "powersgd@1.5", "auto", "async", "periodic"]
    add("--runs", nargs="+", default=default_runs, metavar="RUN", help=f"default: {' '.join(default_runs)}")
    add("--mbit", type=positive_float, nargs="+", default=[1000.0, 100.0], help="rates (default: 1000 100)")
    add("--steps", type=positive_int, default=400, help="optimizer steps (default: %(default)s)")
    add("--validate-every", type=positive_int, default=20, help="steps (default: %(default)s)")
    add("--validation-windows", type=positive_int, default=512, help="of a context each (default: %(default)s)")
    add("--timed-steps", type=positive_int, default=12, help="of what is not trained (default: %(default)s)")
    add("--learned", type=Path, metavar="FILE", help="keep what runs learn; what is there is only timed")
    add("--full", action="store_true", help="train everything at every rate")
    add("--tolerance", type=float, default=0.01, help="of the target above the dense run's end (default: 0.01)")
    add("--target", type=positive_float, help="bits a byte, in place of that")
    add("--width", type=positive_int, default=512, help="of the model, a multiple of 8 (default: %(default)s)")
    add("--layers", type=positive_int, default=2, help="default: %(default)s")
    add("--context", type=positive_int, default=32, help="bytes (default: %(default)s)")
    add("--batch", type=positive_int, default=8, help="windows of all ranks together (default: %(default)s)")
    add("--learning-rate", type=positive_float, default=1e-3, help="default: %(default)s")
    add("--seed", type=int, default=0)
    add("--timeout", type=positive_float, default=7200, help="seconds for a run (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE")
    add("--plot", type=output_file, metavar="FILE")
    args = parser.parse_args(arguments)
    for name in args.runs:
        try:
            strategy_of(name)
            if not steps_of(name, args.steps) >= args.validate_every:
                raise ValueError(f"it has fewer steps than --validate-every {args.validate_every}")
        except ValueError as error:
            parser.error(f"argument --runs: {name!r}: {error}")
    if args.timed_steps <= WARMUP_STEPS or args.timed_steps > args.steps:
        parser.error(f"argument --timed-steps: give more than the {WARMUP_STEPS} of the warm-up, and at most --steps")
    if args.batch % (NODES * RANKS):
        parser.error(f"argument --batch: {args.batch} windows cannot be shared out evenly among {NODES * RANKS} ranks")
    return args


def main() -> None:
    """Train and print."""
    args = parsed()
    sizes = Sizes(
        args.width, args.layers, args.context, args.batch, args.steps, args.validate_every, args.validation_windows,
        args.learning_rate, args.seed,
    )  # fmt: skip
    # Dense first: what DDP learns is taken from it.
    names = ["dense", "ddp", *(name for name in dict.fromkeys(args.runs) if name not in ("dense", "ddp"))]
    results: list[Result] = []
    targets: dict[float, float] = {}
    console = Console(highlight=False, soft_wrap=False)
    rates = list(dict.fromkeys(args.mbit))
    with EmulatedHosts(NODES) as hosts:
        runs = Runs(args, sizes, hosts)
        for mbit in rates:
            hosts.set_rate(mbit)
            console.print(f"{format_rate(mbit)}: {ALONE}")
            alone = runs.run(ALONE, mbit)
            there = []
            for name in names:
                start = time.perf_counter()
                there.append(runs.run(name, mbit))
                took = time.perf_counter() - start
                console.print(f"{format_rate(mbit)}: {name}: {there[-1].source} ({took:.0f} s)", soft_wrap=True)
            end = there[0].curve[-1][2]
            targets[mbit] = args.target or (1 + args.tolerance) * end
            there = [with_target(one, targets[mbit]) for one in there]
            results += [alone, *there]
            millions = runs.whole["dense"][0].parameters / 1e6
            title = (
                f"{millions:.1f} M parameters on {NODES} × {RANKS} ranks at {format_rate(mbit)}, to "
                f"{targets[mbit]:.3f} bits a byte"
            )
            console.print(table_of(there, alone, title))
            if args.json:  # each time: who interrupts the rest keeps this
                content = {
                    "benchmark": "end_to_end",
                    "version": danon_lightning.__version__,
                    "arguments": vars(args) | {name: str(vars(args)[name]) for name in ("json", "plot", "learned")},
                    "environment": describe_environment(),
                    "parameters": runs.whole["dense"][0].parameters,
                    "targets": {f"{rate:g}": target for rate, target in targets.items()},
                    "results": [asdict(one) for one in results],
                }
                args.json.write_text(json.dumps(content, indent=2) + "\n")
    if args.plot:
        save_plot(results, targets, f"{millions:.1f} M parameters, {NODES} × {RANKS} ranks", args.plot)


if __name__ == "__main__":
    main()
