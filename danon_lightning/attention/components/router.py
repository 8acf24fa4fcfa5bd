"""How much each head takes from each of several routes to the past, token by token."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from danon_lightning.attention.checks import check_shapes, check_tokens
from danon_lightning.attention.layers import ZeroLinear

__all__ = ["DynamicRouter"]


class DynamicRouter(nn.Module):
    """Logits for each head and route, from the token and from a bias that agreement moves.

    Args:
        dim: Width D of a token.
        num_heads: Heads H.
        num_routes: Routes R that a head chooses from.
        temperature: Divides the logits; a high one makes choices less decided.
        start: What the bias of each route begins with, R numbers; ``None``: zeros.

    Raises:
        ValueError: If the temperature is not positive, or ``start`` is not a number for each route.
    """

    bias: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_routes: int = 2,
        *,
        temperature: float = 1.0,
        start: Sequence[float] | None = None,
    ) -> None:
        """Create the projection."""
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive")
        self.start = (0.0,) * num_routes if start is None else tuple(start)
        if len(self.start) != num_routes:
            raise ValueError(f"start={start} must have a number for each of num_routes={num_routes} routes")
        self.temperature = temperature
        self.projection = ZeroLinear(dim, num_routes * num_heads)
        self.register_buffer("bias", torch.empty(num_routes, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget what agreement has taught."""
        for bias, start in zip(self.bias, self.start, strict=True):
            nn.init.constant_(bias, start)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits.

        Args:
            x: Tokens ``[b, n, D]``.

        Returns:
            ``[b, R, H, n]``, divided by the temperature.

        Raises:
            ValueError: If the tokens have another shape.
        """
        check_tokens(x, self.projection.in_features)
        return self.continued(self.projection(x))

    def continued(self, projected: Tensor) -> Tensor:
        """Return what ``forward`` does, given what ``projection`` gives ``[b, n, R·H]``."""
        logits: Tensor = projected.unflatten(-1, tuple(self.bias.shape)).movedim(1, -1)
        return (logits + self.bias.to(logits.dtype).unsqueeze(-1)) / self.temperature

    @torch.no_grad()
    def reinforce(self, predictions: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Move the bias towards the routes that predict the targets: b ← b + mean(ŷ·a), over unit vectors.

        Reference:
            Sabour, Frosst & Hinton 2017, "Dynamic Routing Between Capsules", section 2: routing by agreement.

        Args:
            predictions: ŷ, what each route contributes ``[b, R, H, n, D]``.
            targets: a, what it should point to ``[b, n, D]``.
            mask: True for the tokens that count ``[b, n]``; ``None``: all.

        Returns:
            The mean agreement, from -1 to 1, that was added ``[R, H]``.

        Raises:
            ValueError: If shapes do not fit each other, or the number of routes and heads.
        """
        self._check(predictions, targets, mask)
        unit = nn.functional.normalize
        agreement = torch.einsum("brhnd,bnd->brhn", unit(predictions, dim=-1), unit(targets, dim=-1))
        counted = torch.ones_like(agreement[:, 0, 0], dtype=torch.bool) if mask is None else mask.bool()
        total = (agreement * counted[:, None, None]).sum(dim=(0, 3))
        mean = (total / counted.sum().clamp(min=1)).to(self.bias.dtype)
        self.bias += mean
        return mean

    def _check(self, predictions: Tensor, targets: Tensor, mask: Tensor | None) -> None:
        if targets.dim() != 3:
            raise ValueError(f"targets has shape {list(targets.shape)}; it must be [batch, tokens, width]")
        (batch, length, width), (routes, heads) = targets.shape, self.bias.shape
        expected = {
            "predictions": (predictions, (batch, routes, heads, length, width)),
            "mask": (mask, (batch, length)),
        }
        check_shapes(expected, f"targets has shape {list(targets.shape)} and there are {routes} routes, {heads} heads")
