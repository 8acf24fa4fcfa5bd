"""The gated recurrences written as their definitions read: one token after the other.

They share no code with the chunked forms, and exist to check them, in float64.
"""

import torch
from torch import Tensor

__all__ = ["gated_delta_rule_reference", "gated_linear_attention_reference"]


def gated_linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute ``gated_linear_attention`` naively; see there for the arguments.

    Returns:
        The output ``[b, H, n, dv]`` and the last state ``[b, H, d, dv]``.
    """
    k, v, state = _prepare(q, k, v, initial_state)
    outputs = []
    for t in range(q.shape[2]):
        decay = log_decay[:, :, t].exp()[..., None, None]
        state = decay * state + torch.einsum("bhi,bhj->bhij", k[:, :, t], v[:, :, t])
        outputs.append(torch.einsum("bhij,bhi->bhj", state, q[:, :, t]))
    return torch.stack(outputs, dim=2), state


def gated_delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute ``gated_delta_rule`` naively; see there for the arguments.

    Returns:
        The output ``[b, H, n, dv]`` and the last state ``[b, H, d, dv]``.
    """
    k, v, state = _prepare(q, k, v, initial_state)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    outputs = []
    for t in range(q.shape[2]):
        decay, rate = (x[:, :, t][..., None, None] for x in (log_decay.exp(), beta))
        erase = identity - rate * torch.einsum("bhi,bhj->bhij", k[:, :, t], k[:, :, t])
        state = decay * (erase @ state) + rate * torch.einsum("bhi,bhj->bhij", k[:, :, t], v[:, :, t])
        outputs.append(torch.einsum("bhij,bhi->bhj", state, q[:, :, t]))
    return torch.stack(outputs, dim=2), state


def _prepare(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values for every query head, and the first state."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if initial_state is None:
        initial_state = q.new_zeros(q.shape[0], q.shape[1], q.shape[-1], v.shape[-1])
    return k, v, initial_state
