"""UCSA as a variant of the model: its settings, what it learns about errors, its registration."""

import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from danon_lightning.attention.components.cache import AttentionCache, CacheStats, CacheValue
from danon_lightning.attention.components.cells import CompressedSequence
from danon_lightning.attention.components.compression import DynamicCompression
from danon_lightning.attention.config import AttentionConfig
from danon_lightning.attention.core import AttentionCore, State
from danon_lightning.attention.model import AttentionModel, AttentionModelOutput
from danon_lightning.attention.registry import register_variant
from danon_lightning.attention.statistics import token_weights
from danon_lightning.attention.ucsa.cells import block_errors, compensate_errors
from danon_lightning.attention.ucsa.functional import UCSAStats, ucsa_attention
from danon_lightning.attention.ucsa.layout import Layout
from danon_lightning.attention.ucsa.statistics import count_read
from danon_lightning.attention.ucsa.streaming import CacheHits, empty_state, stream_chunk

__all__ = ["UCSAAttention", "UCSAConfig", "UCSAModel", "UCSAOutput"]

CACHE_STRATEGIES = ("lru", "fifo", "lfu")
# How slowly the running mean and spread of the errors of blocks follow.
ERROR_MOMENTUM = 0.99


@dataclass(frozen=True, kw_only=True)
class UCSAConfig(AttentionConfig):
    """Settings of unified compressed sparse attention, beside those that all variants share.

    How much is selected follows from ``max_sequence_length`` and not from the length at hand, so that streams and whole
    sequences agree.

    Args:
        block_size: Tokens S in a block.
        local_window_size: Tokens before the own block that are read one by one; rounded up to whole blocks.
        global_tokens: First tokens of the sequence, which all others read.
        sparsity_factor: Share s_0 of the blocks that a query reads token by token.
        sparsity_decay: λ of the schedule s_t = s_0·exp(-λt) + s_min over training steps t; 0 for a constant share. It
            needs ``finish_step`` after each step, which the LightningModules call.
        min_sparsity: s_min, the share that is left in the end.
        max_selected_blocks: Most blocks that a query reads token by token.
        num_levels: Levels T of summaries: a tree of cells is searched from the top. ``"auto"``: the least with which
            the uppermost level has at most ``max_flat_blocks`` cells.
        tree_factor: Cells r of one level that a cell of the next one holds.
        max_flat_blocks: Most cells of the uppermost level, where the levels are chosen automatically.
        error_tolerance: Blocks that their summary tells all but this share of are never read token by token.
        error_compensation: α: blocks whose error lies α standard deviations above the running mean are selected more
            readily; ``None`` leaves this out.
        enable_cache: Whether a stream keeps tokens of past blocks; without, they can only be read as summaries.
        max_cache_size: Most tokens of past blocks that a stream keeps; ``None`` keeps all, so that a stream equals the
            whole sequence, up to ``max_sequence_length``. A stream with a limited cache goes on beyond: there the
            oldest summaries are merged again and again, so that it has no end and its state hardly grows.
        cache_strategy: Which block goes when the cache is full: ``"lru"``, the one selected least recently; ``"fifo"``,
            the oldest; ``"lfu"``, the one selected least often.
        chunk_size: Tokens of a stream that are worked on at once.
        compression_ratio: Length that ``compress_sequence`` keeps, as a share of the sequence.

    Raises:
        ValueError: If a setting is out of range or does not fit another one.
    """

    outside_state: ClassVar[frozenset[str]] = AttentionConfig.outside_state | {"compression_ratio"}

    block_size: int = 32
    local_window_size: int = 64
    global_tokens: int = 64
    sparsity_factor: float = 0.1
    sparsity_decay: float = 0.0
    min_sparsity: float = 0.0
    max_selected_blocks: int = 8
    num_levels: int | Literal["auto"] = "auto"
    tree_factor: int = 16
    max_flat_blocks: int = 512
    error_tolerance: float = 0.0
    error_compensation: float | None = None
    enable_cache: bool = True
    max_cache_size: int | None = 10_000
    cache_strategy: Literal["lru", "fifo", "lfu"] = "lru"
    chunk_size: int = 1024
    compression_ratio: float = 0.5

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        for name in ("block_size", "max_selected_blocks", "max_flat_blocks", "chunk_size"):
            self._require_integer(name, minimum=1)
        for name in ("local_window_size", "global_tokens"):
            self._require_integer(name, minimum=0)
        self._require_integer("tree_factor", minimum=2)
        if self.num_levels != "auto":
            self._require_integer("num_levels", minimum=1)
        if self.max_cache_size is not None:
            self._require_integer("max_cache_size", minimum=0)
        for name in ("sparsity_factor", "min_sparsity", "error_tolerance"):
            self._require(0 <= getattr(self, name) <= 1, name, "must lie between 0 and 1")
        self._require(self.sparsity_decay >= 0, "sparsity_decay", "must not be negative")
        valid = self.error_compensation is None or self.error_compensation >= 0
        self._require(valid, "error_compensation", "must not be negative, or None to leave it out")
        self._require_choice("cache_strategy", CACHE_STRATEGIES)
        self._require(0 < self.compression_ratio <= 1, "compression_ratio", "must lie above 0, and at most at 1")

    @property
    def window_blocks(self) -> int:
        """Blocks before the own one in the window."""
        return -(-self.local_window_size // self.block_size)

    @property
    def num_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return max(1, -(-(self.max_sequence_length - self.global_tokens) // self.block_size))

    @property
    def tree_levels(self) -> int:
        """The number of levels in use."""
        if self.num_levels != "auto":
            return self.num_levels
        levels, cells = 1, self.num_blocks
        while cells > self.max_flat_blocks:
            levels, cells = levels + 1, -(-cells // self.tree_factor)
        return levels

    @property
    def reach(self) -> int | None:
        """Most cells of the uppermost level that a stream keeps apart: those of the longest sequence."""
        if not self.streams_without_end:
            return None
        return max(self.tree_factor, -(-self.num_blocks // self.tree_factor ** (self.tree_levels - 1)))

    @property
    def streams_without_end(self) -> bool:
        """Whether a stream may go on beyond the longest sequence."""
        return not self.enable_cache or self.max_cache_size is not None

    def num_selected(self, training_step: int = 0) -> int:
        """Return the number k of cells that a query expands at each level, after some training steps."""
        share = self.sparsity_factor * math.exp(-self.sparsity_decay * training_step) + self.min_sparsity
        return min(max(round(share * self.num_blocks), 1), self.max_selected_blocks)


@dataclass
class UCSAOutput(AttentionModelOutput):
    """What a UCSA model returns; all of this only where ``output_details`` asks for it, and for whole sequences.

    Attributes:
        sparsity_mask: For each layer, the blocks that each query has read token by token beyond the window, -1 where
            there were fewer ``[b, H, n, k]``.
        compression_info: For each layer, the share of the attention that went to summaries ``[b, H, n]``.
        block_errors: For each layer, what the summary of each block leaves out ``[b, G, blocks]``.
    """

    sparsity_mask: tuple[Tensor, ...] | None = None
    compression_info: tuple[Tensor, ...] | None = None
    block_errors: tuple[Tensor, ...] | None = None


class UCSAAttention(AttentionCore):
    """The core of UCSA: it has no parameters, but remembers how large the errors of blocks usually are.

    In the parallel form it offers ``sparsity_mask``, ``compression_info`` and ``block_errors`` to ``observing``, as in
    ``UCSAOutput``.

    Args:
        config: The settings.
    """

    config: UCSAConfig
    training_step: Tensor
    error_mean: Tensor
    error_variance: Tensor

    def __init__(self, config: UCSAConfig) -> None:
        """Create the buffers."""
        super().__init__(config)
        self.register_buffer("training_step", torch.empty((), dtype=torch.int64))
        self.register_buffer("error_mean", torch.empty(()))
        self.register_buffer("error_variance", torch.empty(()))
        # Number, sum and sum of squares of the errors since the last step.
        self._error_moments: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget the steps and the errors: at first an error of one half is usual."""
        with torch.no_grad():
            self.training_step.zero_()
            self.error_mean.fill_(0.5)
            self.error_variance.fill_(0.0)

    @property
    def streams_without_end(self) -> bool:
        """True, unless all tokens are kept: beyond the longest sequence the oldest summaries are merged."""
        return self.config.streams_without_end

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Return the state before the first token; see ``AttentionCore.init_state``."""
        return empty_state(
            batch_size,
            self.config.kv_heads,
            self.config.head_dim,
            block_size=self.config.block_size,
            tree_levels=self.config.tree_levels,
            device=device,
            dtype=dtype,
        )

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
        config, settings = self.config, self._settings() | {"dropout_p": self.dropout_p}
        if state is None:
            output = ucsa_attention(q, k, v, causal=config.causal, key_padding_mask=key_padding_mask, **settings)
            settings["dropout_p"] = 0.0

            @functools.cache
            def stats() -> UCSAStats:
                _, measured = ucsa_attention(
                    q, k, v, causal=config.causal, key_padding_mask=key_padding_mask, return_stats=True, **settings
                )
                return measured

            self._observe("sparsity_mask", lambda: stats().selected_blocks)
            self._observe("compression_info", lambda: stats().cell_weight)
            self._observe("block_errors", lambda: stats().block_errors)
            return output, None
        return self._stream(q, k, v, key_padding_mask, state, **settings)

    def _settings(self) -> dict[str, Any]:
        """Return the arguments that the parallel form and the stream share, beside tensors."""
        config = self.config
        return {
            "block_size": config.block_size,
            "num_selected": config.num_selected(int(self.training_step) if config.sparsity_decay else 0),
            "window_blocks": config.window_blocks,
            "num_sinks": config.global_tokens,
            "tree_levels": config.tree_levels,
            "tree_factor": config.tree_factor,
            "rope_base": config.rope_base,
            "error_tolerance": config.error_tolerance,
            "selection_bias": None if config.error_compensation is None else self._compensate,
        }

    def _stream(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, state: State, **settings: Any
    ) -> tuple[Tensor, State]:
        """Attend piece by piece."""
        config, outputs = self.config, []
        for start in range(0, q.shape[-2], config.chunk_size):
            here = slice(start, start + config.chunk_size)
            output, state = stream_chunk(
                q[:, :, here],
                k[:, :, here],
                v[:, :, here],
                state,
                key_padding_mask=None if key_padding_mask is None else key_padding_mask[:, here],
                max_cache_size=config.max_cache_size if config.enable_cache else 0,
                eviction=config.cache_strategy,
                reach=config.reach,
                **settings,
            )
            outputs.append(output)
        return torch.cat(outputs, dim=2), state

    def _statistics(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> dict[str, Any]:
        """Count what is read, and tell the share of what is near, of selected blocks, and of summaries."""
        config, settings = self.config, self._settings()
        _, stats = ucsa_attention(
            q, k, v, causal=config.causal, key_padding_mask=key_padding_mask, return_stats=True, **settings
        )
        layout = Layout(
            config.block_size,
            settings["num_selected"],
            config.window_blocks,
            config.global_tokens,
            config.tree_levels,
            config.tree_factor,
            config.causal,
        )
        real = q.new_ones(q.shape[0], q.shape[-2], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        read = count_read(stats.selected_blocks.long(), layout, real)
        routes = {"near": stats.near_weight, "selected": stats.selected_weight, "summaries": stats.cell_weight}
        return {**read, **{f"route/{name}": share for name, share in routes.items()}}

    def _token_weights(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Return the weights of the softmax, a summary counting in equal parts for its tokens.

        With an ``error_tolerance`` there are none: what is selected then depends on the real values.
        """
        config, settings = self.config, self._settings()
        if config.error_tolerance > 0:
            return None
        if settings["selection_bias"] is not None:
            errors = block_errors(
                v, block_size=config.block_size, num_sinks=config.global_tokens, key_padding_mask=key_padding_mask
            )
            settings["selection_bias"] = self._bias(errors)
        return token_weights(
            lambda values: ucsa_attention(
                q, k, values, causal=config.causal, key_padding_mask=key_padding_mask, **settings
            ),
            v,
            at_once=v.shape[-1],
        )

    def _stream_statistics(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, state: State
    ) -> dict[str, Any]:
        """Tell how many of the blocks that queries would select the cache still holds, if it is bounded."""
        if self.config.enable_cache and self.config.max_cache_size is None:
            return {}
        hits = CacheHits()
        self._stream(q, k, v, key_padding_mask, state, **self._settings(), hits=hits)
        return {"cache_hit_rate": hits.rate} if hits.total else {}

    def _compensate(self, errors: Tensor) -> Tensor:
        """Return the bonus of blocks; in training, count the errors."""
        if self.training:
            moments = torch.stack([torch.ones_like(errors), errors, errors.square()]).flatten(1).sum(dim=1).detach()
            self._error_moments = moments if self._error_moments is None else self._error_moments + moments
        return self._bias(errors)

    def _bias(self, errors: Tensor) -> Tensor:
        """Return the bonus of blocks that their summaries tell little of."""
        assert self.config.error_compensation is not None
        return compensate_errors(
            errors,
            mean=self.error_mean.clamp(min=1e-6),
            spread=self.error_variance.sqrt(),
            threshold=self.config.error_compensation,
        )

    @torch.no_grad()
    def finish_step(self, training_step: int) -> None:
        """Move the schedule on, and the running mean and spread of the errors; see ``AttentionCore.finish_step``."""
        self.training_step.fill_(training_step)
        if self._error_moments is not None:
            count, total, squares = self._error_moments.to(self.error_mean.dtype)
            self.error_mean.lerp_(total / count, 1 - ERROR_MOMENTUM)
            variance = squares / count - 2 * self.error_mean * total / count + self.error_mean.square()
            self.error_variance.lerp_(variance.clamp(min=0.0), 1 - ERROR_MOMENTUM)
            self._error_moments = None


class UCSAModel(AttentionModel):
    """A model with unified compressed sparse attention in every block.

    Args:
        config: The settings; ``None`` means the defaults.
        **overrides: Settings that replace those of ``config``.
    """

    config_class: ClassVar[type[AttentionConfig]] = UCSAConfig
    output_class: ClassVar[type[AttentionModelOutput]] = UCSAOutput
    config: UCSAConfig

    def __init__(self, config: UCSAConfig | None = None, **overrides: object) -> None:
        """Create the layers."""
        super().__init__(config, **overrides)
        self.cache = AttentionCache(policy=self.config.cache_strategy)

    @cached_property
    def compression(self) -> DynamicCompression:
        """What compresses sequences.

        It is made when it is first asked for, and its parameters are none of the model's: the forward pass does not use
        it, and its ``update_compression_params`` trains it. It is in evaluation mode.
        """
        ratio, weight = self.config.compression_ratio, self.token_embedding.weight
        return DynamicCompression(self.config.hidden_size, ratio, ratio).to(weight.device, weight.dtype).eval()

    def compress_sequence(self, hidden_states: Tensor) -> CompressedSequence:
        """Compress hidden states, or anything of their width, to ``compression_ratio`` of their length, rounded up.

        Args:
            hidden_states: ``[b, n, D]``.
        """
        compressed = self.compression.compress(hidden_states)
        assert isinstance(compressed, CompressedSequence)
        return compressed

    def decompress_sequence(self, compressed: CompressedSequence, original_length: int) -> Tensor:
        """Expand what ``compress_sequence`` has given.

        Args:
            compressed: The cells.
            original_length: Number of tokens n before the compression.

        Returns:
            ``[b, n, D]``.

        Raises:
            ValueError: If the cells cannot come from so many tokens.
        """
        batch, _, width = compressed.shape
        return self.compression.decompress(compressed, (batch, original_length, width))

    def update_cache(self, key: Hashable, value: CacheValue) -> None:
        """Keep tensors under a key, in ``cache``, an ``AttentionCache`` that drops entries by ``cache_strategy``.

        Args:
            key: For instance the ids of a prefix, as a tuple.
            value: A tensor or a tuple of tensors, for instance compressed hidden states.
        """
        self.cache.put(key, value)

    def get_cache_stats(self) -> CacheStats:
        """Return what ``cache`` has measured, such as ``hit_rate``, ``memory_usage`` (bytes) and ``eviction_count``."""
        return self.cache.stats()


register_variant("ucsa", UCSAConfig, UCSAAttention)
