"""Watches the scale of activations and draws back what leaves its usual range."""

import torch
from torch import Tensor, nn

__all__ = ["StabilityEnhancer"]

# Columns of the history: means over the tokens of a step.
RMS, DEVIATION, VARIANCE = range(3)


class StabilityEnhancer(nn.Module):
    """Scales tokens back towards the usual root mean square where theirs is unusual.

    The deviation of a token is s = |rms(x) − μ| / μ, with μ the mean rms over the last ``history_size`` training steps.
    After ``warmup_steps``, where s exceeds the threshold, x becomes x · ((1 − c) + c · μ / rms(x)), so that its rms
    moves by a share c towards μ. Tokens of zeros, and those that are not finite, stay and count nowhere. Tokens are
    judged one by one and against earlier steps alone, so that neither the future of a sequence nor the batch leaks.

    History and counters are buffers, hence part of the state dict; they change in training mode only. Recomputing the
    forward pass, as checkpointed activations do, counts the step twice.

    Args:
        hidden_size: Width D of a token.
        stability_threshold: The threshold, while the history is empty and where it is not adaptive.
        calibration_factor: The share c, in [0, 1]; 0 only watches.
        use_adaptive_threshold: Whether the threshold is the mean and three standard deviations of s over the tokens of
            the history (with every step counting the same).
        history_size: Number of training steps that μ and the adaptive threshold look back.
        warmup_steps: Number of training steps before anything is changed.
        eps: Tokens whose mean square is below it count as zeros.

    Raises:
        ValueError: If a setting is out of range.
    """

    history: Tensor
    num_steps: Tensor
    num_tokens: Tensor
    num_violations: Tensor
    latest: Tensor

    def __init__(
        self,
        hidden_size: int,
        stability_threshold: float = 0.1,
        calibration_factor: float = 0.1,
        use_adaptive_threshold: bool = True,
        history_size: int = 1000,
        warmup_steps: int = 100,
        *,
        eps: float = 1e-12,
    ) -> None:
        """Create the buffers."""
        super().__init__()
        sizes = (("hidden_size", hidden_size, 1), ("history_size", history_size, 1), ("warmup_steps", warmup_steps, 0))
        for name, size, least in sizes:
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise ValueError(f"{name}={size!r} must be an integer of at least {least}")
        for name, value in (("stability_threshold", stability_threshold), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if not 0 <= calibration_factor <= 1:
            raise ValueError(f"calibration_factor={calibration_factor} must lie in [0, 1]")
        self.hidden_size = hidden_size
        self.stability_threshold = stability_threshold
        self.calibration_factor = calibration_factor
        self.use_adaptive_threshold = use_adaptive_threshold
        self.history_size = history_size
        self.warmup_steps = warmup_steps
        self.eps = eps
        self.register_buffer("history", torch.empty(history_size, 3))
        for name in ("num_steps", "num_tokens", "num_violations"):
            self.register_buffer(name, torch.empty((), dtype=torch.int64))
        # Mean deviation and mean |factor - 1| of the last step; torch.compile loses writes to scalars in float64.
        self.register_buffer("latest", torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget everything."""
        with torch.no_grad():
            for buffer in self.buffers():
                buffer.zero_()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Calibrate a batch.

        Args:
            x: Tokens ``[b, n, D]``, floating point.
            mask: True for real tokens ``[b, n]``, boolean; the others are returned as they are and counted nowhere.
                ``None`` means that all are real.

        Returns:
            ``[b, n, D]`` in the dtype of ``x``.

        Raises:
            ValueError: If ``x`` or ``mask`` has the wrong shape or dtype.
        """
        self._check(x, mask)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = wide.square().mean(dim=-1)
        real = (square > self.eps) & (square < torch.inf)
        if mask is not None:
            real = real & mask
        rms = square.clamp_min(self.eps).sqrt()
        usual = torch.where(self.num_steps > 0, self._mean(RMS).to(rms.dtype), _mean_of(rms.detach(), real))
        deviation = (rms.detach() - usual).abs() / usual.clamp_min(self.eps**0.5)
        warm = self.num_steps >= self.warmup_steps
        violation = real & (deviation > self._threshold()) & warm
        share = self.calibration_factor
        factor = torch.where(violation, (1 - share) + share * usual / rms, 1.0)
        if self.training:
            self._record(rms.detach(), deviation, factor.detach(), real, violation, warm)
        return (wide * factor.unsqueeze(-1)).to(x.dtype)

    def get_stability_metrics(self) -> dict[str, float]:
        """Return what was measured in training mode.

        Returns:
            ``current_stability``: mean deviation s of the tokens of the last step; ``historical_mean``: μ, the mean rms
            over the history; ``threshold``: the one in force; ``calibration_strength``: mean |factor − 1| over the
            tokens of the last step; ``violation_count``: tokens that were scaled back so far; ``adaptation_rate``:
            their share of all tokens since the end of the warm-up.
        """
        violations, tokens = int(self.num_violations), int(self.num_tokens)
        return {
            "current_stability": float(self.latest[0]),
            "historical_mean": float(self._mean(RMS)),
            "threshold": float(self._threshold()),
            "calibration_strength": float(self.latest[1]),
            "violation_count": violations,
            "adaptation_rate": violations / max(1, tokens),
        }

    def _mean(self, column: int) -> Tensor:
        """Return the mean of a column over the steps of the history; 0 while there are none."""
        # Rows not yet written are zero.
        rows = self.num_steps.clamp(1, self.history_size)
        return self.history[:, column].sum() / rows

    def _threshold(self) -> Tensor:
        fixed = self.history.new_full((), self.stability_threshold)
        if not self.use_adaptive_threshold:
            return fixed
        mean = self._mean(DEVIATION)
        written = torch.arange(self.history_size, device=self.history.device) < self.num_steps
        between = torch.where(written, self.history[:, DEVIATION] - mean, 0.0).square().sum()
        variance = self._mean(VARIANCE) + between / self.num_steps.clamp(1, self.history_size)
        return torch.where(self.num_steps > 0, mean + 3 * variance.sqrt(), fixed)

    @torch.no_grad()
    def _record(
        self, rms: Tensor, deviation: Tensor, factor: Tensor, real: Tensor, violation: Tensor, warm: Tensor
    ) -> None:
        """Write a step into the history; a step without real tokens leaves none."""
        any_real = real.any()
        mean = _mean_of(deviation, real)
        row = torch.stack([_mean_of(rms, real), mean, _mean_of((deviation - mean).square(), real)])
        here = torch.arange(self.history_size, device=row.device) == self.num_steps % self.history_size
        self.history.copy_(torch.where((here & any_real).unsqueeze(-1), row.to(self.history.dtype), self.history))
        latest = torch.stack([mean, _mean_of((factor - 1).abs(), real)])
        self.latest.copy_(torch.where(any_real, latest.to(self.latest.dtype), self.latest))
        self.num_violations.add_(violation.sum())
        self.num_tokens.add_(torch.where(warm, real.sum(), 0))
        self.num_steps.add_(any_real.to(torch.int64))

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x has shape {list(x.shape)}; it must be [batch, tokens, {self.hidden_size}]")
        if not x.is_floating_point():
            raise ValueError(f"x has dtype {x.dtype}; it must be floating point")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask has shape {list(mask.shape)} and dtype {mask.dtype}; it must be boolean, {list(x.shape[:2])}"
            )


def _mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of those ``values`` that are ``chosen``, a scalar; 0 if none is."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp_min(1)
