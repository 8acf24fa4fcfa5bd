"""What a variant saves, and what it loses, against full attention on the same queries, keys and values."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from danon_lightning.attention.core import AttentionCore
from danon_lightning.attention.full import full_attention
from danon_lightning.attention.kept_bytes import KeptBytes
from danon_lightning.attention.model import AttentionModel, evaluating
from danon_lightning.attention.rotary import apply_rotary, cell_positions

__all__ = ["Efficiency", "measure_efficiency"]

# Full attention with all its weights at hand is part of the measurement.
LONGEST_SAMPLE = 2048
_KERNELS = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)


class Efficiency(NamedTuple):
    """What was measured, the mean over the layers.

    Attributes:
        information_retention: 1 minus the relative error (Frobenius norm) of the output against full attention; it may
            be negative, and says little about a model that was trained with the variant.
        computation_savings: Share of the floating-point operations of full attention (of the pairs that its mask
            allows) that the forward pass is spared; negative where it takes more.
        memory_savings: Share of what full attention with explicit weights keeps for the backward pass that is not kept;
            kernels such as FlashAttention do not keep the weights either.
    """

    information_retention: float
    computation_savings: float
    memory_savings: float


def measure_efficiency(model: AttentionModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Efficiency:
    """Compare the cores of a model with full attention, on what they get to see for some input.

    Args:
        model: Any variant.
        input_ids: Token ids ``[b, n]``, n at most 2,048.
        attention_mask: 1 for real tokens ``[b, n]``.

    Raises:
        ValueError: If the input is too long.
    """
    if input_ids.shape[-1] > LONGEST_SAMPLE:
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}; a sample of at most {LONGEST_SAMPLE} tokens is enough to "
            "compare with full attention"
        )
    calls: list[tuple[AttentionCore, tuple[Tensor, ...], Tensor | None]] = []

    def record(core: AttentionCore, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((core, args, kwargs["key_padding_mask"]))

    with evaluating(model):
        with ExitStack() as recording, torch.no_grad():
            for block in model.blocks():
                recording.callback(block.core.register_forward_pre_hook(record, with_kwargs=True).remove)
            model(input_ids, attention_mask, output_details=())
        measured = [_compare(*call) for call in calls]
    return Efficiency(*(sum(values) / len(measured) for values in zip(*measured, strict=True)))


def _compare(core: AttentionCore, inputs: tuple[Tensor, ...], mask: Tensor | None) -> Efficiency:
    x, q, k, v = (tensor.detach().requires_grad_() for tensor in inputs)
    config = core.config

    def variant() -> Tensor:
        output: Tensor = core(x, q, k, v, key_padding_mask=mask, state=None)[0]
        return output

    positions = cell_positions(0, q.shape[-2], 1, q.device)
    query, key = (apply_rotary(part, positions, config.rope_base) for part in (q, k))

    def explicit() -> Tensor:
        keys, values = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (key, v))
        logits = query @ keys.mT / q.shape[-1] ** 0.5
        if config.causal:
            future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            logits = logits.masked_fill(future, float("-inf"))
        return torch.softmax(logits, dim=-1) @ values

    with torch.no_grad():
        full = full_attention(query, key, v, causal=config.causal, key_padding_mask=mask)
        error = variant() - full
        if mask is not None:
            full, error = (part.masked_fill(~mask[:, None, :, None], 0.0) for part in (full, error))
    length = q.shape[-2]
    allowed = (length + 1) / (2 * length) if config.causal else 1.0
    parameters = list(core.parameters())
    return Efficiency(
        1 - (error.norm() / full.norm().clamp(min=torch.finfo(full.dtype).tiny)).item(),
        1 - _operations(variant) / (allowed * _operations(explicit)),
        1 - _kept(variant, [x, q, k, v, *parameters]) / _kept(explicit, [q, k, v]),
    )


def _operations(function: Callable[[], Tensor]) -> int:
    counter = FlopCounterMode(display=False, custom_mapping={kernel: _count_causal(kernel) for kernel in _KERNELS})
    with torch.no_grad(), counter:
        function()
    return counter.get_total_flops()


def _count_causal(kernel: torch._ops.OpOverloadPacket) -> Callable[..., int]:
    """Return how to count a kernel of scaled_dot_product_attention without what its causal mask hides."""
    names = [argument.name for argument in kernel.default._schema.arguments]

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        batch, heads, length, width = given["query"]
        pairs = length * (length + 1) // 2 if given.get("is_causal") else length * given["key"][-2]
        return 2 * int(batch * heads * pairs) * (width + given["value"][-1])

    return count


def _kept(function: Callable[[], Tensor], known: list[Tensor]) -> int:
    kept = KeptBytes(known)
    with torch.enable_grad(), kept:
        function()
    return kept.count
