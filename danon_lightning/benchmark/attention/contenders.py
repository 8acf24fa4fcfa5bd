"""What is compared: the cores of all registered variants, and what there is elsewhere."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from danon_lightning.attention.functional import gated_linear_attention
from danon_lightning.benchmark.attention.inputs import Inputs
from danon_lightning.benchmark.attention.settings import build_core, measured_settings

SDPA = "sdpa"
FLEX_WINDOW = "flex_window"
# Tokens that a query of the sliding window sees.
WINDOW = 128
# FlexAttention works in blocks of this size.
_FLEX_BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """What a contender is built for.

    Attributes:
        length: Tokens n.
        heads: Heads H.
        head_dim: Width d of a head.
        device: "cpu" or "cuda".
        direction: "forward", or "both" for the backward pass as well.
    """

    length: int
    heads: int
    head_dim: int
    device: str
    direction: str


@dataclass(frozen=True)
class Built:
    """A contender, ready to run.

    Attributes:
        run: Computes the output ``[1, H, n, d]``.
        parameters: What it learns, beside the inputs.
        any_length: Whether it may be warmed up on a short sequence; a compiled one must see the length itself.
    """

    run: Callable[[Inputs], Tensor]
    parameters: tuple[nn.Parameter, ...] = ()
    any_length: bool = True


@dataclass(frozen=True)
class Contender:
    """A mechanism.

    Attributes:
        name: What it goes by on the command line and in results.
        description: A few words of help.
        build: Makes it, in the process that measures it.
        ours: Whether it is a registered variant.
        growth: Exponent by which its time should grow, for a guess before there are figures.
        reason: Says why it cannot be measured on a device ("cpu" or "cuda") in a direction; None if it can.
    """

    name: str
    description: str
    build: Callable[[Shape], Built]
    ours: bool = False
    growth: float = 1.0
    reason: Callable[[str, str], str | None] = lambda device, direction: None


def contenders() -> dict[str, Contender]:
    """All of them by name, with what they are held against first."""
    ours = [
        Contender(label, setting.description, partial(_build_variant, label), ours=True)
        for label, setting in measured_settings().items()
    ]
    return {contender.name: contender for contender in [*_BASELINES, *ours]}


def _build_variant(label: str, shape: Shape) -> Built:
    core = build_core(label, heads=shape.heads, head_dim=shape.head_dim, length=shape.length).to(shape.device)
    core.train(shape.direction == "both")
    return Built(lambda inputs: core(inputs.x, inputs.q, inputs.k, inputs.v)[0], tuple(core.parameters()))


def _build_sdpa(shape: Shape) -> Built:
    return Built(lambda inputs: F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, is_causal=True))


def _build_gated_linear(shape: Shape) -> Built:
    return Built(lambda inputs: gated_linear_attention(inputs.q, inputs.k, inputs.v, inputs.log_decay)[0])


def _build_flex_window(shape: Shape) -> Built:
    # Workers would outlive this short process.
    torch._inductor.config.compile_threads = 1
    compiled = torch.compile(flex_attention)
    mask = _window_mask(shape.length, shape.device)

    def run(inputs: Inputs) -> Tensor:
        output = compiled(inputs.q, inputs.k, inputs.v, block_mask=mask)
        assert isinstance(output, Tensor)
        return output

    return Built(run, any_length=False)


def _window_mask(length: int, device: str) -> BlockMask:
    """The blocks of a window: ``create_block_mask`` would write down all n² pairs."""
    rows = -(-length // _FLEX_BLOCK)
    row = torch.arange(rows, dtype=torch.int32, device=device)
    columns = torch.zeros(1, 1, rows, rows, dtype=torch.int32, device=device)
    columns[0, 0, :, 0] = (row - 1).clamp(min=0)
    if rows > 1:
        columns[0, 0, 1:, 1] = row[1:]  # the first row has no block before its own
    counts = (row + 1).clamp(max=2).view(1, 1, rows)
    return BlockMask.from_kv_blocks(
        counts, columns, BLOCK_SIZE=_FLEX_BLOCK, mask_mod=_in_window, seq_lengths=(length, length)
    )


def _in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query >= key) & (query - key < WINDOW)


def _flex_reason(device: str, direction: str) -> str | None:
    if device == "cpu" and direction == "both":
        return "FlexAttention has no backward pass on CPU"
    return None


def _build_fla(shape: Shape) -> Built:
    from fla.ops.simple_gla import chunk_simple_gla

    def run(inputs: Inputs) -> Tensor:
        # Laid out as [b, n, H, d] there.
        q, k, v, decay = (t.transpose(1, 2).contiguous() for t in (inputs.q, inputs.k, inputs.v, inputs.log_decay))
        output: Tensor = chunk_simple_gla(q, k, v, g=decay, scale=1.0)[0]
        return output.transpose(1, 2)

    return Built(run)


def _fla_reason(device: str, direction: str) -> str | None:
    if device != "cuda":
        return "flash-linear-attention runs on CUDA only"
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed: pip install flash-linear-attention"
    return None


_BASELINES = [
    Contender(SDPA, "causal full attention of torch, O(n²): what ratios refer to", _build_sdpa, growth=2.0),
    Contender(
        FLEX_WINDOW,
        f"torch's FlexAttention, compiled, over a sliding window of {WINDOW} tokens",
        _build_flex_window,
        reason=_flex_reason,
    ),
    Contender("gated_linear", "gated linear attention of this package, a decay a head", _build_gated_linear),
    Contender("fla", "the same of flash-linear-attention (chunk_simple_gla)", _build_fla, reason=_fla_reason),
]
