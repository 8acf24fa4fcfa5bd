"""Sampling from a language model, byte by byte."""

from collections.abc import Callable

import torch
from torch import Tensor


def sample_next(logits: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Draw one symbol for each row.

    Args:
        logits: Float ``[b, vocabulary]``.
        temperature: Divides the logits; 0 takes the most probable symbol.
        top_k: Draw among the k most probable only; None for all.
        generator: Random state, on the device of ``logits``.

    Returns:
        Long ``[b, 1]``.

    Raises:
        ValueError: If ``temperature`` is negative or ``top_k`` less than 1.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative; 0 takes the most probable symbol")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None to draw among all symbols")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)


def generate(
    next_logits: Callable[[Tensor], Tensor],
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Continue a prompt; the global random state is not touched.

    Args:
        next_logits: Called with the new symbols ``[b, m]`` (first the prompt, then one at a time); returns the logits
            ``[b, vocabulary]`` of what follows them. It keeps its own state.
        prompt: Long ``[b, n]``, n at least 1.
        max_new_tokens: Symbols to add.
        temperature: See :func:`sample_next`.
        top_k: See :func:`sample_next`.
        seed: Of the draws.

    Returns:
        Long ``[b, n + max_new_tokens]``.
    """
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    tokens = [prompt]
    for _ in range(max_new_tokens):
        tokens.append(sample_next(next_logits(tokens[-1]), temperature=temperature, top_k=top_k, generator=generator))
    return torch.cat(tokens, dim=1)
