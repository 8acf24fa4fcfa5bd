"""The gated delta rule over a few chunks, forward and backward as dense products.

Reference:
    Yang et al. 2025, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (solved inside a chunk by the WY
    representation).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from danon_lightning.attention.linear.chunks import Chunks, decay_between, decay_to_end

__all__ = ["replace"]


def replace(
    chunks: Chunks, state: Tensor, inverse: Tensor | None = None, updates: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advance the gated delta rule by T chunks.

    With u_t = η_t (v_t - γ_t S_{t-1}ᵀ k_t), what a token adds on top of what its key held, the state is
    S_t = γ_t S_{t-1} + k_t u_tᵀ. Inside a chunk, G the cumulated decay and S the state before it, this gives the
    triangular system u_i + η_i Σ_{j<i} e^{G_i - G_j} (k_i · k_j) u_j = η_i v_i - η_i e^{G_i} Sᵀ k_i.

    Args:
        chunks: The chunks, with ``beta``.
        state: The state before them ``[N, d, dv]``.
        inverse: The inverse of the triangular matrix ``[N·T, C, C]``, if it is known.
        updates: The u ``[N·T, C, dv]``, given if ``inverse`` is.

    Returns:
        The output ``[N, T, C, dv]``, the new state, the inverse and the u; the last two without gradients.
    """
    # Compilers and exporters find the backward pass by themselves.
    q, k, v, log_decay, beta = chunks
    assert beta is not None
    advance = _advance if torch.compiler.is_compiling() else _Replace.apply
    output, last, inverse, updates, *_ = advance(q, k, v, log_decay, beta, state, inverse, updates)
    return output, last, inverse, updates


def _advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    inverse: Tensor | None,
    updates: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the output, the new state, and what the backward pass needs, each a matrix a chunk ``[N·T, ., .]``."""
    outer, dtype = q.shape[:2], state.dtype
    q, k, v, beta = (x.flatten(0, 1) for x in (q, k, v, beta))
    decay = decay_between(log_decay, dtype).flatten(0, 1)
    from_start = log_decay.exp().to(dtype).flatten(0, 1).unsqueeze(-1)
    weights = (q @ k.mT).mul_(decay)
    scaled = beta * k
    if inverse is None:
        # Only what is below the diagonal is read. The backward pass needs the inverse too, transposed.
        identity = torch.eye(k.shape[-2], dtype=dtype, device=k.device).expand_as(decay)
        inverse = torch.linalg.solve_triangular((scaled @ k.mT).mul_(decay), identity, upper=False, unitriangular=True)
    # The updates are u = free - bound @ S.
    bound = inverse @ (scaled * from_start)
    # From chunk to chunk the state undergoes an affine map.
    keys = (k * decay_to_end(log_decay, dtype).flatten(0, 1)).mT
    kept = torch.diag_embed(from_start[:, -1].expand(-1, k.shape[-1]))
    factors = kept.baddbmm_(keys, bound, alpha=-1).unflatten(0, outer)
    states = [state]
    if updates is None:
        free = inverse @ (beta * v)
        for factor, summand in zip(factors.unbind(1), (keys @ free).unflatten(0, outer).unbind(1), strict=True):
            states.append(torch.baddbmm(summand, factor, states[-1]))
        before = torch.stack(states[:-1], dim=1).flatten(0, 1)
        updates = torch.baddbmm(free, bound, before, alpha=-1)
    else:
        left = from_start[:, -1:].unflatten(0, outer)
        for share, added in zip(left.unbind(1), (keys @ updates).unflatten(0, outer).unbind(1), strict=True):
            states.append(torch.addcmul(added, share, states[-1]))
        before = torch.stack(states[:-1], dim=1).flatten(0, 1)
    output = (q @ before).mul_(from_start).baddbmm_(weights, updates)
    return output.unflatten(0, outer), states[-1], inverse, updates, decay, weights, bound, factors, before


class _Replace(torch.autograd.Function):
    """The same with the backward pass by hand: a third of the products and passes that autograd takes."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, ...]:
        output, last, inverse, updates, *kept = _advance(*operands)
        ctx.save_for_backward(*operands[:5], last, inverse, updates, *kept)
        ctx.mark_non_differentiable(inverse, updates)
        return output, last, inverse, updates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, last, inverse, updates, *rest = ctx.saved_tensors
        decay, weights, bound, factors, before = rest
        outer, dtype = q.shape[:2], q.dtype
        grad = grads[0].flatten(0, 1)
        q, k, v, beta = (x.flatten(0, 1) for x in (q, k, v, beta))
        from_start = log_decay.exp().to(dtype).flatten(0, 1).unsqueeze(-1)
        to_end = decay_to_end(log_decay, dtype).flatten(0, 1)

        # Back through the states, by the transposed map.
        grad_updates = weights.mT @ grad
        summands = torch.baddbmm((q * from_start).mT @ grad, bound.mT, grad_updates, alpha=-1).unflatten(0, outer)
        grad_states = [grads[1]]
        for factor, summand in zip(reversed(factors.unbind(1)), reversed(summands.unbind(1)), strict=True):
            grad_states.append(torch.baddbmm(summand, factor.mT, grad_states[-1]))
        after = torch.stack(grad_states[-2::-1], dim=1)
        states = torch.cat([before.unflatten(0, outer)[:, 1:], last.unsqueeze(1)], dim=1)
        # A state and its gradient: what all decay in the chunk up to its last token, and thus that one, matters to it.
        grad_last = torch.linalg.vecdot(after.flatten(2), states.flatten(2))
        after = after.flatten(0, 1)

        grad_updates = torch.baddbmm(grad_updates, k * to_end, after)
        grad_right = inverse.mT @ grad_updates
        grad_similar = (grad_right @ updates.mT).mul_(decay).tril_(-1).neg_()
        grad_products = (grad @ updates.mT).mul_(decay)
        grad_q = torch.baddbmm(grad @ before.mT * from_start, grad_products, k)
        # Keys are read with, and written to the state.
        reading = torch.baddbmm(grad_right @ before.mT * -from_start, grad_similar, k)
        writing = torch.baddbmm(updates @ after.mT * to_end, grad_products.mT, q).baddbmm_((beta * grad_similar).mT, k)
        grad_beta = torch.linalg.vecdot(grad_right, v) + torch.linalg.vecdot(k, reading)
        reading *= beta
        grad_decay = torch.linalg.vecdot(q, grad_q) + torch.linalg.vecdot(k, reading - writing)
        grad_decay = grad_decay.unflatten(0, outer).to(log_decay.dtype)
        grad_decay[..., -1] += grad_last
        results = grad_q, reading.add_(writing), grad_right * beta, grad_decay, grad_beta.unsqueeze(-1)
        return *(x if x is grad_decay else x.unflatten(0, outer) for x in results), grad_states[-1], None, None
