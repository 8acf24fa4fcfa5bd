"""SuperHybrid as a variant of the model: its settings, its gate, its registration."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from danon_lightning.attention.config import AttentionConfig
from danon_lightning.attention.core import AttentionCore, State
from danon_lightning.attention.hybrid.monitor import PerformanceStats, monitoring
from danon_lightning.attention.layers import ZeroLinear
from danon_lightning.attention.model import AttentionModel, AttentionModelOutput
from danon_lightning.attention.registry import get_variant, register_variant

__all__ = ["SuperHybridAttention", "SuperHybridConfig", "SuperHybridModel", "SuperHybridOutput", "component_prior"]

# What ``enable_all_optimizations=False`` leaves out of each component.
PLAIN: dict[str, dict[str, Any]] = {
    "dala": {"use_adaptive_router": False, "use_recursive_state": False},
}


@dataclass(frozen=True, kw_only=True)
class SuperHybridConfig(AttentionConfig):
    """Settings of a hybrid of several variants, beside those that all variants share.

    Args:
        components: Names of registered variants, joined by ``+`` where they share a layer and by ``,`` from layer to
            layer: ``"msra+dala+ucsa"`` has all three in each layer, ``"msra,dala,ucsa"`` one of them in each, in turn.
        settings: Settings of single components by their name, such as ``{"dala": {"memory_size": 64}}``; not those that
            all variants share, which hold for the layer as a whole.
        num_levels: Levels of ``msra``.
        sparsity_factor: The setting of ``ucsa``; ``None`` for its default.
        compression_ratio: Length of a level of summaries of ``msra`` over the length of the one below, one over an
            integer; ``None`` for its default.
        router_temperature: Divides the logits of the gate; a high one makes components count more equally.
        prior: Added to the logits of the gate, by component: the better one is known to be, the larger. See
            ``component_prior`` for one made of measured scores.
        diversity_weight: What training adds to the loss, times the mean entropy of the weights, with a minus: above 0
            no component is given up early.
        enable_all_optimizations: ``False`` leaves out the optional parts of the components, that is router and
            recurrent state of ``dala``, to see what they are worth; ``settings`` come first.

    Raises:
        ValueError: If a setting is out of range or does not fit another one, or a component is not registered.
    """

    outside_state: ClassVar[frozenset[str]] = AttentionConfig.outside_state | {"diversity_weight"}

    components: str = "msra+dala+ucsa"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    num_levels: int | Literal["auto"] = "auto"
    sparsity_factor: float | None = None
    compression_ratio: float | None = None
    router_temperature: float = 1.0
    prior: Mapping[str, float] = field(default_factory=dict)
    diversity_weight: float = 0.0
    enable_all_optimizations: bool = True

    def __post_init__(self) -> None:
        """Check every setting, and those of the components."""
        super().__post_init__()
        # Plain values, whatever kind of mapping a configuration file became, so that checkpoints hold nothing else.
        object.__setattr__(self, "settings", {name: dict(given) for name, given in self.settings.items()})
        object.__setattr__(self, "prior", dict(self.prior))
        self._require(self.router_temperature > 0, "router_temperature", "must be positive")
        self._require(self.diversity_weight >= 0, "diversity_weight", "must not be negative")
        if self.compression_ratio is not None:
            ratio = self.compression_ratio
            whole = 0 < ratio <= 0.5 and math.isclose(1 / ratio, round(1 / ratio), rel_tol=1e-3)
            self._require(whole, "compression_ratio", "must be one over an integer of at least 2, for instance 0.25")
        self._require(isinstance(self.components, str), "components", "must be a string, such as 'msra+dala,ucsa'")
        used = {name for layer in self._by_layer for name in layer}
        for layer in self._by_layer:
            valid = all(layer) and len(set(layer)) == len(layer) and "super_hybrid" not in layer
            self._require(valid, "components", "must name other variants, each once a layer, like 'msra+dala,ucsa'")
        for argument in ("settings", "prior"):
            if unknown := sorted(set(getattr(self, argument)) - used):
                raise ValueError(f"{argument} names {', '.join(unknown)}, but components={self.components!r} does not")
        for name in sorted(used):
            self._check_settings(name)
            self.component_config(name)

    def _check_settings(self, name: str) -> None:
        """Raise unless what is set for a component is its own to decide."""
        shared, known = self.shared_settings(), [field.name for field in fields(get_variant(name).config_class)]
        own = [key for key in known if key not in shared]
        for key, value in self.settings.get(name, {}).items():
            if key in shared:
                raise ValueError(
                    f"settings gives {name} {key}={value!r}, but components share it: set {key} of the hybrid itself"
                )
            if key not in own:
                raise ValueError(f"settings gives {name} {key}={value!r}, which it does not have: {', '.join(own)}")

    @property
    def _by_layer(self) -> list[list[str]]:
        return [[name.strip() for name in layer.split("+")] for layer in self.components.split(",")]

    def for_layer(self, index: int) -> "SuperHybridConfig":
        """Return the settings with the components of one layer alone."""
        names = self._by_layer[index % len(self._by_layer)]
        chosen = {name: self.settings[name] for name in names if name in self.settings}
        prior = {name: self.prior[name] for name in names if name in self.prior}
        return replace(self, components="+".join(names), settings=chosen, prior=prior)

    @property
    def layer_components(self) -> list[str]:
        """Names of the components of the first layer, in order."""
        return self._by_layer[0]

    def component_config(self, name: str) -> AttentionConfig:
        """Return the settings of a component."""
        given: dict[str, dict[str, Any]] = {
            "msra": {
                "num_levels": self.num_levels,
                "compression_factor": None if self.compression_ratio is None else round(1 / self.compression_ratio),
            },
            "ucsa": {"sparsity_factor": self.sparsity_factor},
        }
        settings = self.shared_settings()
        settings |= {key: value for key, value in given.get(name, {}).items() if value is not None}
        if not self.enable_all_optimizations:
            settings |= PLAIN.get(name, {})
        return get_variant(name).config_class(**{**settings, **self.settings.get(name, {})})


def component_prior(
    accuracy: Mapping[str, float],
    speed: Mapping[str, float],
    memory: Mapping[str, float],
    *,
    accuracy_weight: float = 1.0,
    speed_weight: float = 0.0,
    memory_weight: float = 0.0,
) -> dict[str, float]:
    """Return a prior for the gate of a hybrid, the weighted sum of scores of each component.

    Args:
        accuracy: Measured score of each component, the larger the better, for instance the accuracy of recall.
        speed: The same of its speed, for instance tokens a second over those of the fastest.
        memory: The same of its thrift, for instance the least memory of all over its own.
        accuracy_weight: Weight of the accuracy.
        speed_weight: Weight of the speed.
        memory_weight: Weight of the thrift.

    Raises:
        ValueError: If the scores are not of the same components.
    """
    if not set(accuracy) == set(speed) == set(memory):
        raise ValueError(f"scores of different components: {sorted(accuracy)}, {sorted(speed)} and {sorted(memory)}")
    return {
        name: accuracy_weight * accuracy[name] + speed_weight * speed[name] + memory_weight * memory[name]
        for name in accuracy
    }


@dataclass
class SuperHybridOutput(AttentionModelOutput):
    """What a hybrid model returns.

    Attributes:
        component_weights: For each layer, the weight of each component of it ``[b, components, H, n]``.
    """

    details: ClassVar[tuple[str, ...]] = ("component_weights",)

    component_weights: tuple[Tensor, ...] | None = None


class SuperHybridAttention(AttentionCore):
    """The core: components on the same queries, keys and values, their outputs weighed by a gate of the token.

    It offers ``component_weights`` to ``observing``, as in ``SuperHybridOutput``.

    Args:
        config: The settings, with the components of this layer alone.
    """

    config: SuperHybridConfig

    def __init__(self, config: SuperHybridConfig) -> None:
        """Create the components and the gate."""
        super().__init__(config)
        names = config.layer_components
        self.components = nn.ModuleDict(
            {name: get_variant(name).attention_class(config.component_config(name)) for name in names}
        )
        self.gate = ZeroLinear(config.hidden_size, config.num_heads * len(names)) if len(names) > 1 else None

    def by_name(self) -> dict[str, AttentionCore]:
        """Return the components by name."""
        return {name: cast(AttentionCore, component) for name, component in self.components.items()}

    def finish_step(self, training_step: int) -> None:
        """Hand this on to the components; see ``AttentionCore.finish_step``."""
        for component in self.by_name().values():
            component.finish_step(training_step)

    @property
    def streams_without_end(self) -> bool:
        """Whether all components stream without end."""
        return all(component.streams_without_end for component in self.by_name().values())

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Return the state before the first token; see ``AttentionCore.init_state``."""
        return {
            name: component.init_state(batch_size, device=device, dtype=dtype)
            for name, component in self.by_name().items()
        }

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """Attend; see ``AttentionCore.forward``."""
        weights = self._weights(x)
        self._observe("component_weights", lambda: weights)
        mixed: Tensor | None = None
        new_state: State = {}
        for (name, component), weight in zip(self.components.items(), weights.unbind(1), strict=True):
            component_state = None if state is None else state[name]
            output, new_state[name] = component(x, q, k, v, key_padding_mask=key_padding_mask, state=component_state)
            if self.gate is not None:
                output = output * weight.to(output.dtype).unsqueeze(-1)
            # One output at a time, and one sum for all of them.
            mixed = output if mixed is None else mixed.add_(output)
        assert mixed is not None
        return mixed, None if state is None else new_state

    def _statistics(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> dict[str, Any]:
        """Tell the weight of each component, and what each of them reads."""
        found: dict[str, Any] = {}
        for name, weight in zip(self.components, self._weights(x).unbind(1), strict=True):
            found[f"route/{name}"] = weight
        for name, component in self.by_name().items():
            found[name] = component.attention_statistics(x, q, k, v, key_padding_mask=key_padding_mask)
        return found

    def _token_weights(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Return those of the components, mixed by the gate, if all have some."""
        mixed = torch.zeros((), dtype=v.dtype, device=v.device)
        for component, weight in zip(self.by_name().values(), self._weights(x).unbind(1), strict=True):
            weights = component._token_weights(x, q, k, v, key_padding_mask)
            if weights is None:
                return None
            mixed = mixed + weights * weight.to(weights.dtype).unsqueeze(-1)
        return mixed

    def _stream_statistics(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, state: State
    ) -> dict[str, Any]:
        """Tell what each component can tell."""
        found = {
            name: component._stream_statistics(q, k, v, key_padding_mask, state[name])
            for name, component in self.by_name().items()
        }
        return {name: part for name, part in found.items() if part}

    def _weights(self, x: Tensor) -> Tensor:
        """Return the weights of the components ``[b, components, H, n]``."""
        names, heads = list(self.components), self.config.num_heads
        if self.gate is None:
            return x.new_ones(x.shape[0], 1, heads, x.shape[1])
        logits = self.gate(x).unflatten(-1, (len(names), heads)).movedim(1, -1)
        prior = torch.tensor([self.config.prior.get(name, 0.0) for name in names], dtype=x.dtype, device=x.device)
        return torch.softmax((logits + prior.view(-1, 1, 1)) / self.config.router_temperature, dim=1)


class SuperHybridModel(AttentionModel):
    """A model with several variants side by side.

    Args:
        config: The settings; ``None`` means the defaults.
        **overrides: Settings that replace those of ``config``.
    """

    config_class: ClassVar[type[AttentionConfig]] = SuperHybridConfig
    output_class: ClassVar[type[AttentionModelOutput]] = SuperHybridOutput

    def __init__(self, config: SuperHybridConfig | None = None, **overrides: object) -> None:
        """Create the layers."""
        super().__init__(config, **overrides)
        self._stats = PerformanceStats()

    @contextmanager
    def performance_monitor(self) -> Iterator[PerformanceStats]:
        """Measure what each component costs and counts, for the time of the context.

        Yields:
            The statistics; they stay available from ``get_performance_stats``.
        """
        cores = [cast(SuperHybridAttention, block.core) for block in self.blocks()]
        with monitoring(self, cores, [core.by_name() for core in cores]) as stats:
            self._stats = stats
            yield stats

    def get_performance_stats(self) -> PerformanceStats:
        """Return what the newest ``performance_monitor`` has measured; nothing before the first one."""
        return self._stats


register_variant("super_hybrid", SuperHybridConfig, SuperHybridAttention)
