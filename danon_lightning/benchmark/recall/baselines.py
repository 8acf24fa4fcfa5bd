"""Gated linear attention as a layer: a baseline of this benchmark only, for it is known to recall little.

Reference:
    Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient Training" (output gate and norm); Dao
    & Gu 2024, "Transformers are SSMs" (one decay a head).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danon_lightning.attention import AttentionConfig, AttentionCore, State, register_variant
from danon_lightning.attention.functional import gated_linear_attention

GATED_LINEAR = "benchmark_gated_linear"
# Logits of the decay at first: from 0.88 in the first head to 0.9975 in the last one.
_FIRST_DECAYS = (2.0, 6.0)


@dataclass(frozen=True, kw_only=True)
class GatedLinearConfig(AttentionConfig):
    """Settings of gated linear attention: those that all variants share."""


class GatedLinearAttention(AttentionCore):
    """S_t = γ_t S_{t-1} + k_t v_tᵀ, read by q_t, normalised over the head, times a gate of the token.

    Args:
        config: The settings.
    """

    def __init__(self, config: GatedLinearConfig) -> None:
        """Create decay, gain and gate."""
        super().__init__(config)
        width, heads = config.hidden_size, config.num_heads
        self.decay = nn.Linear(width, heads)
        self.gain = nn.Parameter(torch.ones(heads, 1, config.head_dim))
        self.gate = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.decay.weight.zero_()
            self.decay.bias.copy_(torch.linspace(*_FIRST_DECAYS, heads))
            self.gate.weight.normal_(std=config.initializer_range)

    @property
    def streams_without_end(self) -> bool:
        """True: the state does not grow."""
        return True

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Return an empty memory; see ``AttentionCore.init_state``."""
        width = self.config.head_dim
        return {"memory": torch.zeros(batch_size, self.config.num_heads, width, width, device=device, dtype=dtype)}

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
        log_decay = F.logsigmoid(self.decay(x)).transpose(1, 2)  # [b, H, n]
        if key_padding_mask is not None:
            log_decay = log_decay.masked_fill(~key_padding_mask[:, None], 0.0)
            k = k.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
        initial = None if state is None else state["memory"]
        read, memory = gated_linear_attention(q * q.shape[-1] ** -0.5, k, v, log_decay, initial_state=initial)
        read = F.rms_norm(read, read.shape[-1:], eps=self.config.layer_norm_eps) * self.gain
        gate = F.silu(self.gate(x)).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
        return read * gate, None if state is None else {"memory": memory}


register_variant(GATED_LINEAR, GatedLinearConfig, GatedLinearAttention)
