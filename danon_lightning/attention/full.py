"""Full softmax attention: the baseline that every sub-quadratic variant is measured against.

It shares the block, the rotary embedding and the convolution with the other variants, so that a comparison is about
the core alone.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.attention.checks import check_dtypes, check_heads, check_mask, check_queries, check_shapes
from danon_lightning.attention.config import AttentionConfig
from danon_lightning.attention.core import AttentionCore, State
from danon_lightning.attention.model import AttentionModel
from danon_lightning.attention.registry import register_variant
from danon_lightning.attention.rotary import apply_rotary, cell_positions
from danon_lightning.attention.statistics import token_weights, visible_keys

__all__ = ["FullAttention", "FullAttentionConfig", "FullAttentionModel", "full_attention"]


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attend to all keys, cost O(n²), through ``scaled_dot_product_attention``.

    Args:
        q: Queries ``[b, H, n, d]``, rotated already where rotation is wanted.
        k: Keys ``[b, G, m, d]``, H divisible by G.
        v: Values ``[b, G, m, d]``.
        causal: Whether query i sees the keys up to ``m - n + i`` only: the queries are the last n of the m tokens.
        key_padding_mask: True for real tokens ``[b, m]``, boolean; ``None`` means that all are.
        dropout_p: Probability of dropping an attention weight.
        scale: Factor of the logits; ``None`` means 1/√d.

    Returns:
        ``[b, H, n, d]``; rows that see no real token are zero.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.
    """
    _check(q, k, v, causal, key_padding_mask)
    queries, keys = q.shape[-2], k.shape[-2]
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if key_padding_mask is None and (queries == keys or queries == 1 or not causal):
        # The last query sees everything; elsewhere is_causal spares the kernel half of the work.
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=causal and queries > 1, scale=scale
        )
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(keys - queries)
    if key_padding_mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p, scale=scale)
    visible = visible & key_padding_mask[:, None, None, :]  # [b, 1, n, m]
    blind = ~visible.any(dim=-1, keepdim=True)
    # A softmax over nothing is NaN in some kernels: let blind rows see everything, and drop what they find.
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | blind, dropout_p=dropout_p, scale=scale)
    return output.masked_fill(blind, 0.0)


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_padding_mask: Tensor | None) -> None:
    """Raise unless the arguments fit each other."""
    check_queries(q)
    check_heads(q, k)
    batch, _, queries, width = q.shape
    groups, keys, least = k.shape[1], k.shape[2], queries if causal else 1
    if keys < least:
        raise ValueError(
            f"k has shape {list(k.shape)}, but q has shape {list(q.shape)}; k must have at least {least} tokens"
            + (", for causal queries are the last of them" if causal else "")
        )
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, (batch, groups, keys, width)),
        "v": (v, (batch, groups, keys, v.shape[-1])),
        "key_padding_mask": (key_padding_mask, (batch, keys)),
    }
    check_shapes(expected, f"q has shape {list(q.shape)} and k {list(k.shape)}")
    check_mask(key_padding_mask)
    if not torch.is_autocast_enabled(q.device.type):  # It makes them equal.
        check_dtypes(q, k, v)


@dataclass(frozen=True, kw_only=True)
class FullAttentionConfig(AttentionConfig):
    """Settings of full attention: those that all variants share."""

    outside_state: ClassVar[frozenset[str]] = AttentionConfig.outside_state | {"max_sequence_length"}


class FullAttention(AttentionCore):
    """Full attention with rotary positions and a key-value cache that grows with the sequence.

    Args:
        config: The settings of the model.
    """

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Return an empty cache; see ``AttentionCore.init_state``."""
        nothing = torch.empty(batch_size, self.config.kv_heads, 0, self.config.head_dim, device=device, dtype=dtype)
        return {
            "keys": nothing,
            "values": nothing,
            "key_padding_mask": torch.empty(batch_size, 0, device=device, dtype=torch.bool),
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
        first = 0 if state is None else state["keys"].shape[-2]
        positions = cell_positions(first, q.shape[-2], 1, q.device)
        q = apply_rotary(q, positions, self.config.rope_base)
        k = apply_rotary(k, positions, self.config.rope_base)
        if state is not None:
            state = self._extend(state, k, v, key_padding_mask)
            k, v, key_padding_mask = state["keys"], state["values"], state["key_padding_mask"]
        output = full_attention(
            q,
            k,
            v,
            causal=self.config.causal,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout_p,
        )
        return output, state

    def _statistics(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> dict[str, Any]:
        """Tell that everything is read."""
        everything = visible_keys(q, causal=self.config.causal, key_padding_mask=key_padding_mask)
        return {"tokens_read": everything, "keys_read": everything}

    def _token_weights(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Return the weights of the softmax."""
        positions = cell_positions(0, q.shape[-2], 1, q.device)
        query, key = (apply_rotary(part, positions, self.config.rope_base) for part in (q, k))
        causal = self.config.causal
        return token_weights(
            lambda values: full_attention(query, key, values, causal=causal, key_padding_mask=key_padding_mask), v
        )

    @staticmethod
    def _extend(state: State, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> State:
        """Return the cache with a chunk of rotated keys, values and their mask appended."""
        if key_padding_mask is None:
            key_padding_mask = torch.ones(k.shape[0], k.shape[-2], dtype=torch.bool, device=k.device)
        return {
            "keys": torch.cat([state["keys"].to(k.dtype), k], dim=-2),
            "values": torch.cat([state["values"].to(v.dtype), v], dim=-2),
            "key_padding_mask": torch.cat([state["key_padding_mask"], key_padding_mask], dim=-1),
        }


class FullAttentionModel(AttentionModel):
    """A model with full attention in every block.

    Args:
        config: The settings; ``None`` means the defaults.
        **overrides: Settings that replace those of ``config``.
    """

    config_class: ClassVar[type[AttentionConfig]] = FullAttentionConfig

    def __init__(self, config: FullAttentionConfig | None = None, **overrides: object) -> None:
        """Create the layers."""
        super().__init__(config, **overrides)


register_variant("full", FullAttentionConfig, FullAttention)
