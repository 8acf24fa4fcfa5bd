"""One sequence made of several that show the same text at different scales."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from danon_lightning.attention.layers import NormalLinear

__all__ = ["MultiScaleFeatureFusion"]

METHODS = ("adaptive", "weighted", "concat")


class MultiScaleFeatureFusion(nn.Module):
    """Fuses feature maps of different lengths to the length of the first.

    Every map spans the whole sequence. A shorter one is repeated over the tokens it spans, a longer one averaged over
    those that fall on a token. A token gets what its span holds, also of later text: this is no causal operation unless
    the maps have been shifted.

    Args:
        hidden_size: Width D of all maps.
        num_scales: Number of maps S.
        method: ``"adaptive"``: weights for each token, a softmax over the scales of learned scores of their features;
            ``"weighted"``: one learned weight for each scale, softmax over the scales. Both start from equal weights
            and leave out scales that are masked at the token. ``"concat"``: side by side, masked ones as zeros, and
            projected back.
        initializer_range: Standard deviation of the initial weights of the projection of ``"concat"``.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self, hidden_size: int, num_scales: int, method: str = "adaptive", *, initializer_range: float = 0.02
    ) -> None:
        """Create the learned parts of the method."""
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("num_scales", num_scales)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}={size!r} must be an integer of at least 1")
        if method not in METHODS:
            raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, METHODS))}")
        if not initializer_range > 0:
            raise ValueError(f"initializer_range={initializer_range} must be positive")
        self.hidden_size = hidden_size
        self.num_scales = num_scales
        self.method = method
        self.scores: nn.Parameter | None = None
        self.directions: nn.Parameter | None = None
        self.projection: NormalLinear | None = None
        if method == "concat":
            self.projection = NormalLinear(num_scales * hidden_size, hidden_size, std=initializer_range)
        else:
            self.scores = nn.Parameter(torch.empty(num_scales))
        if method == "adaptive":
            self.directions = nn.Parameter(torch.empty(num_scales, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from equal weights; the projection sets its own."""
        for parameter in (self.scores, self.directions):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def forward(self, features: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> Tensor:
        """Fuse.

        Args:
            features: One map a scale ``[b, n_s, D]``, floating point.
            masks: For each map, True for real tokens ``[b, n_s]``, boolean, or ``None`` if all are real; ``None``
                means that all of all maps are.

        Returns:
            ``[b, n_0, D]``; zero where the first map is masked, and where no scale has a real token.

        Raises:
            ValueError: If there is another number of maps or masks, or one has the wrong shape or dtype.
        """
        masks = [None] * len(features) if masks is None else masks
        self._check(features, masks)
        length = features[0].shape[1]
        aligned, seen = zip(*(_align(x, mask, length) for x, mask in zip(features, masks, strict=True)), strict=True)
        stacked, available = torch.stack(aligned, dim=2), torch.stack(seen, dim=2)  # [b, n, S, D] and [b, n, S]
        if self.projection is not None:
            fused: Tensor = self.projection(stacked.flatten(2))
        else:
            weights = self._weights(stacked, available)
            fused = (weights.unsqueeze(-1) * stacked).sum(dim=2)
        kept = available.any(dim=2) if masks[0] is None else masks[0]
        return fused.masked_fill(~kept.unsqueeze(-1), 0.0)

    def _weights(self, stacked: Tensor, available: Tensor) -> Tensor:
        """Return the weights ``[b, n, S]`` of the scales, zero where masked."""
        assert self.scores is not None
        scores = self.scores.expand(available.shape)
        if self.directions is not None:
            scores = scores + (stacked * self.directions).sum(dim=-1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        # Finite, so that a token without any scale stays free of NaN; its features are zero.
        scores = scores.masked_fill(~available, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=-1).to(stacked.dtype)

    def _check(self, features: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
        if len(features) != self.num_scales or len(masks) != self.num_scales:
            raise ValueError(
                f"features has {len(features)} maps and masks {len(masks)}; with num_scales={self.num_scales} both "
                "must have as many"
            )
        for index, (x, mask) in enumerate(zip(features, masks, strict=True)):
            batch = features[0].shape[0]
            if x.dim() != 3 or x.shape[0] != batch or x.shape[-1] != self.hidden_size or 0 in x.shape:
                raise ValueError(
                    f"features[{index}] has shape {list(x.shape)}; it must be [{batch}, tokens, {self.hidden_size}]"
                )
            if not x.is_floating_point() or x.dtype != features[0].dtype:
                raise ValueError(
                    f"features[{index}] has dtype {x.dtype} beside {features[0].dtype}; all must be floating point of "
                    "one dtype"
                )
            if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
                raise ValueError(
                    f"masks[{index}] has shape {list(mask.shape)} and dtype {mask.dtype}; it must be boolean, "
                    f"{list(x.shape[:2])}"
                )


def _align(x: Tensor, mask: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """Bring a map to ``length`` tokens.

    Returns:
        The map ``[b, length, D]``, zero where masked, and where it holds real tokens ``[b, length]``, boolean.
    """
    batch, own, width = x.shape
    real = torch.ones(batch, own, dtype=torch.bool, device=x.device) if mask is None else mask
    x = x.masked_fill(~real.unsqueeze(-1), 0.0)
    if own == length:
        return x, real
    if own < length:
        index = torch.arange(length, device=x.device) * own // length
        return x[:, index], real[:, index]
    token = torch.arange(own, device=x.device) * length // own
    index = token.expand(batch, -1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    counts = wide.new_zeros(batch, length).scatter_add(1, index, real.to(wide.dtype))
    sums = wide.new_zeros(batch, length, width).scatter_add(1, index.unsqueeze(-1).expand_as(wide), wide)
    return (sums / counts.clamp_min(1).unsqueeze(-1)).to(x.dtype), counts > 0
