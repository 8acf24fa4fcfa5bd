"""With which settings each mechanism is trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from danon_lightning.attention import available_variants
from danon_lightning.benchmark.recall.baselines import GATED_LINEAR
from danon_lightning.benchmark.registered import HYBRID, hybrid_fields

Task = Literal["mqar", "text"]
FULL = "full"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run, whatever is trained.

    Attributes:
        length: Tokens n of a sequence.
        layers: Blocks.
        hidden: Model width D.
        heads: Heads H.
        steps: Steps of the optimizer.
        batch: Sequences of a batch.
        learning_rate: Its peak.
    """

    length: int
    layers: int
    hidden: int
    heads: int
    steps: int
    batch: int
    learning_rate: float


SIZES: dict[Task, Sizes] = {
    "mqar": Sizes(length=128, layers=1, hidden=64, heads=2, steps=500, batch=32, learning_rate=5e-3),
    "text": Sizes(length=512, layers=2, hidden=96, heads=3, steps=250, batch=8, learning_rate=4e-3),
}


@dataclass(frozen=True)
class Setting:
    """One line of the tables.

    Attributes:
        variant: Name of the registered variant.
        description: A few words of help.
        fields: Fields of its config that differ from the defaults, by task.
    """

    variant: str
    description: str
    fields: Mapping[Task, Mapping[str, Any]] = field(default_factory=lambda: {"mqar": {}, "text": {}})


SETTINGS: dict[str, Setting] = {
    FULL: Setting(FULL, "full attention: the reference for parameters and time"),
    "sliding_window": Setting(
        "msra",
        "the tokens of two blocks and no others",
        {"mqar": {"block_size": 16, "num_levels": 1}, "text": {"block_size": 32, "num_levels": 1}},
    ),
    "gated_linear": Setting(GATED_LINEAR, "gated linear attention, a decay a head, with output gate and norm"),
    "msra": Setting(
        "msra", "multi-scale recursive attention, r = 4", {"mqar": {"block_size": 16}, "text": {"block_size": 32}}
    ),
    "dala": Setting(
        "dala",
        "dynamic adaptive long-range attention",
        {"mqar": {"block_size": 16, "memory_size": 48}, "text": {"block_size": 32, "memory_size": 64}},
    ),
    "ucsa": Setting(
        "ucsa",
        "unified compressed sparse attention",
        {
            "mqar": {
                "block_size": 8,
                "sparsity_factor": 0.2,
                "max_selected_blocks": 2,
                "local_window_size": 16,
                "global_tokens": 8,
            },
            "text": {
                "block_size": 16,
                "sparsity_factor": 0.2,
                "max_selected_blocks": 4,
                "local_window_size": 32,
                "global_tokens": 8,
            },
        },
    ),
    "infinite": Setting(
        "infinite",
        "enhanced infinite attention: two levels and a linear memory",
        {
            "mqar": {"local_window": 32, "sliding_window": 128},
            "text": {"local_window": 64, "sliding_window": 256},
        },
    ),
    HYBRID: Setting(HYBRID, "msra, dala and ucsa side by side"),
}


def trained_settings() -> dict[str, Setting]:
    """Those of :data:`SETTINGS` whose variant is registered, then all other variants with their defaults."""
    registered = available_variants()
    known = {label: setting for label, setting in SETTINGS.items() if setting.variant in registered}
    others = [name for name in registered if name not in {setting.variant for setting in known.values()}]
    return known | {name: Setting(name, "registered, with its defaults") for name in others}


def fields_of(label: str, task: Task, changed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of the config of a line of the tables.

    Args:
        label: The line.
        task: Which settings it gets.
        changed: Fields that are set otherwise, by line; a hybrid has its components as they are on lines of their own.
    """
    setting = trained_settings()[label]
    fields = setting.fields[task]
    if setting.variant == HYBRID:
        fields = hybrid_fields({name: fields_of(name, task, changed) for name in SETTINGS if name != HYBRID})
    return {**fields, **changed.get(label, {})}
