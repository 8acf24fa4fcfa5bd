"""The block that all attention variants share; only the core inside it differs.

Reference:
    Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danon_lightning.attention.components.stability import StabilityEnhancer
from danon_lightning.attention.config import AttentionConfig
from danon_lightning.attention.conv import DepthwiseConv
from danon_lightning.attention.core import AttentionCore, State
from danon_lightning.attention.layers import NormalLinear

__all__ = ["AttentionBlock"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}


class AttentionBlock(nn.Module):
    """Attention and MLP, each behind a norm and inside a residual branch.

    The attention branch is norm, projections, convolution, core, output projection.

    Args:
        config: The settings of the model.
        core: The attention variant.
    """

    def __init__(self, config: AttentionConfig, core: AttentionCore) -> None:
        """Create the layers."""
        super().__init__()
        self.config = config
        width, std = config.hidden_size, config.initializer_range
        kv_width = config.kv_heads * config.head_dim
        self.qkv_widths = [width, kv_width, kv_width]
        self.attention_norm = nn.RMSNorm(width, eps=config.layer_norm_eps)
        self.qkv = NormalLinear(width, sum(self.qkv_widths), bias=False, std=std)
        self.conv = DepthwiseConv(sum(self.qkv_widths), causal=config.causal)
        self.core = core
        self.output = NormalLinear(width, width, bias=False, std=std)
        share = config.calibration_factor
        self.stability = StabilityEnhancer(width, calibration_factor=share) if share > 0 else None
        self.mlp_norm = nn.RMSNorm(width, eps=config.layer_norm_eps)
        self.mlp_in = NormalLinear(width, config.mlp_size, std=std)
        self.mlp_out = NormalLinear(config.mlp_size, width, std=std)

    def init_state(self, batch_size: int) -> State:
        """Return the streaming state before the first token.

        Args:
            batch_size: Number of sequences b.
        """
        weight = self.qkv.weight
        core_state = self.core.init_state(batch_size, device=weight.device, dtype=weight.dtype)
        return {"conv": self.conv.init_state(batch_size), "core": core_state}

    def forward(
        self, hidden: Tensor, key_padding_mask: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """Apply the block.

        Args:
            hidden: Input ``[b, n, D]``.
            key_padding_mask: True for real tokens ``[b, n]``, boolean; ``None`` means that all are.
            state: ``None`` for the parallel form, or the state before ``hidden``.

        Returns:
            The output ``[b, n, D]``, and the new state if one was given.
        """
        x = self.attention_norm(hidden)
        mixed, new_state = self._attend(x, key_padding_mask, state)
        branch = self.output(mixed)
        if self.stability is not None:
            branch = self.stability(branch, key_padding_mask)
        hidden = hidden + self._dropout(branch)
        inner = _ACTIVATIONS[self.config.activation](self.mlp_in(self.mlp_norm(hidden)))
        return hidden + self._dropout(self.mlp_out(inner)), new_state

    def _attend(self, x: Tensor, key_padding_mask: Tensor | None, state: State | None) -> tuple[Tensor, State | None]:
        projected = self.qkv(x)
        if key_padding_mask is not None:
            # The convolution must find in place of padding what it finds before the first token.
            projected = projected.masked_fill(~key_padding_mask.unsqueeze(-1), 0.0)
        projected, conv_state = self.conv(projected, None if state is None else state["conv"])
        q, k, v = (
            part.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # [b, H or G, n, d]
            for part in projected.split(self.qkv_widths, dim=-1)
        )
        if self.config.stability_factor > 0:
            q, k = (
                torch.lerp(part, F.rms_norm(part, part.shape[-1:]), self.config.stability_factor) for part in (q, k)
            )
        core: Callable[..., tuple[Tensor, State | None]] = self.core
        if self.config.memory_efficient and self.training and torch.is_grad_enabled():
            core = partial(checkpoint, self.core, use_reentrant=False)
        core_state = None if state is None else state["core"]
        mixed, core_state = core(x, q, k, v, key_padding_mask=key_padding_mask, state=core_state)
        new_state = None if state is None else {"conv": conv_state, "core": core_state}
        return mixed.transpose(1, 2).flatten(2), new_state

    def _dropout(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.config.dropout, self.training)
