"""With which settings each registered variant is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from danon_lightning.attention import AttentionConfig, AttentionCore, available_variants, get_variant
from danon_lightning.benchmark.registered import HYBRID, hybrid_fields, is_of_a_benchmark

# Measured as the baseline, without the rotation.
_FULL = "full"


@dataclass(frozen=True)
class Setting:
    """One line of the tables.

    Attributes:
        variant: Name of the registered variant.
        description: A few words of help.
        fields: Fields of its config that differ from the defaults.
    """

    variant: str
    description: str
    fields: Mapping[str, Any] = field(default_factory=dict)


SETTINGS: dict[str, Setting] = {
    "msra": Setting("msra", "multi-scale recursive attention, B = 64, r = 4", {"block_size": 64}),
    "dala": Setting("dala", "dynamic adaptive long-range attention, B = 64, M = 256", {"memory_size": 256}),
    "ucsa": Setting("ucsa", "unified compressed sparse attention, S = 32, k = 8"),
    "infinite": Setting("infinite", "enhanced infinite attention"),
    HYBRID: Setting(HYBRID, "msra, dala and ucsa side by side"),
}


def measured_settings() -> dict[str, Setting]:
    """Those of :data:`SETTINGS` whose variant is registered, then all other variants with their defaults."""
    registered = [name for name in available_variants() if name != _FULL and not is_of_a_benchmark(name)]
    known = {label: setting for label, setting in SETTINGS.items() if setting.variant in registered}
    others = [name for name in registered if name not in {setting.variant for setting in known.values()}]
    return known | {name: Setting(name, "registered, with its defaults") for name in others}


def build_core(label: str, *, heads: int, head_dim: int, length: int) -> AttentionCore:
    """Build the core of a line of the tables, for sequences of up to ``length`` tokens."""
    setting = measured_settings()[label]
    variant = get_variant(setting.variant)
    fields = dict(setting.fields)
    if setting.variant == HYBRID:
        fields |= hybrid_fields({name: component.fields for name, component in SETTINGS.items()})
    config: AttentionConfig = variant.config_class(
        hidden_size=heads * head_dim, num_heads=heads, num_layers=1, max_sequence_length=length, **fields
    )
    return variant.attention_class(config.for_layer(0))
