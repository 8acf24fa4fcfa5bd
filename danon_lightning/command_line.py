"""Turns the errors of a mistyped command line into one line that says what would have been right."""

import re
from collections.abc import Callable, Sequence

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def explained(run: Callable[[], object], *, config_module: str, config_name: str, arguments: Sequence[str]) -> None:
    """Call ``run``; if the command line was at fault, exit with a short explanation instead of a traceback.

    Args:
        run: A function decorated with ``hydra.main``; HYDRA_FULL_ERROR must be 1, or Hydra keeps its errors to itself.
        config_module: The package that holds the configs.
        config_name: The primary config.
        arguments: The command line without the command.

    Raises:
        SystemExit: With the explanation.
    """
    try:
        run()
    except InstantiationException as error:
        if not isinstance(error.__cause__, (ValueError, TypeError)):
            raise
        [*_, key] = str(error).rsplit("full_key: ", 1)
        raise SystemExit(f"error in {key}: {error.__cause__}") from None
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        raise SystemExit(f"error: {error}{_valid_keys(str(error), config_module, config_name, arguments)}") from None


def _valid_keys(message: str, config_module: str, config_name: str, arguments: Sequence[str]) -> str:
    """The keys that stand beside the one that ``message`` complains of; empty where it is about something else."""
    found = re.search(r"Could not override '([^']+)'", message)
    if not found:
        return ""
    parent = found[1].rpartition(".")[0]
    others = [a for a in arguments if "=" in a and not a.startswith(("-", "hydra", "+", "~", found[1]))]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(config_module, version_base="1.3"):
            config = compose(config_name, others)
            node = OmegaConf.select(config, parent) if parent else config
    except (HydraException, OmegaConfBaseException):
        return ""
    if not OmegaConf.is_dict(node):
        return f"\nThere is no {parent}."
    keys = ", ".join(sorted(str(key) for key in node if key != "_target_"))
    return f"\n{parent or 'The config'} has: {keys}"
