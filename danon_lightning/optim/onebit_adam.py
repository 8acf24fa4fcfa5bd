"""Adam whose momentum can be compressed to one bit."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class OneBitAdam(torch.optim.Optimizer):
    """Adam with a variance that is frozen after a warm-up, so that what remains is linear and can be compressed.

    Adam divides by the root of the gradient's mean square, which coarse codes spoil. Hence two phases:

    1. For ``freeze_step`` steps it is AdamW: g the mean gradient, m ← β₁·m + (1−β₁)·g, v ← β₂·v + (1−β₂)·g²,
       θ ← θ·(1 − lr·λ) − lr · m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + ε).
    2. From then on v (and its correction) stays as it is. A gradient communicator that is told of the optimizer
       compresses β₁·m + (1−β₁)·gᵢ in place of each rank's gradient gᵢ, and hands out the mean: the new m, which is
       found in ``.grad``. Under :class:`DanonHybridStrategy` with a compression this happens by itself.

    An element whose gradient was small or absent while the variance was learnt (the embedding of a rare word) would
    from then on leap by m/√v. So in the second phase no element goes further in a step than Adam itself ever does,
    lr · max(1, (1−β₁)/√(1−β₂)): Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, section 2.1.

    Without a communicator that knows it, the second phase forms m from the gradient by itself: Adam with frozen
    variance.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ, decoupled as in AdamW.
        freeze_step: Steps of the first phase. The variance should have settled: 15 to 25 % of the steps, as a rule, and
            at least until the learning rate has warmed up.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed", ICML 2021
        (arXiv:2102.02888), algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_step: int,
    ) -> None:
        """See the class."""
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr={lr}, eps={eps} and weight_decay={weight_decay} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must lie in [0, 1)")
        if freeze_step < 1:
            raise ValueError(f"freeze_step={freeze_step} must be at least 1: the variance is learnt in these steps")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "freeze_step": freeze_step}
        super().__init__(params, defaults)
        self.receives_momentum = False  # set by a communicator that hands out momentum in the second phase

    @property
    def frozen(self) -> bool:
        """Whether the second phase has begun: the next step leaves the variance as it is."""
        group = self.param_groups[0]
        steps = [self.state[p]["step"] for p in group["params"] if "step" in self.state[p]]
        return bool(steps) and int(max(steps)) >= group["freeze_step"]

    def blend(self, parameter: Tensor, start: int, stop: int, gradient: Tensor, share: float) -> None:
        """Turn a part of a gradient into a part of the new momentum: share · β₁·m + (1−β₁)·g, in place.

        Args:
            parameter: Whose gradient it is.
            start: First of its elements.
            stop: One past the last.
            gradient: Float32 ``[stop − start]``.
            share: 1, or 1/M where M ranks do the same and sum the results.
        """
        for group in self.param_groups:
            if any(p is parameter for p in group["params"]):
                beta = group["betas"][0]
                gradient.mul_(1 - beta)
                if "exp_avg" in self.state[parameter]:  # else it has taken part in no step so far
                    momentum = self.state[parameter]["exp_avg"].view(-1)[start:stop]
                    gradient.add_(momentum.float(), alpha=beta * share)
                return

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        frozen = self.frozen
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, frozen)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], frozen: bool) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())  # a tensor, as in torch's own optimizers
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            if frozen:  # it comes late: without any variance its step would be as large as 1/ε
                first = gradient / (1 - group["betas"][0]) if self.receives_momentum else gradient
                state["exp_avg_sq"].addcmul_(first, first, value=1 - group["betas"][1])
        beta1, beta2 = group["betas"]
        state["step"] += 1
        if frozen and self.receives_momentum:
            state["exp_avg"].copy_(gradient)
        else:
            state["exp_avg"].lerp_(gradient, 1 - beta1)
        if not frozen:
            state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = int(state["step"])
        variance = state["exp_avg_sq"] / (1 - beta2 ** min(step, group["freeze_step"]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        change = state["exp_avg"] / variance.sqrt_().add_(group["eps"]) / (1 - beta1**step)
        if frozen:
            bound = max(1.0, (1 - beta1) / math.sqrt(1 - beta2))
            change.clamp_(-bound, bound)
        parameter.add_(change, alpha=-group["lr"])
