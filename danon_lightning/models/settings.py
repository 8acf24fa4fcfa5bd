"""Configs from what a user or a YAML file gives."""

from collections.abc import Mapping
from typing import Any, TypeVar

_Config = TypeVar("_Config")


def build_config(cls: type[_Config], given: Any, argument: str) -> _Config:
    """Make a config of ``given``.

    Args:
        cls: Class of the config, a dataclass.
        given: One already, a mapping of its fields, or None for the defaults.
        argument: How to call it in errors.

    Raises:
        TypeError: If it is something else.
        ValueError: If a field is unknown or out of range.
    """
    if isinstance(given, cls):
        return given
    if given is None:
        return cls()
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument} must be a {cls.__name__} or a mapping of its fields, got {type(given).__name__}")
    valid = list(getattr(cls, "__dataclass_fields__", {}))
    if unknown := sorted(set(given) - set(valid)):
        raise ValueError(f"{argument} has unknown fields {unknown}; {cls.__name__} has: {', '.join(valid)}")
    return cls(**given)
