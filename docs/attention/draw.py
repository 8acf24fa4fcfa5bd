"""Draws the pictures of the attention pages: ``python docs/attention/draw.py [folder]``.

What a query reads is not sketched but asked of the code: values that each name their token come out of the attention
as its weight. So the pictures change when the mechanisms do.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from danon_lightning.attention import DALAConfig, InfiniteAttentionConfig, MSRAConfig, SuperHybridConfig, UCSAConfig
from danon_lightning.attention.components import DynamicCompression
from danon_lightning.attention.functional import dala_attention, msra_attention, ucsa_attention
from danon_lightning.attention.msra.geometry import Geometry

LENGTH = 128
QUERY = 121
NEAR, BLUE, PALE, PALER, RED, GREY = "#1b4f8a", "#5b9bd5", "#9cc4e8", "#cfe2f3", "#d1495b", "#e9e4d8"


class Route(NamedTuple):
    """One of the ways by which a query gets to know of tokens.

    Attributes:
        label: What it is called in the picture.
        colour: Its colour.
        read: Which token each query reads on this route ``[n, n]``, boolean.
        span: Tokens in a cell; 1 where tokens are read one by one, 0 where all are in one state.
        offset: Where the first cell begins.
    """

    label: str
    colour: str
    read: Tensor
    span: int = 1
    offset: int = 0


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _past(length: int = LENGTH) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def _named_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys at random ``[1, 1, n, n]``, and values of which each names its token."""
    q, k = _random(2, 1, 1, LENGTH, LENGTH)
    return q, k, torch.eye(LENGTH, dtype=torch.float64)[None, None]


