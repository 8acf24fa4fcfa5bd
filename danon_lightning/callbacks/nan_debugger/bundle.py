"""A folder that holds what is needed to run a failed step again, elsewhere and later.

``bundle.json`` says what has happened and in which surroundings; ``random.pt``, ``batch.pt``, ``weights.pt`` and
``optimizer.pt`` hold tensors. All of it is data: nothing in it is run or imported when it is read.
"""

import importlib.metadata
import json
import os
import pickle
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
from torch import nn

from danon_lightning.callbacks.nan_debugger.origin import Origin
from danon_lightning.callbacks.nan_debugger.plain import NotPlainError, from_plain, plain_tensor, size_of, to_plain
from danon_lightning.callbacks.nan_debugger.random_state import RandomState

FORMAT = 1
# What a file needs besides its tensors.
_OVERHEAD = 2**16
_PACKAGES = ("torch", "lightning", "danon-lightning", "numpy", "torchmetrics", "transformers")


class BundleError(ValueError):
    """A folder is no bundle, or not one that can be replayed here."""


@dataclass(frozen=True)
class Step:
    """The step that has failed.

    Attributes:
        batch: As ``training_step`` got it.
        batch_idx: Its index.
        rng: The generators at its beginning.
        context: Makes the context of precision.
        loss_scale: See ``replay_step``.
        rank: Of this process, in all of them.
        stage: The pipeline stage.
        micro_batch: Which micro-batch.
        global_step: How many steps of the optimizer have been done.
        epoch: Which epoch, from 0.
    """

    batch: Any
    batch_idx: int
    rng: RandomState
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    loss_scale: float = 1.0
    rank: int = 0
    stage: int = 0
    micro_batch: int = 0
    global_step: int = 0
    epoch: int = 0


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds.

    Attributes:
        facts: What ``bundle.json`` says.
        origin: What was found; None if nothing was.
        rng: The generators at the beginning of the step.
        batch: As it was encoded; None if it was left out.
        weights: Parameters and buffers by name; None if they were left out.
        optimizer: The states of the optimizers; None if they were left out.
    """

    facts: dict[str, Any]
    origin: Origin | None
    rng: RandomState
    batch: tuple[str, Any] | None = None
    weights: dict[str, torch.Tensor] | None = None
    optimizer: list[Any] | None = field(default=None, repr=False)

    def batch_on(self, device: torch.device) -> Any:
        """The batch, on a device.

        Raises:
            BundleError: If it was left out.
        """
        if self.batch is None:
            raise BundleError(f"the bundle holds no batch: {self.facts['left_out'].get('batch', 'unknown why')}")
        return from_plain(self.batch, device)


def write_bundle(
    path: str | os.PathLike[str],
    module: pl.LightningModule,
    step: Step,
    origin: Origin | None,
    *,
    include_data: bool = False,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    max_bytes: int = 2**31,
) -> Path:
    """Write a bundle. Nobody but the user may read it (mode 0700), and it is there as a whole or not at all.

    Args:
        path: Where; a number is appended if that is taken.
        module: The LightningModule itself, with the weights of the step.
        step: What has failed.
        origin: What a replay has found.
        include_data: Whether to include the batch: data may be private, and without them nothing can be replayed.
        optimizers: Those whose states are to be included.
        max_bytes: What it may take at most. What does not fit is left out, first the optimizer, then the weights.

    Returns:
        Where it is.

    Raises:
        OSError: If it cannot be written. Nothing is left of it then.
    """
    left_out: dict[str, str] = {}
    contents: dict[str, Any] = {"random": step.rng.to_dict()}
    room = max_bytes - 4 * _OVERHEAD
    data = step.batch if include_data else None
    if not include_data:
        left_out["batch"] = "data are included on request only: include_data=True"
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    states = [one.state_dict() for one in optimizers]
    for name, tree in (("batch", data), ("weights", named), ("optimizer", states or None)):
        if tree is None:
            continue
        size = size_of(tree)
        if size > room:
            left_out[name] = f"its {size:,} bytes do not fit into the {max_bytes:,} that a bundle may take"
            continue
        try:
            contents[name] = _weights(named, left_out) if name == "weights" else to_plain(tree, name)
            room -= size
        except NotPlainError as error:
            left_out[name] = str(error)
    facts = {
        "format": FORMAT,
        "origin": None if origin is None else origin.to_dict(),
        "step": {name: getattr(step, name) for name in _STEP},
        "precision": _precision(step.context, module.device),
        "module": _described(module),
        "environment": _environment(module.device),
        "left_out": left_out,
    }
    return _write(Path(path), facts, contents)


_STEP = ("batch_idx", "loss_scale", "rank", "stage", "micro_batch", "global_step", "epoch")


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read a bundle.

    Raises:
        BundleError: If it is none, is damaged, or holds anything but data.
    """
    folder = Path(path)
    try:
        facts = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise BundleError(f"{folder} is not a bundle of format {FORMAT}")
        found = {
            name: torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
            for name in ("random", "batch", "weights", "optimizer")
            if (folder / f"{name}.pt").exists()
        }
        return Bundle(
            facts,
            None if facts["origin"] is None else Origin.from_dict(facts["origin"]),
            RandomState.from_dict(found["random"]),
            found.get("batch"),
            found.get("weights"),
            from_plain(found["optimizer"]) if "optimizer" in found else None,
        )
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not a bundle: {error.filename} is missing") from error
    except BundleError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BundleError(f"{folder} cannot be read: {error}") from error


