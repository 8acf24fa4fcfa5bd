"""MSRA as a variant of the model: its settings, its learned parts, its registration."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from danon_lightning.attention.config import AttentionConfig
from danon_lightning.attention.core import AttentionCore, State
from danon_lightning.attention.efficiency import measure_efficiency
from danon_lightning.attention.layers import ZeroLinear, keep_in_graph
from danon_lightning.attention.model import AttentionModel, AttentionModelOutput, evaluating
from danon_lightning.attention.msra.functional import msra_attention
from danon_lightning.attention.msra.fusion import ConcatFusion, FeatureFusion, WeightedFusion
from danon_lightning.attention.msra.geometry import Geometry
from danon_lightning.attention.msra.streaming import empty_state, stream_chunk
from danon_lightning.attention.registry import register_variant
from danon_lightning.attention.statistics import token_weights

__all__ = ["MSRAAttention", "MSRAConfig", "MSRAModel", "MSRAOutput"]

FUSIONS = ("adaptive", "weighted", "concat")


@dataclass(frozen=True, kw_only=True)
class MSRAConfig(AttentionConfig):
    """Settings of multi-scale recursive attention, beside those that all variants share.

    Args:
        block_size: Cells B in a block; a query sees between one and two blocks at each level. A multiple of the pooling
            factor. Recall grows with the number of cells a query sees.
        compression_factor: Pooling factor r: cells of one level that a cell of the next one summarises.
        num_levels: Number of levels; ``"auto"`` takes the least with which every token of the longest sequence reaches
            every other one. With fewer, far tokens are out of reach, and streams may go on without end.
        feature_fusion: ``"adaptive"``: one softmax over all levels, with a learned bias for each level that depends on
            the token. ``"weighted"``: a softmax per level, combined by learned weights. ``"concat"``: a softmax per
            level, concatenated and projected.
        compression_alpha: If given, the pooling factor is not ``compression_factor`` but follows from the longest
            sequence: round(alpha · ln ``max_sequence_length``), at least 2 and at most ``max_compression_factor``.
        max_compression_factor: Upper limit of the pooling factor when it follows from the longest sequence.

    Raises:
        ValueError: If a setting is out of range or does not fit another one.
    """

    block_size: int = 64
    compression_factor: int = 4
    num_levels: int | Literal["auto"] = "auto"
    feature_fusion: str = "adaptive"
    compression_alpha: float | None = None
    max_compression_factor: int = 16

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        self._require_integer("block_size", minimum=1)
        self._require_integer("compression_factor", minimum=2)
        self._require_integer("max_compression_factor", minimum=2)
        if self.num_levels != "auto":
            self._require_integer("num_levels", minimum=1)
        self._require_choice("feature_fusion", FUSIONS)
        valid_alpha = self.compression_alpha is None or self.compression_alpha > 0
        self._require(valid_alpha, "compression_alpha", "must be positive, or None for a fixed factor")
        _ = self.geometry  # Raises if the block size does not fit the pooling factor.

    @property
    def pool_factor(self) -> int:
        """The pooling factor r in use."""
        if self.compression_alpha is None:
            return self.compression_factor
        wanted = round(self.compression_alpha * math.log(self.max_sequence_length))
        return min(max(wanted, 2), self.max_compression_factor)

    @property
    def geometry(self) -> Geometry:
        """The layout of the levels."""
        return Geometry.resolve(self.block_size, self.pool_factor, self.num_levels, self.max_sequence_length)


class MSRAAttention(AttentionCore):
    """The core of MSRA: learned pooling, learned preference for levels, parallel and streaming form.

    In the parallel form it offers ``attentions`` and ``level_weights`` to ``observing``, as in ``MSRAOutput``.

    Args:
        config: The settings.
    """

    config: MSRAConfig

    def __init__(self, config: MSRAConfig) -> None:
        """Create the learned parts; a single level needs none of them."""
        super().__init__(config)
        self.geometry = config.geometry
        upper, groups, width = self.geometry.num_levels - 1, config.kv_heads, config.head_dim
        self.pool_query: nn.Parameter | None = None
        self.key_maps: nn.Parameter | None = None
        self.value_maps: nn.Parameter | None = None
        self.level_bias: ZeroLinear | None = None
        self.fusion: WeightedFusion | ConcatFusion | None = None
        if upper > 0:
            self.pool_query = nn.Parameter(torch.empty(groups, width))
            self.key_maps = nn.Parameter(torch.empty(upper, groups, width, width))
            self.value_maps = nn.Parameter(torch.empty(upper, groups, width, width))
        if upper > 0 and config.feature_fusion == "adaptive":
            self.level_bias = ZeroLinear(config.hidden_size, config.num_heads * self.geometry.num_levels)
        if config.feature_fusion == "weighted":
            std = config.initializer_range
            self.fusion = WeightedFusion(config.hidden_size, config.num_heads, config.head_dim, std=std)
        if config.feature_fusion == "concat":
            self.fusion = ConcatFusion(self.geometry.num_levels, config.head_dim, std=config.initializer_range)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from mean pooling: no direction counts more, and the maps are identities."""
        if self.pool_query is None or self.key_maps is None or self.value_maps is None:
            return
        with torch.no_grad():
            self.pool_query.zero_()
            for maps in (self.key_maps, self.value_maps):
                maps.copy_(torch.eye(maps.shape[-1], device=maps.device).expand_as(maps))

    @property
    def streams_without_end(self) -> bool:
        """True with a fixed number of levels: what is out of reach is let go."""
        return self.config.num_levels != "auto"

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Return the state before the first token; see ``AttentionCore.init_state``."""
        heads, width, levels = self.config.kv_heads, self.config.head_dim, self.geometry.num_levels
        return empty_state(batch_size, heads, width, levels, device=device, dtype=dtype)

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
        level_bias = self._level_bias(x)
        if (0 if state is None else state["position"]) + x.shape[1] > self.geometry.reach:
            self._leave_out_of_reach()
        if state is not None:
            return self._stream(x, q, k, v, level_bias, key_padding_mask, state)
        attend = self._attend(q, k, level_bias, key_padding_mask)
        output = attend(v, value_maps=self.value_maps, feature_fusion=self._feature_fusion(x), dropout_p=self.dropout_p)
        if self.fusion is None:
            self._observe("attentions", lambda: token_weights(attend, v))
        self._observe("level_weights", lambda: attend(v, return_stats=True)[1].level_weights)
        if self.geometry.active_levels(x.shape[1]) == 1:
            output = self._keep_unused(output, level_bias)
        return output, None

    def _level_bias(self, x: Tensor) -> Tensor | None:
        """Return what is added to the logits of each level ``[b, H, n, L]``."""
        if self.level_bias is None:
            return None
        bias: Tensor = self.level_bias(x).unflatten(-1, (-1, self.geometry.num_levels)).transpose(1, 2)
        return bias

    def _attend(
        self, q: Tensor, k: Tensor, level_bias: Tensor | None, key_padding_mask: Tensor | None
    ) -> Callable[..., Any]:
        """Return the parallel form as a function of the values, which leaves the maps of the values aside."""
        return partial(
            msra_attention,
            q,
            k,
            block_size=self.config.block_size,
            pool_factor=self.config.pool_factor,
            num_levels=self.geometry.num_levels,
            level_bias=level_bias,
            pool_query=self.pool_query,
            key_maps=self.key_maps,
            rope_base=self.config.rope_base,
            causal=self.config.causal,
            key_padding_mask=key_padding_mask,
        )

    def _statistics(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> dict[str, Any]:
        """Count cells, and tell the share of each level where there is one softmax."""
        length, levels = q.shape[-2], self.geometry.active_levels(q.shape[-2])
        real = q.new_ones(q.shape[0], length, dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        read = [self.geometry.count_seen(real, level, causal=self.config.causal) for level in range(levels)]
        found: dict[str, Any] = {"tokens_read": read[0], "keys_read": torch.stack(read).sum(dim=0)}
        if self.fusion is None:
            attend = self._attend(q, k, self._level_bias(x), key_padding_mask)
            shares = attend(v, return_stats=True)[1].level_weights
            for level in range(levels):
                name = "tokens" if level == 0 else f"summaries_of_{self.geometry.span(level)}"
                found[f"route/{name}"] = shares[..., level]
        return found

    def _token_weights(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Return the weights of cells times the shares of tokens in them; there are none without a common softmax."""
        if self.fusion is not None:
            return None
        return token_weights(self._attend(q, k, self._level_bias(x), key_padding_mask), v)

    def _stream(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        level_bias: Tensor | None,
        key_padding_mask: Tensor | None,
        state: State,
    ) -> tuple[Tensor, State]:
        """Attend piece by piece, so that the cost of a long chunk stays linear in its length."""
        piece = self.config.block_size * self.config.pool_factor
        outputs = []
        for start in range(0, x.shape[1], piece):
            here = slice(start, start + piece)
            output, state = stream_chunk(
                q[:, :, here],
                k[:, :, here],
                v[:, :, here],
                state,
                geometry=self.geometry,
                level_bias=None if level_bias is None else level_bias[:, :, here],
                pool_query=self.pool_query,
                key_maps=self.key_maps,
                value_maps=self.value_maps,
                rope_base=self.config.rope_base,
                key_padding_mask=None if key_padding_mask is None else key_padding_mask[:, here],
                feature_fusion=self._feature_fusion(x[:, here]),
                dropout_p=self.dropout_p,
            )
            outputs.append(output)
        # The cells of the upper levels may all come from earlier chunks, perhaps detached.
        return self._keep_unused(torch.cat(outputs, dim=2), level_bias), state

    def _leave_out_of_reach(self) -> None:
        """Tell the user, once, that what is far back is not seen."""
        if not torch.compiler.is_compiling():
            _warn_out_of_reach(self.geometry.reach)

    def _feature_fusion(self, x: Tensor) -> FeatureFusion:
        if isinstance(self.fusion, WeightedFusion):
            return partial(self.fusion, x=x)
        return "adaptive" if self.fusion is None else self.fusion

    def _keep_unused(self, output: Tensor, level_bias: Tensor | None) -> Tensor:
        """Give what only the upper levels use at least a zero gradient."""
        candidates: Sequence[Tensor | None] = (level_bias, self.pool_query, self.key_maps, self.value_maps)
        return keep_in_graph(output, *(tensor for tensor in candidates if tensor is not None))


