"""The ``danon-plan`` command: how to train a model on a cluster, which need not be there."""

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from danon_lightning.arguments import output_file, positive_float, positive_int
from danon_lightning.planner.cluster import Cluster, read_bytes, read_rate
from danon_lightning.planner.layouts import DEFAULT_COMPRESSIONS, DEFAULT_SCHEDULES, SCHEDULES
from danon_lightning.planner.planning import plan_profile
from danon_lightning.planner.profiling import measure, shares
from danon_lightning.planner.report import plans_json, print_plans
from danon_lightning.strategies import available_compressors
from danon_lightning.strategies.communication.cost_model import Links
from danon_lightning.train import ALLOW_VARIABLE, ALLOWED_PACKAGES, check_targets

_CONFIGS, _CONFIG = "danon_lightning.configs", "train"
# Those of a config for which there are batches.
_BATCH_SIZE_KEYS = ("global_batch_size",)

_DESCRIPTION = """\
Plans how to train a model on a cluster: replicas, pipeline stages, micro-batches, schedule, activation checkpointing,
optimizer sharding and compression. It measures the model on this machine, with one thread, for some seconds; all else
is predicted, so that the cluster need not be there. No process is started."""

_EXAMPLES = """\
examples:
  danon-plan model=msra model.config.num_layers=12 --nodes 2 --ranks-per-node 2 --inter 1gbit --intra 10gbit
  danon-plan --links links.json --memory 16GiB                   links measured by danon-bench links --json links.json
  danon-plan --module my.models:Net --data my.data:batch --nodes 8 --ranks-per-node 8 --inter 25gbit --speed 40

The exit code is 0 if there is a plan, 1 if the cluster cannot take the model, and 2 for a mistyped command line."""


