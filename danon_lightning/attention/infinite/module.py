"""Enhanced infinite attention as a variant of the model: its settings, its learned parts, its registration."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from danon_lightning.attention.config import AttentionConfig
from danon_lightning.attention.core import AttentionCore, State
from danon_lightning.attention.infinite.memory import linear_memory
from danon_lightning.attention.layers import NormalLinear, ZeroLinear
from danon_lightning.attention.model import AttentionModel
from danon_lightning.attention.msra.module import MSRAAttention, MSRAConfig
from danon_lightning.attention.registry import register_variant
from danon_lightning.attention.statistics import token_weights

__all__ = ["InfiniteAttention", "InfiniteAttentionConfig", "InfiniteModel"]

# Logit of the share of the memory at first: what is near counts more.
FIRST_GATE = -2.0


@dataclass(frozen=True, kw_only=True)
class InfiniteAttentionConfig(AttentionConfig):
    """Settings of enhanced infinite attention, beside those that all variants share.

    Args:
        local_window: Tokens that are read one by one, at least half of them at any time; even.
        sliding_window: Tokens back that the softmax reaches: beyond the local window through summaries, on as many
            levels as it takes.
        compression_ratio: Length of a level of summaries over the length of the one below, one over an integer; or
            ``None`` for the largest one that fits the window and with which a single level reaches as far as
            ``sliding_window``, if there is one.
        min_compression_ratio: Least ratio.
        max_compression_ratio: Largest ratio.
        memory_size: Rows of the linear memory of a head; ``None``: as many as the head is wide, and no projection.
        chunk_size: Tokens that the linear memory takes in at once; it decides about speed only.

    Raises:
        ValueError: If a setting is out of range or does not fit another one.
    """

    outside_state: ClassVar[frozenset[str]] = AttentionConfig.outside_state | {"max_sequence_length"}

    max_sequence_length: int = 1_000_000
    local_window: int = 128
    sliding_window: int = 512
    compression_ratio: float | None = 0.25
    min_compression_ratio: float = 1 / 16
    max_compression_ratio: float = 0.5
    memory_size: int | None = None
    chunk_size: int = 64

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        for name in ("local_window", "sliding_window", "chunk_size"):
            self._require_integer(name, minimum=1)
        self._require(self.local_window % 2 == 0, "local_window", "must be even: it is two blocks")
        if self.memory_size is not None:
            self._require_integer("memory_size", minimum=1)
        for name in ("min_compression_ratio", "max_compression_ratio"):
            self._require(0 < getattr(self, name) <= 0.5, name, "must be above 0 and at most 0.5")
        if self.min_compression_ratio > self.max_compression_ratio:
            raise ValueError(
                f"min_compression_ratio={self.min_compression_ratio} exceeds "
                f"max_compression_ratio={self.max_compression_ratio}; exchange them"
            )
        if self.compression_ratio is not None:
            low, high = self.min_compression_ratio, self.max_compression_ratio
            in_range = low <= self.compression_ratio <= high
            self._require(in_range, "compression_ratio", f"must lie between {low} and {high}, or be None")
            whole = math.isclose(1 / self.compression_ratio, round(1 / self.compression_ratio), rel_tol=1e-3)
            self._require(whole, "compression_ratio", "must be one over an integer, for instance 0.25")
        self._require(self.causal, "causal", "is not possible with infinite: its memory is of the past")
        if self.pool_factor == 0 or self.local_window // 2 % self.pool_factor:
            factor = self.pool_factor or self._factors[0]
            nearest = 2 * factor * max(1, round(self.local_window / (2 * factor)))
            raise ValueError(
                f"local_window={self.local_window} does not fit compression_ratio={self.compression_ratio}: half of it "
                f"must be whole cells of {factor} tokens; use local_window={nearest}"
            )

    @property
    def pool_factor(self) -> int:
        """Cells of a level in a cell of the next one."""
        if self.compression_ratio is not None:
            return round(1 / self.compression_ratio)
        wanted = math.ceil(self.sliding_window / self.local_window)
        # Blocks, half a window each, consist of whole cells.
        fitting = [factor for factor in self._factors if self.local_window // 2 % factor == 0]
        return min((factor for factor in fitting if factor >= wanted), default=max(fitting, default=0))

    @property
    def _factors(self) -> range:
        """Pooling factors between the limits of the ratio."""
        least = math.ceil(1 / self.max_compression_ratio - 1e-9)
        return range(least, math.floor(1 / self.min_compression_ratio + 1e-9) + 1)

    @property
    def msra(self) -> MSRAConfig:
        """The settings of the softmax part."""
        levels, reach = 1, self.local_window
        while reach < self.sliding_window:
            levels, reach = levels + 1, reach * self.pool_factor
        block_size = self.local_window // 2
        return MSRAConfig(
            **self.shared_settings(),
            block_size=block_size,
            compression_factor=self.pool_factor,
            num_levels=levels,
        )


class _SlidingWindow(MSRAAttention):
    """Multi-scale recursive attention of which the memory takes over what it does not reach."""

    def _leave_out_of_reach(self) -> None:
        pass


class InfiniteAttention(AttentionCore):
    """The core: (1 - g) · softmax part + g · linear memory, with a gate g for each token and head.

    It offers ``memory_gate`` to ``observing``: g ``[b, H, n]``.

    Args:
        config: The settings.
    """

    config: InfiniteAttentionConfig

    def __init__(self, config: InfiniteAttentionConfig) -> None:
        """Create the learned parts."""
        super().__init__(config)
        self.window = _SlidingWindow(config.msra)
        self.gate = ZeroLinear(config.hidden_size, config.num_heads)
        self.features: NormalLinear | None = None
        if config.memory_size is not None:
            # Products of projections are then about as large as those of what is projected.
            std = config.memory_size**-0.5
            self.features = NormalLinear(config.head_dim, config.memory_size, bias=False, std=std)

    @property
    def streams_without_end(self) -> bool:
        """True: the state does not grow."""
        return True

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Return the state before the first token; see ``AttentionCore.init_state``."""
        width = self.config.head_dim
        rows = width if self.config.memory_size is None else self.config.memory_size
        precise = torch.promote_types(dtype, torch.float32)
        return {
            "window": self.window.init_state(batch_size, device=device, dtype=dtype),
            "memory": torch.zeros(batch_size, self.config.num_heads, rows, width + 1, device=device, dtype=precise),
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
        window_state = None if state is None else state["window"]
        near, window_state = self.window(x, q, k, v, key_padding_mask=key_padding_mask, state=window_state)
        query, key = self._features(q, k)
        whole, memory = linear_memory(
            query,
            key,
            v,
            key_padding_mask=key_padding_mask,
            chunk_size=self.config.chunk_size,
            initial_state=None if state is None else state["memory"],
        )
        gate = self._gate(x)
        self._observe("memory_gate", lambda: gate)
        output = torch.lerp(near, whole, gate.to(near.dtype).unsqueeze(-1))
        return output, None if state is None else {"window": window_state, "memory": memory}

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys of the memory."""
        return (q, k) if self.features is None else (self.features(q), self.features(k))

    def _gate(self, x: Tensor) -> Tensor:
        """Return the share of the memory ``[b, H, n]``."""
        gate: Tensor = (self.gate(x) + FIRST_GATE).transpose(1, 2).sigmoid()
        return gate

    def _statistics(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> dict[str, Any]:
        """Tell what the softmax part reads, and the share of the memory as one more route."""
        gate, found = self._gate(x), self.window._statistics(x, q, k, v, key_padding_mask)
        scaled = {name: part * (1 - gate) if name.startswith("route/") else part for name, part in found.items()}
        return {**scaled, "route/memory": gate}

    def _token_weights(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Return the weights of both parts, mixed by the gate; the memory is a mean of tokens too."""
        near = self.window._token_weights(x, q, k, v, key_padding_mask)
        if near is None:
            return None
        query, key = self._features(q, k)
        size = self.config.chunk_size
        whole = token_weights(
            lambda names: linear_memory(query, key, names, key_padding_mask=key_padding_mask, chunk_size=size)[0], v
        )
        return torch.lerp(near, whole, self._gate(x).to(near.dtype).unsqueeze(-1))


class InfiniteModel(AttentionModel):
    """A model with enhanced infinite attention in every block, for streams without end.

    Args:
        config: The settings; ``None`` means the defaults.
        **overrides: Settings that replace those of ``config``.
    """

    config_class: ClassVar[type[AttentionConfig]] = InfiniteAttentionConfig

    def __init__(self, config: InfiniteAttentionConfig | None = None, **overrides: object) -> None:
        """Create the layers."""
        super().__init__(config, **overrides)


register_variant("infinite", InfiniteAttentionConfig, InfiniteAttention)