@functools.cache
def _warn_out_of_reach(reach: int) -> None:
    """Warn, once for every ``reach``, that tokens further back are not seen."""
    warnings.warn(
        f"num_levels is fixed: tokens more than {reach} positions back are out of reach, and those from {reach // 2} "
        "on may be; raise num_levels, or use num_levels='auto'",
        stacklevel=3,
    )


@dataclass
class MSRAOutput(AttentionModelOutput):
    """What an MSRA model returns.

    Attributes:
        attentions: For each layer, how much of the value of each token is in the output ``[b, H, n, n]``, if asked for
            with ``output_details=("attentions",)``: the weight of a cell, times the share of the token in the cell.
            ``None`` where levels are fused other than in one softmax.
        level_weights: For each layer, the share of each level in the softmax ``[b, H, n, L]``, if asked for.
    """

    attentions: tuple[Tensor, ...] | None = None
    level_weights: tuple[Tensor, ...] | None = None


class MSRAModel(AttentionModel):
    """A model with multi-scale recursive attention in every block.

    Args:
        config: The settings; ``None`` means the defaults.
        **overrides: Settings that replace those of ``config``.
    """

    config_class: ClassVar[type[AttentionConfig]] = MSRAConfig
    output_class: ClassVar[type[AttentionModelOutput]] = MSRAOutput
    config: MSRAConfig

    def __init__(self, config: MSRAConfig | None = None, **overrides: object) -> None:
        """Create the layers."""
        super().__init__(config, **overrides)

    @torch.no_grad()
    def compute_attention_weights(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return how much of each token is in the attention output of each other one, after cells are opened.

        Rows add up to one, except those that see no real token, which are zero. The learned maps of the values are left
        aside, and dropout is.

        Args:
            input_ids: Token ids ``[b, n]``.
            attention_mask: 1 for real tokens ``[b, n]``.

        Returns:
            ``[b, H, n, n]`` by the name of the layer: ``layer_0``, ``layer_1``, …

        Raises:
            ValueError: If levels are fused other than in one softmax, so that there are no such weights.
        """
        if self.config.feature_fusion != "adaptive":
            raise ValueError(f"feature_fusion={self.config.feature_fusion!r} has no common weights; 'adaptive' has")
        with evaluating(self):
            output = self(input_ids, attention_mask, output_details=("attentions",))
        return {f"layer_{index}": weights for index, weights in enumerate(output.attentions)}

    def get_compression_stats(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, float]:
        """Measure, for some input, how much is compressed, and what that saves and loses.

        Args:
            input_ids: Token ids ``[b, n]``, n at most 2,048.
            attention_mask: 1 for real tokens ``[b, n]``.

        Returns:
            ``compression_ratio``: cells that the tokens see over the tokens that they would see under full attention,
            all without padding; ``information_retention``, ``computation_savings`` and ``memory_savings`` as in
            ``Efficiency``.

        Raises:
            ValueError: If the input is too long, or all of it is padding.
        """
        efficiency = measure_efficiency(self, input_ids, attention_mask)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = real.bool()
        if not real.any():
            raise ValueError("attention_mask has no real token, so that nothing is compressed; give it some")
        causal, geometry = self.config.causal, self.config.geometry
        levels = range(geometry.active_levels(input_ids.shape[1]))
        cells = sum(geometry.count_seen(real, level, causal=causal).sum().item() for level in levels)
        tokens = (real.cumsum(dim=1) * real).sum() if causal else real.sum(dim=1).square().sum()
        return {"compression_ratio": cells / tokens.item(), **efficiency._asdict()}


register_variant("msra", MSRAConfig, MSRAAttention)
