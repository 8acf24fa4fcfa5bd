"""Attention variants by name: a third party adds one by registering a config and a core."""

from typing import NamedTuple

from danon_lightning.attention.config import AttentionConfig
from danon_lightning.attention.core import AttentionCore

__all__ = ["Variant", "available_variants", "get_variant", "register_variant", "variant_of"]


class Variant(NamedTuple):
    """An entry of the registry.

    Attributes:
        name: Name of the variant.
        config_class: Its settings.
        attention_class: The core that a block builds from these settings.
    """

    name: str
    config_class: type[AttentionConfig]
    attention_class: type[AttentionCore]


_variants: dict[str, Variant] = {}


def register_variant(name: str, config_class: type[AttentionConfig], attention_class: type[AttentionCore]) -> None:
    """Make a variant known, so that ``AttentionModel`` builds it from an instance of its config.

    Args:
        name: Lower-case name, letters, digits and underscores.
        config_class: A dataclass derived from ``AttentionConfig``; it belongs to one variant only.
        attention_class: A subclass of ``AttentionCore`` whose constructor takes the config.

    Raises:
        ValueError: If the name is malformed, or the name or the config class belongs to another variant.
        TypeError: If a class is not derived from the base class named above.
    """
    if not (name.isidentifier() and name == name.lower()):
        raise ValueError(f"name={name!r} must consist of lower-case letters, digits and underscores")
    if not (isinstance(config_class, type) and issubclass(config_class, AttentionConfig)):
        raise TypeError(f"config_class={config_class!r} must be a subclass of AttentionConfig")
    if not (isinstance(attention_class, type) and issubclass(attention_class, AttentionCore)):
        raise TypeError(f"attention_class={attention_class!r} must be a subclass of AttentionCore")
    variant = Variant(name, config_class, attention_class)
    for other in _variants.values():
        if other != variant and (other.name == name or other.config_class is config_class):
            raise ValueError(
                f"name={name!r} with config_class={config_class.__name__} collides with the registered {other}; "
                "choose another name and a config class of its own"
            )
    _variants[name] = variant


def get_variant(name: str) -> Variant:
    """Return the variant of that name.

    Args:
        name: As registered.

    Raises:
        ValueError: If there is none; the message lists those there are.
    """
    if name not in _variants:
        raise ValueError(f"name={name!r} is not an attention variant; use one of {', '.join(available_variants())}")
    return _variants[name]


def available_variants() -> tuple[str, ...]:
    """Return the names of all registered variants in alphabetical order."""
    return tuple(sorted(_variants))


def variant_of(config: AttentionConfig) -> Variant:
    """Return the variant that a config belongs to.

    Args:
        config: An instance of a registered config class, or of a class derived from one.

    Raises:
        ValueError: If its class is not registered; the message lists those that are.
    """
    by_config = {variant.config_class: variant for variant in _variants.values()}
    for base in type(config).__mro__:
        if base in by_config:
            return by_config[base]
    known = ", ".join(f"{variant.config_class.__name__} ({variant.name})" for variant in _variants.values())
    raise ValueError(f"config={type(config).__name__} belongs to no attention variant; use one of {known}")
