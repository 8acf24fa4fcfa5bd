"""The ``danon-replay`` command: runs the failed step of a bundle again, and says whether the same goes wrong."""

import argparse
import importlib
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from danon_lightning.callbacks.nan_debugger.bundle import Bundle, BundleError, precision_of, read_bundle
from danon_lightning.callbacks.nan_debugger.origin import Origin
from danon_lightning.callbacks.nan_debugger.plain import NotPlainError
from danon_lightning.callbacks.nan_debugger.replay import Replay, replay_step

# A bundle may be somebody else's: only classes of these are imported at its word.
ALLOWED_PACKAGES = ("danon_lightning", "lightning.pytorch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command.

    Returns:
        0 if the same operation fails with the same statistics, 1 if not, 2 for bad input.
    """
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        bundle = read_bundle(options.bundle)
        device = torch.device(options.device or bundle.facts["environment"]["device"])
        if device.type == "cuda" and not torch.cuda.is_available():
            console.print("The step ran on CUDA, which is not there: it is replayed on the CPU and may differ.")
            device = torch.device("cpu")
        module = build_module(bundle, options.module, (*ALLOWED_PACKAGES, *options.allow), device)
        replay = replay_bundle(bundle, module, device)
    except (BundleError, NotPlainError) as error:
        print(f"danon-replay: {error}", file=sys.stderr)
        return 2
    differences = compare(bundle.origin, replay)
    _print(console, bundle, replay, differences)
    if options.json is not None:
        _write_json(options.json, replay, differences)
    return 1 if differences else 0


def build_module(bundle: Bundle, name: str | None, allowed: Sequence[str], device: torch.device) -> pl.LightningModule:
    """Make the module of a bundle, with its weights, modes and a trainer that does nothing.

    Args:
        bundle: What to make it for.
        name: A class, or a function that returns the module: ``package.module:Name``. It is called with those of the
            bundle's hyperparameters that it takes. None for the class that the bundle names.
        allowed: The packages of which a class may be imported because the bundle names it.
        device: Where to put it.

    Raises:
        BundleError: If that cannot be done; it says why and what to do.
    """
    described = bundle.facts["module"]
    factory = _found(name) if name else _found_in(described["class"], allowed)
    settings = described["hparams"]
    try:
        takes = inspect.signature(factory).parameters
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values()):
            settings = {key: value for key, value in settings.items() if key in takes}
        module = factory(**settings)
    except Exception as error:
        omitted = ", ".join(described["hparams_omitted"]) or "none"
        raise BundleError(
            f"{name or described['class']} cannot be made with the bundle's hyperparameters {settings} ({error}); not "
            f"in the bundle, as they are no plain data: {omitted}. Give a function that makes the module: --module"
        ) from error
    if not isinstance(module, pl.LightningModule):
        raise BundleError(f"{name or described['class']} has made a {type(module).__name__}, not a LightningModule")
    module.configure_model()
    _load(module, bundle)
    module.to(device)
    module.train()
    modules = dict(module.named_modules())
    for evaluating in described["evaluating"]:
        if evaluating in modules:
            modules[evaluating].training = False
    for parameter_name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter_name not in described["frozen"])
    _attach_trainer(module, bundle, device)
    return module


def replay_bundle(bundle: Bundle, module: pl.LightningModule, device: torch.device) -> Replay:
    """Run the step of a bundle again.

    Raises:
        BundleError: If its batch was left out.
    """
    facts = bundle.facts
    if bundle.weights is None:
        raise BundleError(f"the bundle holds no weights: {facts['left_out'].get('weights', 'unknown why')}")
    torch.set_num_threads(facts["environment"]["threads"])
    step = facts["step"]
    return replay_step(
        module,
        bundle.batch_on(device),
        step["batch_idx"],
        rng=bundle.rng,
        context=lambda: precision_of(facts["precision"], device),
        loss_scale=step["loss_scale"],
        stage=step["stage"],
        micro_batch=step["micro_batch"],
    )


def compare(before: Origin | None, replay: Replay) -> list[str]:
    """How a replay differs from what a bundle says; empty if the same has happened."""
    if replay.origin is None:
        why = replay.note or "loss and gradients are finite"
        return [f"nothing was reproduced: {why}"]
    if before is None:
        return ["the bundle names no origin"]
    return before.differences(replay.origin)


def _found(name: str) -> Any:
    package, _, attribute = name.partition(":")
    if not package or not attribute:
        raise BundleError(f"{name!r} does not name a class or function: write package.module:Name")
    sys.path.insert(0, "")  # as python -m does, so that the user's own files are found
    try:
        found: Any = importlib.import_module(package)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise BundleError(f"{name} cannot be imported: {error}. Name another class or function: --module") from error
    finally:
        sys.path.remove("")
    return found


def _found_in(name: str, allowed: Sequence[str]) -> Any:
    """What a bundle names, if it is a LightningModule that was defined in an allowed package."""

    def is_allowed(module: str) -> bool:
        return any(module == package or module.startswith(package + ".") for package in allowed)

    package = name.partition(":")[0]
    if is_allowed(package):  # the name first: finding the class imports its module
        found = _found(name)
        if isinstance(found, type) and issubclass(found, pl.LightningModule) and is_allowed(found.__module__):
            return found
    raise BundleError(
        f"the bundle names {name}, which is not a LightningModule of the allowed packages ({', '.join(allowed)}). If "
        f"you trust it: --allow {package.partition('.')[0]}, or name it yourself: --module {name}"
    )


def _load(module: pl.LightningModule, bundle: Bundle) -> None:
    """Put the weights of a bundle into a module, in the dtypes that they had."""
    if bundle.weights is None:
        return
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wrong = sorted(set(own) ^ set(bundle.weights))
    wrong += [name for name in own if name not in wrong and own[name].shape != bundle.weights[name].shape]
    if any(name.startswith("weights: ") for name in bundle.facts["left_out"]):
        raise BundleError(
            "the bundle holds the weights of one pipeline stage, or one shard: only the whole model can be replayed"
        )
    if wrong:
        raise BundleError(
            f"the module does not fit the bundle's weights in {len(wrong)} places, such as {', '.join(wrong[:4])}. "
            "Was it made with other settings? Give a function that makes the right one: --module"
        )
    for name, tensor in bundle.weights.items():
        own[name].data = tensor


def _attach_trainer(module: pl.LightningModule, bundle: Bundle, device: torch.device) -> None:
    """Let the step ask its trainer for the epoch, the number of steps and so on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    step = bundle.facts["step"]
    trainer.fit_loop.epoch_progress.current.completed = step["epoch"]
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step["global_step"]
    module.trainer = trainer


def _print(console: Console, bundle: Bundle, replay: Replay, differences: Sequence[str]) -> None:
    step = bundle.facts["step"]
    rows = {
        "bundle": f"step {step['global_step']}, micro-batch {step['micro_batch']}, rank {step['rank']}",
        "was": bundle.origin.describe() if bundle.origin else "not known",
        "is": replay.origin.describe() if replay.origin else "nothing",
        "loss": "none" if replay.loss is None else f"{replay.loss:g}",
    }
    origin = replay.origin
    if origin is not None:
        rows |= {f"input {index}": one.describe() for index, one in enumerate(origin.inputs)}
        if origin.output is not None:
            rows["output"] = origin.output.describe()
        rows |= {"parameter": origin.parameter or "", "note": origin.note}
    if replay.bad_parameters:
        rows["bad gradients"] = ", ".join(replay.bad_parameters[:5]) + (" …" if len(replay.bad_parameters) > 5 else "")
    rows["left out"] = "; ".join(f"{name}: {why}" for name, why in bundle.facts["left_out"].items())
    rows["result"] = "same operation, same statistics" if not differences else "\n".join(differences)
    table = Table(title="Replay", title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        if value:
            table.add_row(key, escape(value))
    console.print(table)


def _write_json(path: Path, replay: Replay, differences: Sequence[str]) -> None:
    found = {
        "reproduced": not differences,
        "differences": list(differences),
        "origin": None if replay.origin is None else replay.origin.to_dict(),
        "loss": None if replay.loss is None else str(replay.loss),
        "finite": replay.finite,
        "complete": replay.complete,
        "bad_parameters": list(replay.bad_parameters),
        "note": replay.note,
        "seconds": replay.seconds,
    }
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="danon-replay",
        description="Run the failed step of a bundle again. Exit status: 0 if the same goes wrong, 1 if not, 2 if it "
        "cannot be tried.",
    )
    parser.add_argument("bundle", type=Path, help="folder that the NaN debugger has written")
    parser.add_argument("--module", metavar="PACKAGE.MODULE:NAME", help="class or function that makes the module")
    parser.add_argument(
        "--allow", metavar="PACKAGE", action="append", default=[], help="import the bundle's class also from here"
    )
    parser.add_argument("--device", help="where to run; that of the bundle if it is there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
