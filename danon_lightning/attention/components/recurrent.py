"""The whole past in one matrix a head, by the gated delta rule."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from danon_lightning.attention.checks import check_heads, check_mask, check_shapes, check_tokens
from danon_lightning.attention.core import State
from danon_lightning.attention.layers import ZeroLinear, joint_linear
from danon_lightning.attention.linear.functional import resumed_delta_rule
from danon_lightning.attention.pieces import tokens_at_once
from danon_lightning.attention.recompute import Scan, in_pieces, is_traced

__all__ = ["RecurrentState"]

# The slowest head forgets half of what it holds in 277 tokens.
SLOWEST_DECAY = 0.9975
# Only a vector of zeros, which stays one, is as short as this.
UNIT_EPS = 1e-24


class RecurrentState(nn.Module):
    """A memory in which a token replaces what its key held, and which fades at a learned rate.

    S_t = γ_t (I - η_t k̂_t k̂_tᵀ) S_{t-1} + η_t k̂_t v_tᵀ, q̂ and k̂ being silu(q) and silu(k) at unit length, and γ_t and
    η_t gates of the token. What is read, S_tᵀ q̂_t, is divided by its root mean square and multiplied by a gain, which
    is zero at first.

    With an ``update_frequency`` f above 1, the state takes in its tokens f at a time: a token reads the state after the
    last whole group, and those since then must be read elsewhere.

    Reference:
        Yang et al. 2025, "Gated Delta Networks: Improving Mamba2 with Delta Rule".

    Args:
        dim: Width D of a token.
        num_heads: Heads H.
        head_dim: Width d of a head.
        decay_rate: γ of the first head at first; the others are spread from there to 0.9975, evenly in their logits.
            All have it where it is larger than that.
        update_frequency: Tokens f that the state takes in at once.
        eps: Added to the mean square of what is read.
        chunk_size: Tokens that are worked on at once; it decides about speed only.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        decay_rate: float = 0.9,
        update_frequency: int = 1,
        eps: float = 1e-6,
        chunk_size: int = 64,
    ) -> None:
        """Create the gates and the gain."""
        super().__init__()
        if not 0 < decay_rate < 1:
            raise ValueError(f"decay_rate={decay_rate} must lie between 0 and 1")
        if not isinstance(update_frequency, int) or update_frequency < 1:
            raise ValueError(f"update_frequency={update_frequency!r} must be an integer of at least 1")
        self.decay_rate, self.update_frequency = decay_rate, update_frequency
        self.eps, self.chunk_size = eps, chunk_size
        self.decay = ZeroLinear(dim, num_heads)
        self.rate = ZeroLinear(dim, num_heads)
        self.gain = nn.Parameter(torch.empty(num_heads, head_dim))
        self.decay_offset = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Silence the output, and spread the decay over the heads."""
        slow = max(self.decay_rate, SLOWEST_DECAY)
        first, last = (math.log(rate / (1 - rate)) for rate in (self.decay_rate, slow))
        with torch.no_grad():
            self.gain.zero_()
            self.decay_offset.copy_(torch.linspace(first, last, len(self.decay_offset)))

    def init_state(self, batch_size: int, kv_heads: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Return the state before the first token.

        Args:
            batch_size: Number of sequences b.
            kv_heads: Key and value heads G.
            device: Where the state lives.
            dtype: Dtype of keys and values.

        Returns:
            The ``matrix`` ``[b, H, d, d]``, and what waits to be taken in: ``keys`` and ``values`` ``[b, G, m, d]``,
            their ``log_decay`` and ``rates`` ``[b, H, m]``, m < f.
        """
        heads, width = self.gain.shape
        precise = torch.promote_types(dtype, torch.float32)
        waiting = torch.empty(batch_size, kv_heads, 0, width, device=device, dtype=dtype)
        gates = torch.empty(batch_size, heads, 0, device=device, dtype=precise)
        return {
            "matrix": torch.zeros(batch_size, heads, width, width, device=device, dtype=precise),
            "keys": waiting,
            "values": waiting,
            "log_decay": gates,
            "rates": gates,
        }

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        weight: Tensor | None = None,
        onto: Tensor | None = None,
        gates: Sequence[Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """Take the tokens in and read.

        Args:
            x: Tokens ``[b, n, D]``, for the gates.
            q: Queries ``[b, H, n, d]``.
            k: Keys ``[b, G, n, d]``.
            v: Values ``[b, G, n, d]``.
            weight: What is read is multiplied with it ``[b, H, n]``; ``None`` means one.
            onto: What is read is added to it ``[b, H, n, d]``; overwritten, unless gradients are wanted.
            gates: What the layers ``decay`` and ``rate`` give ``[b, n, H]`` each, if it is known.
            key_padding_mask: True for real tokens ``[b, n]``, boolean; padding neither enters the state nor lets it
                fade.
            state: What came before, from ``init_state`` or an earlier call; ``None``: nothing, and no state wanted.

        Returns:
            What is read ``[b, H, n, d]`` in the dtype of ``v``, and the new state if one was given.

        Raises:
            ValueError: If shapes do not fit each other, or the state comes from another configuration or batch size.
        """
        self._check(x, q, k, v, weight, onto, gates, key_padding_mask)
        if state is not None:
            self._check_state(state, x.shape[0], k.shape[1])
        fine = torch.promote_types(x.dtype, torch.float32)
        decay, rate = (gate.to(fine).mT for gate in gates or joint_linear(x, (self.decay, self.rate)))  # [b, H, n]
        log_decay, rates = F.logsigmoid(decay + self.decay_offset.to(fine).unsqueeze(-1)), rate.sigmoid()
        if key_padding_mask is not None:
            padding = ~key_padding_mask.unsqueeze(1)
            log_decay, rates = log_decay.masked_fill(padding, 0.0), rates.masked_fill(padding, 0.0)
        if weight is None:
            weight = torch.ones_like(rates)
        waiting = 0
        if state is not None:
            waiting = state["rates"].shape[-1]
            q, weight = F.pad(q, (0, 0, waiting, 0)), F.pad(weight, (waiting, 0))
            k = torch.cat([state["keys"].to(k.dtype), k], dim=2)
            v = torch.cat([state["values"].to(v.dtype), v], dim=2)
            log_decay = torch.cat([state["log_decay"].to(fine), log_decay], dim=2)
            rates = torch.cat([state["rates"].to(fine), rates], dim=2)
        length, step = q.shape[2], self.update_frequency
        matrix = None if state is None else state["matrix"]
        if matrix is None:
            precise = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
            matrix = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], device=q.device, dtype=precise)
        # More matrices for each token than attention has: pieces are half as long.
        whole = max(1, tokens_at_once(q.device) // 2 // step) * step
        work = Scan(self._advance, sequences=6)
        tensors = (q, k, v, log_decay, rates, weight, self.gain)
        if state is None:
            return in_pieces(work, tensors, length, whole, matrix, onto=onto)[0][0], None
        (read,), matrix = in_pieces(work, tensors, length, whole, matrix)
        read = read[:, :, waiting:]
        kept = slice(length - length % step, None)
        new_state = {
            "matrix": matrix,
            # Copies, so that the state does not keep the chunk alive.
            "keys": k[:, :, kept].clone(),
            "values": v[:, :, kept].clone(),
            "log_decay": log_decay[:, :, kept].clone(),
            "rates": rates[:, :, kept].clone(),
        }
        return read if onto is None else onto + read, new_state

    def _check(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor | None,
        onto: Tensor | None,
        gates: Sequence[Tensor] | None,
        key_padding_mask: Tensor | None,
    ) -> None:
        """Raise unless the arguments fit each other."""
        check_tokens(x, self.decay.in_features)
        (batch, length, _), (heads, width) = x.shape, self.gain.shape
        given = f"x has shape {list(x.shape)} and there are {heads} heads of width {width}"
        check_shapes({"q": (q, (batch, heads, length, width))}, given)
        check_heads(q, k)
        groups = k.shape[1]
        expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "k": (k, (batch, groups, length, width)),
            "v": (v, (batch, groups, length, width)),
            "weight": (weight, (batch, heads, length)),
            "onto": (onto, (batch, heads, length, width)),
            "key_padding_mask": (key_padding_mask, (batch, length)),
        }
        expected |= {f"gates[{index}]": (gate, (batch, length, heads)) for index, gate in enumerate(gates or ())}
        check_shapes(expected, given)
        check_mask(key_padding_mask)

    def _check_state(self, state: State, batch: int, groups: int) -> None:
        """Raise unless a state fits this module and so many sequences."""
        heads, width = self.gain.shape
        names = ("matrix", "keys", "values", "log_decay", "rates")
        shapes = {name: tuple(state[name].shape) if name in state else None for name in names}
        waiting = min((shapes["rates"] or (0,))[-1], self.update_frequency - 1)
        expected = {
            "matrix": (batch, heads, width, width),
            **dict.fromkeys(("keys", "values"), (batch, groups, waiting, width)),
            **dict.fromkeys(("log_decay", "rates"), (batch, heads, waiting)),
        }
        if any(shapes[name] != shape for name, shape in expected.items()):
            raise ValueError(
                f"state holds tensors of shapes {shapes}, but {batch} sequences, {groups} key heads and "
                f"update_frequency={self.update_frequency} need {expected}; start from init_state({batch}, {groups}, …)"
            )

    def _advance(
        self,
        matrix: Tensor,
        known: Sequence[Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        rates: Tensor,
        weight: Tensor,
        gain: Tensor,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Take a piece of the sequence in and read; return the new state too, and what is to be known next time."""
        query, key = (_scaled(F.silu(part), UNIT_EPS) for part in (q, k))
        read, matrix, kept = self._run(query, key, v, log_decay, rates, matrix, known)
        width = read.shape[-1]
        # Divided by the root mean square.
        gain = (gain * width**0.5).to(read.dtype).unsqueeze(1)
        return _scaled(read, self.eps * width, weight.unsqueeze(-1), gain), matrix, kept

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        rates: Tensor,
        matrix: Tensor,
        known: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return what each query reads, the state after the last whole group, and what is to be known next time."""
        step = self.update_frequency
        if step == 1:
            return resumed_delta_rule(q, k, v, log_decay, rates, self.chunk_size, matrix, known)
        # Twice: at first the tokens of a group read, changing nothing, then they enter. The last of them reads after
        # that; a group that is not yet whole only reads.
        length, groups = q.shape[2], -(-q.shape[2] // step)
        whole = length - length % step

        def grouped(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, 0, groups * step - length)).unflatten(2, (groups, step))

        def entering(x: Tensor) -> Tensor:
            x = grouped(F.pad(x[:, :, :whole], (0, 0, 0, length - whole)))
            return torch.cat([torch.zeros_like(x), x], dim=3).flatten(2, 3)

        queries = grouped(q).repeat(1, 1, 1, 2, 1).flatten(2, 3)
        decays, learning = (entering(gate.unsqueeze(-1)).squeeze(-1) for gate in (log_decay, rates))
        read, matrix, kept = resumed_delta_rule(
            queries, entering(k), entering(v), decays, learning, self.chunk_size, matrix, known
        )
        before, after = read.unflatten(2, (groups, 2, step)).unbind(3)
        return torch.cat([before[:, :, :, :-1], after[:, :, :, -1:]], dim=3).flatten(2, 3)[:, :, :length], matrix, kept


def _scaled(x: Tensor, eps: float, weight: Tensor | None = None, gain: Tensor | None = None) -> Tensor:
    """Divide by the root of the sum of squares of the last dimension, and of ``eps``.

    Args:
        x: ``[b, H, n, d]``.
        eps: Keeps it from dividing by zero.
        weight: The result is multiplied with it ``[b, H, n, 1]``, and with ``gain``.
        gain: ``[H, 1, d]``, given if ``weight`` is.
    """
    if not is_traced(x):
        result: Tensor = _Scaled.apply(x, eps, weight, gain)
        return result
    unit = x * _one_over_root(x, eps).to(x.dtype)
    return unit if weight is None or gain is None else unit * weight.to(x.dtype) * gain


def _one_over_root(x: Tensor, eps: float) -> Tensor:
    # Several times as fast as normalize and rms_norm on CPUs.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (norm.square() + eps).rsqrt()


class _Scaled(torch.autograd.Function):
    """The same with a third of the passes that autograd makes backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, weight: Tensor | None, gain: Tensor | None) -> Tensor:
        root = _one_over_root(x, eps)
        if weight is None or gain is None:
            result = x * root.to(x.dtype)
            ctx.save_for_backward(result, root)
            return result
        ctx.save_for_backward(x, root, weight, gain)
        return (x * (root * weight).to(x.dtype)).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, root, *factors = ctx.saved_tensors
        if not factors:
            along = torch.linalg.vecdot(grad, x).unsqueeze(-1)
            return (grad - x * along).mul_(root.to(x.dtype)), None, None, None
        weight, gain = factors
        scale = (root * weight).to(x.dtype)
        products = grad * x
        along = products @ gain.mT  # [b, H, n, 1]
        grad_gain = (scale.mT @ products).sum(dim=0)
        grad_weight = along.to(root.dtype) * root
        grad_x = (grad * gain).mul_(scale).sub_(x * (grad_weight * root.square() * weight).to(x.dtype))
        return grad_x, None, grad_weight.to(weight.dtype), grad_gain
