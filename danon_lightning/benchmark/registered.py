"""What the benchmarks need to know about the registry of attention variants."""

from collections.abc import Mapping
from typing import Any

from danon_lightning.attention import available_variants, get_variant

HYBRID = "super_hybrid"
# What a hybrid is made of in benchmarks.
_COMPONENTS = ("msra", "dala", "ucsa")


def modules_to_import() -> tuple[str, ...]:
    """Modules that register the variants that are registered here, for other processes."""
    return tuple(sorted({get_variant(name).attention_class.__module__ for name in available_variants()} - {"__main__"}))


def hybrid_fields(fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of the config of a hybrid.

    Args:
        fields: Fields of the config of each component, by its name.
    """
    return {"components": "+".join(_COMPONENTS), "settings": {name: dict(fields[name]) for name in _COMPONENTS}}


def is_of_a_benchmark(name: str) -> bool:
    """Whether a variant is there only for a benchmark of this package to compare with."""
    return get_variant(name).attention_class.__module__.startswith("danon_lightning.benchmark.")
