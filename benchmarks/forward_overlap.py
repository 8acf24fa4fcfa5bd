"""What it gains to let the exchange of gradients go on beside the next forward pass, and in which order.

    python benchmarks/forward_overlap.py  # as root on Linux; three minutes on two cores
    python benchmarks/forward_overlap.py --mbit 1000 --compute-ms 200 --json run.json

One rank on each of two emulated hosts trains a stack of equal layers with Lightning. Computing is waiting, a time for
each layer, so that two cores can stand for two machines; gradients, their exchange and the optimizer are real. Compared
are:

- alone: no exchange at all;
- ddp: Lightning's;
- dense: DanonHybridStrategy, which waits for all gradients at the end of the backward pass;
- arrival: ``overlap_forward=True``, buckets leaving in the order of the backward pass;
- forward: ``overlap_forward=True`` as it is: those that cannot leave before the backward pass ends leave in the order
  in which the forward pass needs them.

A step lasts from the start of one batch to that of the next one. Let F and B be the times of the two passes, X that of
the exchange, if it takes longer than the backward pass. By the end of that, the last layers' gradients have been sent;
a share of 1 − B/X is left, and belongs to the first layers. In the order of the backward pass what the first layer
needs comes last, so nothing is gained. In the order of the forward pass the first layers compute while the rest
arrives, which saves F·(1 − B/X): the column "expected" is the dense run's step without it. All layers behind have to
wait for the last bucket, whatever the order.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

import danon_lightning
from danon_lightning.arguments import output_file, positive_float, positive_int
from danon_lightning.benchmark.environment import describe_environment
from danon_lightning.benchmark.network import format_rate
from danon_lightning.strategies import DanonHybridStrategy, PeriodicSync
from danon_lightning.strategies.overlap.send_order import SendOrder
from danon_lightning.testing import EmulatedHosts, run_distributed

HOSTS = 2
RUNS = ["alone", "ddp", "dense", "arrival", "forward"]
# Buckets are regrouped after the first step, and their order is settled after the fourth.
WARMUP_STEPS = 6


@dataclass(frozen=True)
class Sizes:
    """What a step computes."""

    layers: int
    side: int
    compute_seconds: float
    bucket_mb: float
    steps: int


@dataclass(frozen=True)
class Result:
    """One run at one rate, on the slower of the ranks; times are those of a step."""

    name: str
    mbit: float
    seconds: float
    exposed_seconds: float | None
    exchange_seconds: float | None
    held_back: int | None


class Layer(nn.Module):
    """A matrix whose passes take their time, and whose gradient is given."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        """Zeros."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(sizes.side, sizes.side))
        generator = torch.Generator().manual_seed(seed)
        self.gradient = torch.randn(sizes.side, sizes.side, generator=generator)
        # A backward pass computes two products for each one of the forward pass.
        self.seconds = sizes.compute_seconds / sizes.layers / 3

    def forward(self, x: Tensor) -> Tensor:
        """Wait."""
        out: Tensor = _Timed.apply(x, self.weight, self)
        return out


class _Timed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
        ctx.layer = layer
        time.sleep(layer.seconds)
        return x + weight[0, 0]

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, Tensor, None]:
        time.sleep(2 * ctx.layer.seconds)
        return above[0], ctx.layer.gradient, None


class Stack(pl.LightningModule):
    """Layers one after another."""

    def __init__(self, sizes: Sizes, rank: int) -> None:
        """Draw gradients from the rank's number."""
        super().__init__()
        self.layers = nn.Sequential(*[Layer(sizes, rank * sizes.layers + index) for index in range(sizes.layers)])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Run all layers."""
        total: Tensor = self.layers(batch.sum())
        return total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With a state, as most have."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class Clock(pl.Callback):
    """Notes when batches start."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.starts: list[float] = []
        self.before: dict[str, Any] = {}

    def reads_between_steps(self, trainer: pl.Trainer) -> bool:
        """Looks at no weight and no gradient."""
        return False

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note it."""
        if len(self.starts) == WARMUP_STEPS:
            self.before = stats_of(trainer)
        self.starts.append(time.perf_counter())


class InArrivalOrder(DanonHybridStrategy):
    """Holds no bucket back."""

    def _register_ddp_hooks(self) -> None:
        super()._register_ddp_hooks()
        assert self._overlap is not None and self._communicator is not None
        self._overlap._order = SendOrder(self._communicator, reorders=False)


def stats_of(trainer: pl.Trainer) -> dict[str, Any]:
    """What the strategy counts."""
    return getattr(trainer.strategy, "communication_stats", dict)()  # type: ignore[no-any-return]


def buckets_of(sizes: Sizes) -> int:
    """How many DDP makes of the gradients: a bucket is closed once it is full."""
    matrix = 4 * sizes.side**2
    return math.ceil(sizes.layers / max(1, math.ceil(sizes.bucket_mb * 2**20 / matrix)))


def strategy_of(name: str, sizes: Sizes) -> Any:
    """For a run."""
    options: dict[str, Any] = {"bucket_cap_mb": sizes.bucket_mb}
    if name == "ddp":
        return pl.strategies.DDPStrategy(**options, gradient_as_bucket_view=True)
    if name == "alone":
        return DanonHybridStrategy(sync_mode=PeriodicSync(every_n_steps=10**9), **options)
    if name == "arrival":
        return InArrivalOrder(overlap_forward=True, **options)
    return DanonHybridStrategy(overlap_forward=name == "forward", **options)


def train(names: Sequence[str], sizes: Sizes) -> dict[str, tuple[float, float | None, float | None, int | None]]:
    """Runs on each rank. Returns a step's seconds, what is exposed, all of the exchange, and buckets held back."""
    torch.set_num_threads(1)
    found = {}
    for name in names:
        clock, strategy = Clock(), strategy_of(name, sizes)
        trainer = pl.Trainer(
            accelerator="cpu", strategy=strategy, devices=1, num_nodes=HOSTS, max_steps=WARMUP_STEPS + sizes.steps + 1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, callbacks=[clock],
        )  # fmt: skip
        released: list[int | None] = []
        trainer.fit(
            Stack(sizes, trainer.global_rank),
            DataLoader(Batches(trainer, released), batch_size=None),  # type: ignore[arg-type]
        )
        steps = [after - before for before, after in zip(clock.starts, clock.starts[1:], strict=False)]
        now, before = stats_of(trainer), clock.before
        exposed = exchange = None
        if now and name != "alone":
            count = now["steps"] - before["steps"]
            exposed = (now["exposed_seconds"] - before["exposed_seconds"]) / count
            exchange = exposed + (now["hidden_seconds"] - before["hidden_seconds"]) / count
        held = None
        if name in ("arrival", "forward"):
            held = 0 if released[-1] is None else buckets_of(sizes) - released[-1]
        found[name] = statistics.median(steps[WARMUP_STEPS:]), exposed, exchange, held
    return found