@contextmanager
def precision_of(facts: Mapping[str, Any], device: torch.device) -> Iterator[None]:
    """The context of precision that a bundle tells of.

    Args:
        facts: ``bundle.facts["precision"]``.
        device: Where the step runs.
    """
    before = torch.get_default_dtype()
    dtype = facts["autocast"] and getattr(torch, facts["autocast"])
    with torch.autocast(device.type, dtype) if dtype else nullcontext():
        torch.set_default_dtype(getattr(torch, facts["default_dtype"]))
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _precision(context: Callable[[], AbstractContextManager[Any]], device: torch.device) -> dict[str, Any]:
    with context():
        autocast = torch.is_autocast_enabled(device.type)
        dtype = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.") if autocast else None
        return {"autocast": dtype, "default_dtype": str(torch.get_default_dtype()).removeprefix("torch.")}


def _described(module: pl.LightningModule) -> dict[str, Any]:
    settings, omitted = {}, []
    for key, value in dict(module.hparams).items():
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        try:
            settings[str(key)] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            omitted.append(str(key))
    return {
        "class": f"{type(module).__module__}:{type(module).__qualname__}",
        "hparams": settings,
        "hparams_omitted": omitted,
        "evaluating": [name for name, one in module.named_modules() if not one.training],
        "frozen": [name for name, one in module.named_parameters() if not one.requires_grad],
    }


def _environment(device: torch.device) -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": versions,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
    }


def _weights(named: Mapping[str, nn.Parameter | torch.Tensor], left_out: dict[str, str]) -> dict[str, torch.Tensor]:
    found = {}
    for name, one in named.items():
        try:
            found[name] = plain_tensor(one, name)
        except NotPlainError as error:
            left_out[f"weights: {name}"] = str(error)
    return found


def _write(path: Path, facts: Mapping[str, Any], contents: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))  # made with mode 0700
    try:
        for name, content in contents.items():
            with _new_file(temporary / f"{name}.pt") as file:
                torch.save(content, file)
        with _new_file(temporary / "bundle.json") as file:
            file.write((json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())
        return _renamed(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _renamed(temporary: Path, path: Path) -> Path:
    """Rename a folder; a number is appended where there is one of that name already, also if it has just appeared."""
    for number in range(1, 1000):
        target = path if number == 1 else path.with_name(f"{path.name}-{number}")
        if target.exists():
            continue
        try:
            temporary.rename(target)  # fails where a folder that is not empty has this name
        except OSError:
            if target.exists():
                continue
            raise
        return target
    raise OSError(f"there are a thousand bundles called {path.name} already")
