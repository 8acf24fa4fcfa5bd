"""The ``danon-train`` command: from a Hydra config to a trained model."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import hydra
import lightning.pytorch as pl
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.errors import record
from typing_extensions import override

from danon_lightning.command_line import explained

# A config is data, possibly somebody else's: without this list `_target_` could call anything that is installed.
ALLOWED_PACKAGES = ("danon_lightning", "lightning.pytorch", "torch.optim", "torch.nn", "torchmetrics")
# Further packages, separated by commas. Not a value of the config, which could then allow itself.
ALLOW_VARIABLE = "DANON_ALLOWED_PACKAGES"


def train(config: DictConfig) -> float | None:
    """Train what the config describes, and resume if ``ckpt_path`` is given.

    Returns:
        The monitored metric of the best checkpoint, for sweeps; None without one.

    Raises:
        ValueError: If a ``_target_`` is no class of the allowed packages.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    check_targets(plain, (*ALLOWED_PACKAGES, *filter(None, os.environ.get(ALLOW_VARIABLE, "").split(","))))
    pl.seed_everything(config.seed, workers=True, verbose=False)
    datamodule: pl.LightningDataModule = instantiate(config.data)
    module: pl.LightningModule = instantiate(config.model, _convert_="all")
    trainer: pl.Trainer = instantiate(
        config.trainer,
        strategy=instantiate(config.strategy),
        logger=instantiate(config.logger) if config.logger else False,
        callbacks=[*_callbacks(config.callbacks), _ConfigSaver(config)],
    )
    trainer.fit(module, datamodule, ckpt_path=config.ckpt_path, weights_only=True)
    best = getattr(trainer.checkpoint_callback, "best_model_score", None)
    return None if best is None else float(best)


def check_targets(config: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a config that names anything but classes of the allowed packages.

    What counts is where the class was defined: a name that only leads through an allowed package is refused, and so are
    functions and methods.

    Args:
        config: A config as plain dicts and lists, interpolations resolved.
        allowed: Names of packages or modules; what lies below one of them is allowed too.

    Raises:
        ValueError: Naming the target and how to allow it.
    """

    def is_allowed(name: str) -> bool:
        return any(name == package or name.startswith(package + ".") for package in allowed)

    for target in _targets(config):
        # The name first: finding the object imports its module.
        if isinstance(target, str) and is_allowed(target):
            found = get_object(target)
            if isinstance(found, type) and is_allowed(found.__module__):
                continue
        raise ValueError(
            f"_target_={target} is not a class of the allowed packages ({', '.join(allowed)}). If you trust it, set "
            f"the environment variable {ALLOW_VARIABLE} to its package"
        )


def _targets(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                yield value
            else:
                yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def _callbacks(configs: DictConfig) -> list[pl.Callback]:
    """Those that are not switched off with ``callbacks.name=null``."""
    chosen = {str(name): config for name, config in configs.items() if config is not None}
    for name, config in chosen.items():
        if "_target_" not in config:
            raise ValueError(f"callbacks.{name} has no _target_: it was switched off and then given settings again")
    return [instantiate(config) for config in chosen.values()]


class _ConfigSaver(pl.Callback):
    """Writes the config beside the logs, once the logger has made its folder."""

    def __init__(self, config: DictConfig) -> None:
        self._config = config

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        log_dir = trainer.log_dir  # reading it is a collective operation
        if log_dir and trainer.is_global_zero:
            os.makedirs(log_dir, exist_ok=True)
            OmegaConf.save(self._config, os.path.join(log_dir, "config.yaml"), resolve=True)


@hydra.main(version_base="1.3", config_path="pkg://danon_lightning.configs", config_name="train")
def _hydra_main(config: DictConfig) -> float | None:
    return train(config)


@record  # torchrun then shows the error of the rank that failed first
def main() -> None:
    """Entry point of the command."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        _hydra_main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would cut the traceback of every error
    explained(_hydra_main, config_module="danon_lightning.configs", config_name="train", arguments=sys.argv[1:])


if __name__ == "__main__":
    main()