class Batches(torch.utils.data.IterableDataset[Tensor]):
    """As many as are asked for. Notes meanwhile how many buckets leave as they come."""

    def __init__(self, trainer: pl.Trainer, released: list[int | None]) -> None:
        """Take where to look, and where to note it."""
        self._trainer, self._released = trainer, released

    def __iter__(self) -> Any:
        """Endless."""
        while True:
            overlap = getattr(self._trainer.strategy, "_overlap", None)
            if overlap is not None:
                self._released.append(overlap._order.released)
            yield torch.zeros(1)


def measure(names: Sequence[str], sizes: Sizes, mbit: float, hosts: EmulatedHosts) -> list[Result]:
    """All runs at one rate, one after another in the same processes."""
    hosts.set_rate(mbit)
    ranks = run_distributed(train, HOSTS, names, sizes, hosts=hosts, timeout=600)
    results = []
    for name in names:
        slower = max((rank[name] for rank in ranks), key=lambda one: one[0])
        results.append(Result(name, mbit, *slower))
    return results


def saving(sizes: Sizes, exchange_seconds: float) -> float:
    """F·(1 − B/X), in seconds a step."""
    forward, backward = sizes.compute_seconds / 3, 2 * sizes.compute_seconds / 3
    return forward * (1 - backward / exchange_seconds) if exchange_seconds > backward else 0.0


def table_of(results: Sequence[Result], sizes: Sizes, title: str) -> Table:
    """The figures at one rate, in milliseconds a step."""
    by_name = {one.name: one for one in results}
    table = Table(title=title, title_justify="left")
    table.add_column("run", no_wrap=True)
    for heading in ("ms/step", "dense ÷", "exposed", "exchange", "held back", "expected"):
        table.add_column(heading, justify="right", no_wrap=True)
    expected = by_name["dense"].seconds - saving(sizes, by_name["dense"].exchange_seconds or 0.0)
    for one in results:
        table.add_row(
            one.name,
            f"{1e3 * one.seconds:.0f}",
            f"{by_name['dense'].seconds / one.seconds:.2f}",
            "-" if one.exposed_seconds is None else f"{1e3 * one.exposed_seconds:.0f}",
            "-" if one.exchange_seconds is None else f"{1e3 * one.exchange_seconds:.0f}",
            "-" if one.held_back is None else str(one.held_back),
            f"{1e3 * expected:.0f}" if one.name == "forward" else "-",
        )
    return table


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mbit", type=positive_float, nargs="+", default=[2000.0, 1000.0], help="rates (default: 2000 1000)")
    add("--runs", nargs="+", choices=RUNS, default=RUNS, help="besides alone and dense (default: all)")
    add("--layers", type=positive_int, default=64, help="default: %(default)s")
    add("--side", type=positive_int, default=640, help="of each layer's matrix (default: %(default)s)")
    add("--compute-ms", type=positive_float, default=560.0, help="both passes of all layers (default: %(default)s)")
    add("--bucket-mb", type=positive_float, default=4.0, help="of DDP's buckets (default: %(default)s)")
    add("--steps", type=positive_int, default=8, help=f"measured, after {WARMUP_STEPS} (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    args = parsed()
    sizes = Sizes(args.layers, args.side, args.compute_ms / 1e3, args.bucket_mb, args.steps)
    megabytes = 4e-6 * sizes.layers * sizes.side**2
    console = Console(highlight=False, soft_wrap=False)
    results: list[Result] = []
    with EmulatedHosts(HOSTS) as hosts:
        for mbit in dict.fromkeys(args.mbit):
            names = [name for name in RUNS if name in ("alone", "dense", *args.runs)]
            found = measure(names, sizes, mbit, hosts)
            results += found
            title = f"{megabytes:.0f} MB of gradients, {args.compute_ms:g} ms of computing, {format_rate(mbit)}"
            console.print(table_of(found, sizes, title))
            if args.json:  # each time: who interrupts the rest keeps this
                content = {
                    "benchmark": "forward_overlap",
                    "version": danon_lightning.__version__,
                    "arguments": vars(args) | {"json": str(args.json)},
                    "environment": describe_environment(),
                    "results": [asdict(one) for one in results],
                }
                args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