def msra_routes(config: MSRAConfig) -> list[Route]:
    """Return what queries read at each level."""
    geometry = Geometry.resolve(config.block_size, config.pool_factor, config.num_levels, LENGTH)
    q, k, v = _named_tokens()
    settings = {"block_size": config.block_size, "pool_factor": config.pool_factor}
    weights = msra_attention(q, k, v, num_levels=geometry.num_levels, **settings)[0, 0]
    queries, tokens = torch.arange(LENGTH).unsqueeze(-1), torch.arange(LENGTH)
    colours, routes = [NEAR, BLUE, PALE, PALER], []
    for level in range(geometry.active_levels(LENGTH)):
        span = geometry.span(level)
        read = geometry.visible(queries, tokens // span, level, causal=True) & (weights > 0)
        label = "tokens" if level == 0 else f"summaries of {span}"
        routes.append(Route(label, colours[level], read, span))
    return routes


def dala_routes(config: DALAConfig) -> list[Route]:
    """Return what queries read in the window, in the memory, and from the state."""
    q, k, v = _named_tokens()
    weights, stats = dala_attention(
        q,
        k,
        v,
        log_importance=F.logsigmoid(2 * _random(1, LENGTH)),
        block_size=config.block_size,
        memory_size=config.memory_size,
        distance_decay=torch.tensor([-4.0], dtype=torch.float64).exp(),
        window_width=8.0 * config.block_size,
        recency=config.recency,
        return_stats=True,
    )
    remembered = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for query in range(LENGTH):
        tokens = stats.memory_tokens[0, query // config.block_size]
        remembered[query, tokens[tokens >= 0]] = True
    read = weights[0, 0] > 0
    return [
        Route("window", NEAR, read & ~remembered),
        Route("remembered", RED, read & remembered),
        Route("state", GREY, _past(), 0),
    ]


def ucsa_routes(config: UCSAConfig) -> list[Route]:
    """Return what queries read as tokens, as blocks that they selected, and as summaries."""
    q, k, v = _named_tokens()
    size, sinks, levels = config.block_size, config.global_tokens, config.tree_levels
    weights, stats = ucsa_attention(
        q,
        k,
        v,
        block_size=size,
        num_selected=config.num_selected(),
        window_blocks=config.window_blocks,
        num_sinks=sinks,
        tree_levels=levels,
        tree_factor=config.tree_factor,
        return_stats=True,
    )
    read, tokens = weights[0, 0] > 0, torch.arange(LENGTH)
    selected = torch.zeros_like(read)
    for query, blocks in enumerate(stats.selected_blocks[0, 0]):
        selected[query] = torch.isin((tokens - sinks).div(size, rounding_mode="floor"), blocks[blocks >= 0])
    # In a summary all tokens have the same weight, and in a larger one more of them.
    spans = torch.ones_like(read, dtype=torch.long)
    for level in range(levels):
        span = size * config.tree_factor**level
        cells = F.pad(weights[0, 0, :, sinks:], (0, -(LENGTH - sinks) % span)).unflatten(-1, (-1, span))
        same = torch.isclose(cells, cells[..., :1], rtol=1e-9, atol=0.0).all(dim=-1).repeat_interleave(span, dim=-1)
        spans[:, sinks:][same[:, : LENGTH - sinks]] = span
    routes = [
        Route("sinks", BLUE, read & (tokens < sinks)),
        Route("window", NEAR, read & (spans == 1) & ~selected & (tokens >= sinks)),
        Route("selected blocks", RED, read & selected),
    ]
    for level, colour in zip(range(levels), (PALE, PALER), strict=False):
        span = size * config.tree_factor**level
        routes.append(Route(f"summaries of {span}", colour, read & (spans == span) & ~selected, span, sinks))
    return routes


def infinite_routes(config: InfiniteAttentionConfig) -> list[Route]:
    """Return what queries read through the softmax, and from the memory."""
    return [*msra_routes(config.msra), Route("memory", GREY, _past(), 0)]


CONFIGS = {
    "msra": MSRAConfig(block_size=8, compression_factor=4, max_sequence_length=LENGTH),
    "dala": DALAConfig(block_size=16, memory_size=12),
    "ucsa": UCSAConfig(
        block_size=4,
        local_window_size=8,
        global_tokens=4,
        num_levels=2,
        tree_factor=4,
        max_selected_blocks=2,
        max_sequence_length=LENGTH,
    ),
    "infinite": InfiniteAttentionConfig(local_window=16, sliding_window=64),
}


def routes_of(variant: str) -> list[Route]:
    """Return what the queries of a small example of a variant read, those in one state last."""
    functions: dict[str, Callable[..., list[Route]]] = {
        "msra": msra_routes,
        "dala": dala_routes,
        "ucsa": ucsa_routes,
        "infinite": infinite_routes,
    }
    return functions[variant](CONFIGS[variant])


def draw_row(axes: Axes, routes: list[Route], query: int) -> None:
    """Draw what one query reads, a row a route; cells that it does not read are left empty."""
    for row, route in enumerate(routes):
        if route.span == 0:
            axes.broken_barh([(0, query + 1)], (row - 0.3, 0.6), facecolor=route.colour, edgecolor="grey", lw=0.5)
            axes.text(query / 2, row, "all tokens so far, in one matrix", ha="center", va="center", fontsize=7)
            continue
        starts = range(route.offset, query + 1, route.span)
        filled = [bool(route.read[query, start : start + route.span].any()) for start in starts]
        for reads, colour in ((False, "white"), (True, route.colour)):
            cells = [(start, route.span) for start, read in zip(starts, filled, strict=True) if read is reads]
            if route.label != "sinks" or reads:
                axes.broken_barh(cells, (row - 0.3, 0.6), facecolor=colour, edgecolor="silver", linewidth=0.4)
    axes.axvline(query + 0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(routes)), [route.label for route in routes], fontsize=8)
    axes.set_xlim(-1, LENGTH + 1)
    axes.set_ylim(len(routes) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def draw_variant(variant: str) -> Figure:
    """Draw what all queries read, and what one of them does."""
    routes = routes_of(variant)
    figure = Figure(figsize=(9, 3.3), dpi=110, layout="constrained")
    matrix, row = figure.subplots(1, 2, width_ratios=[1, 1.75])
    picture = torch.zeros(LENGTH, LENGTH, dtype=torch.long)
    for index, route in reversed(list(enumerate(routes, 1))):
        picture[route.read] = index
    colours = ["white", *(route.colour for route in routes)]
    matrix.imshow(picture.numpy(), cmap=ListedColormap(colours), vmin=0, vmax=len(routes), interpolation="nearest")
    matrix.axhline(QUERY, color="black", linewidth=0.8, linestyle=":")
    matrix.set_xlabel("token", fontsize=8)
    matrix.set_ylabel("query", fontsize=8)
    matrix.tick_params(labelsize=7)
    matrix.set_title("what each query reads", fontsize=9)
    draw_row(row, routes, QUERY)
    row.set_xlabel("token", fontsize=8)
    row.set_title(f"what query {QUERY} reads (filled) and does not (empty)", fontsize=9)
    return figure


def draw_hybrid() -> Figure:
    """Draw what one query reads by way of each component."""
    components = SuperHybridConfig().layer_components
    routes = {name: routes_of(name) for name in components}
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    rows = figure.subplots(len(components), 1, sharex=True, height_ratios=[len(found) for found in routes.values()])
    for axes, (name, found) in zip(rows, routes.items(), strict=True):
        draw_row(axes, found, QUERY)
        axes.set_ylabel(name, fontsize=9, fontweight="bold")
    rows[-1].set_xlabel("token", fontsize=8)
    rows[0].set_title(f"what query {QUERY} reads by way of each component", fontsize=9)
    return figure


def compressed_signal() -> tuple[Tensor, Tensor, Tensor]:
    """Return a sequence of two channels ``[n, 2]``, what its cells give back, and the cell of each token ``[n]``."""
    time = torch.linspace(0, 6, LENGTH)
    x = torch.stack([time.sin(), (0.5 * time).cos()], dim=-1)
    x[torch.tensor([20, 71, 104]), 0] += torch.tensor([1.8, -1.8, 1.5])
    compression = DynamicCompression(2, importance_threshold=0.9).eval()
    with torch.no_grad():
        compressed = compression.compress(x.unsqueeze(0))
        restored = compression.decompress(compressed, (1, LENGTH, 2))
    return x, restored[0], compressed.assignment[0]


def draw_components() -> Figure:
    """Draw what a compression makes of a sequence."""
    x, restored, assignment = compressed_signal()
    figure = Figure(figsize=(9, 2.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(x[:, 0].numpy(), color="silver", linewidth=2, label="tokens (one channel)")
    axes.step(
        range(LENGTH), restored[:, 0].numpy(), where="mid", color=NEAR, linewidth=1, label="expanded from the cells"
    )
    sizes = assignment.bincount()
    alone = (sizes[assignment] == 1).nonzero().squeeze(-1)
    axes.plot(alone.numpy(), x[alone, 0].numpy(), "o", color=RED, markersize=4, label="tokens with a cell of their own")
    axes.set_title(f"DynamicCompression: {LENGTH} tokens in {len(sizes)} cells", fontsize=9)
    axes.set_xlabel("token", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(folder: Path) -> list[Path]:
    """Draw everything into a folder and return the files."""
    figures = {variant: draw_variant(variant) for variant in CONFIGS}
    figures |= {"super_hybrid": draw_hybrid(), "components": draw_components()}
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        # Without the version of matplotlib: what looks the same is the same file.
        figure.savefig(paths[-1], facecolor="white", metadata={"Software": None})
    return paths


if __name__ == "__main__":
    for path in main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent):
        print(path)
