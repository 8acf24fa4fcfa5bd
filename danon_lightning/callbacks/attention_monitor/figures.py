"""Attention as pictures: which token reads which, and by which way."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["byte_tokens", "draw_map", "find_ids"]

_NAMED = {9: "\\t", 10: "\\n", 13: "\\r", 32: "␣"}


def byte_tokens(ids: Sequence[int]) -> list[str]:
    """What to write for each byte: the character if there is one to be seen, else its number.

    Args:
        ids: Token ids; those above 255 are no bytes and stay numbers.
    """
    return [_NAMED.get(i) or (chr(i) if 32 < i < 127 else f"{i:02x}" if i < 256 else str(i)) for i in map(int, ids)]


def find_ids(batch: Any) -> Tensor | None:
    """Find token ids in a batch: its first integer tensor ``[b, n]``, that called ``input_ids`` if there is one.

    Returns:
        The ids ``[b, n]``, or ``None``.
    """
    if isinstance(batch, Mapping) and "input_ids" in batch:
        batch = batch["input_ids"]
    for x in _tensors(batch):
        if x.dim() == 2 and not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool:
            return x
    return None


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def draw_map(
    weights: Tensor | None,
    routes: Mapping[str, Tensor] | None = None,
    tokens: Sequence[str] | None = None,
    title: str = "",
) -> "Figure":
    """Draw how much each query (downwards) reads of each key (to the right), and by which way it does.

    Args:
        weights: ``[n, m]``; ``None`` leaves the map out.
        routes: By name the share of each way for each query ``[n]``: bars on the right of the map.
        tokens: What the tokens are called; ``None``: their positions.
        title: Above the picture.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    routes = routes or {}
    count = len(weights) if weights is not None else len(next(iter(routes.values())))
    side = min(max(0.14 * count, 3.5), 12.0)
    widths = [side] * (weights is not None) + [max(1.6, side / 5)] * bool(routes)
    figure = Figure(figsize=(sum(widths) + 1.6, side + 1.0), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    figure.suptitle(title, fontsize=9)
    if weights is not None:
        # Square roots: a weight of a hundredth is still seen beside one of 1.
        norm = PowerNorm(0.5, vmin=0.0, vmax=max(float(weights.max()), 1e-6))
        image = axes[0].imshow(weights.float().cpu().numpy(), norm=norm, cmap="viridis", aspect="equal")
        figure.colorbar(image, ax=axes[0], shrink=0.6, label="weight", location="left")
        _name(axes[0], "y", tokens, count)
        _name(axes[0], "x", tokens, weights.shape[1])
        axes[0].set_ylabel("query")
        axes[0].set_xlabel("key")
    if routes:
        bars = axes[-1]
        start = torch.zeros(count)
        for name, share in routes.items():
            share = share.float().cpu()
            bars.barh(range(count), share.numpy(), left=start.numpy(), height=1.0, label=name)
            start = start + share
        bars.set_xlim(0, max(float(start.max()), 1e-6))
        bars.set_ylim(count - 0.5, -0.5)
        bars.set_xlabel("share by way")
        bars.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.7 * len(routes) / (side + 1) / 3))
        _name(bars, "y", tokens if weights is None else None, count if weights is None else 0)
    return figure


def _name(axes: Any, axis: str, tokens: Sequence[str] | None, count: int) -> None:
    ticks, labels = getattr(axes, f"set_{axis}ticks"), {"fontsize": 6, "family": "monospace"}
    if tokens is None:
        places = list(range(0, count, max(1, count // 8)))
        ticks(places, [str(place) for place in places], **labels)
    else:
        ticks(range(count), list(tokens)[:count], **labels)
    axes.tick_params(length=0)