@dataclass(frozen=True)
class _Subject:
    """What is to be trained."""

    module: pl.LightningModule
    data: Any
    precision: Any
    batch_size: int | None
    overrides: tuple[str, ...]


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        "danon-plan", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="of danon-train's config, which names model and data")
    add("--module", metavar="PACKAGE.MODULE:NAME", help="a LightningModule, or what makes one, in place of a config's")
    add(
        "--data", metavar="PACKAGE.MODULE:NAME", help="with --module: a batch, a LightningDataModule, or what makes one"
    )
    add("--batch", type=positive_int, metavar="N", help="samples of a step, of all replicas (default: the config's)")
    add("--nodes", type=positive_int, metavar="N", help="number of nodes (default: 1)")
    add("--ranks-per-node", type=positive_int, metavar="N", help="ranks on each (default: 2)")
    add("--inter", type=_read(read_rate), metavar="RATE", help="of a node's link to others: 1gbit, 100mbit")
    add("--intra", type=_read(read_rate), metavar="RATE", help="between the ranks of a node")
    add("--links", type=Path, metavar="FILE", help="links measured by danon-bench links --json, in place of these four")
    add("--memory", type=_read(read_bytes), metavar="SIZE", help="what a rank may use: 16GiB (default: no limit)")
    add("--speed", type=positive_float, default=1.0, metavar="FACTOR", help="of a rank, as compared to this machine")
    add("--schedules", nargs="+", choices=SCHEDULES, default=list(DEFAULT_SCHEDULES), help="of pipelines")
    add(
        "--compressions", nargs="+", choices=["dense", *available_compressors()],
        default=[one or "dense" for one in DEFAULT_COMPRESSIONS], help="of gradients between nodes",
    )  # fmt: skip
    add("--layers", metavar="NAME", help="what is cut into stages: model.layers (default: found)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="what to measure the model on (default: cpu)")
    add("--top", type=positive_int, default=10, metavar="N", help="how many to print (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="write all of them to a file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command.

    Args:
        arguments: Those of the command line, for tests.

    Returns:
        The exit code.
    """
    parsing = parser()
    args = parsing.parse_intermixed_args(arguments)
    try:
        cluster = _cluster(args)
        subject = _subject(args)
    except (ValueError, OSError, ImportError, AttributeError, HydraException, OmegaConfBaseException) as error:
        parsing.error(str(error))
    batch_size = args.batch or subject.batch_size
    try:
        with _silent_trainer():
            profile = measure(
                subject.module,
                subject.data,
                None if batch_size is None else shares(batch_size, cluster.world_size),
                ranks=cluster.world_size,
                pipeline_layers=args.layers,
                precision=subject.precision,
                accelerator=args.device,
            )
        batch_size = batch_size or profile.batch_samples
        plans = plan_profile(
            profile,
            cluster,
            batch_size,
            schedules=args.schedules,
            compressions=[None if one == "dense" else one for one in args.compressions],
            pipeline_layers=args.layers,
        )
    except ValueError as error:
        parsing.error(str(error))
    plans = [replace(one, extra_overrides=subject.overrides) for one in plans]
    print_plans(plans, profile, cluster, batch_size, Console(), top=args.top)
    if args.json is not None:
        content = plans_json(plans, profile, cluster, batch_size)
        args.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written: {args.json}")
    return 0 if any(one.is_feasible for one in plans) else 1


@contextmanager
def _silent_trainer() -> Iterator[None]:
    """Leave out what a Trainer says of devices and of its end: it is there for the measurement only."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _cluster(args: argparse.Namespace) -> Cluster:
    if args.links is None:
        return Cluster.of(
            args.nodes or 1,
            args.ranks_per_node or 2,
            inter=args.inter,
            intra=args.intra,
            memory=args.memory,
            speed=args.speed,
        )
    given = [name for name in ("nodes", "ranks_per_node", "inter", "intra") if getattr(args, name) is not None]
    if given:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names} cannot be given with --links, which says it: leave out one or the other")
    notes = (f"links: as measured, from {args.links}",)
    return Cluster(Links.read(args.links), args.memory, args.speed, notes)


def _subject(args: argparse.Namespace) -> _Subject:
    if args.module is not None:
        if args.overrides:
            raise ValueError(
                f"{args.overrides[0]!r} is for a config, but --module names a module: leave out one of both"
            )
        module = _made(args.module)
        if not isinstance(module, pl.LightningModule):
            raise ValueError(f"--module {args.module} gives a {type(module).__name__}, not a LightningModule")
        return _Subject(module, None if args.data is None else _made(args.data), "32-true", None, ())
    if args.data is not None:
        raise ValueError("--data goes with --module; for a config's data give overrides: data=files data.path=FOLDER")
    GlobalHydra.instance().clear()
    with initialize_config_module(_CONFIGS, version_base="1.3"):
        config = compose(_CONFIG, args.overrides)
    size_key = next((key for key in _BATCH_SIZE_KEYS if key in config.data), None)
    if args.batch is not None and size_key is not None:
        config.data[size_key] = args.batch
        if (config.data.get("val_windows") or args.batch) < args.batch:
            config.data.val_windows = args.batch
    parts = {key: OmegaConf.to_container(config[key], resolve=True) for key in ("data", "model")}
    check_targets(parts, (*ALLOWED_PACKAGES, *filter(None, os.environ.get(ALLOW_VARIABLE, "").split(","))))
    pl.seed_everything(config.seed, workers=False, verbose=False)
    batch_size = int(config.data[size_key]) if size_key is not None else None
    changed = [] if args.batch is None or size_key is None else [f"data.{size_key}={args.batch}"]
    return _Subject(
        instantiate(config.model, _convert_="all"),
        instantiate(config.data),
        config.trainer.get("precision", "32-true"),
        batch_size,
        (*(one for one in args.overrides if not one.startswith(("strategy", "trainer.devices", "trainer.num_nodes"))),
         *changed),
    )  # fmt: skip


def _made(name: str) -> Any:
    """What a ``package.module:name`` leads to; called, if it can be and is no module itself."""
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"{name!r} is not of the form package.module:name")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    finally:
        sys.path.remove(os.getcwd())
    is_ready = isinstance(found, (pl.LightningModule, pl.LightningDataModule))
    return found() if callable(found) and not is_ready else found


def _read(function: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            return function(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


if __name__ == "__main__":
    sys.exit(main())
