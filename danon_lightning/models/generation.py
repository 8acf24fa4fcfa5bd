"""Sampling from a language model, symbol by symbol."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def sample_next(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Draw one symbol for each row.

    Args:
        logits: Float ``[b, vocabulary]``.
        temperature: Divides the logits; 0 takes the most probable symbol.
        top_k: Draw among the k most probable only; None for all.
        top_p: Draw among the most probable only, as few as have this probability together (after ``top_k``); None for
            all.
        generator: Random state, on the device of ``logits``.

    Returns:
        Long ``[b, 1]``.

    Raises:
        ValueError: If ``temperature`` is negative, ``top_k`` less than 1 or ``top_p`` not in (0, 1].

    Reference:
        Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020 (arXiv:1904.09751).
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, symbols = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        enough = ordered.cumsum(dim=-1) - ordered >= top_p
        logits = logits.masked_fill(torch.zeros_like(enough).scatter(-1, symbols, enough), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)


def continue_prompts(
    next_logits: Callable[[Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[Sequence[int]] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[list[int | None]]:
    """Continue prompts of any lengths together, each as if it were alone (up to rounding).

    All rows start at their first symbol, so that no padding comes before it, which attention could tell from a shift of
    positions. As far as the shortest prompt reaches they are read at once; from there on symbol by symbol, and a longer
    prompt goes on being read while shorter ones are already continued.

    Args:
        next_logits: Called with the new symbols ``[b, m]``; returns the logits ``[b, vocabulary]`` of what follows
            them. It keeps its own state.
        prompts: The symbols of each row, at least one.
        max_new_tokens: Symbols to add to a row; None goes on for as long as the caller asks for more.
        temperature: See :func:`sample_next`.
        top_k: See :func:`sample_next`.
        top_p: See :func:`sample_next`.
        stop: A row ends after the first of these sequences that it has made; its own prompt does not count.
        seed: Of the draws of the first row; the others have the seeds after it. The global random state is not touched.
        device: Where ``next_logits`` takes and gives its tensors.

    Returns:
        An iterator over the steps: the symbol that each row makes, or None if it makes none because it is still being
        read or has ended. It ends with the last row.

    Raises:
        ValueError: At once, for a prompt or a stop without symbols or a value out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must not be negative, or None to go on without end")
    for name, sequences in (("prompts", prompts), ("stop", stop)):
        empty = [index for index, sequence in enumerate(sequences) if not len(sequence)]
        if empty:
            raise ValueError(f"{name}[{empty[0]}] is empty: it must have at least one symbol")
    if not prompts:
        raise ValueError("prompts is empty: give at least one")
    endings = [list(sequence) for sequence in stop]
    generators = [torch.Generator(device).manual_seed(seed + row) for row in range(len(prompts))]

    def steps() -> Iterator[list[int | None]]:
        read = min(map(len, prompts))
        new = torch.tensor([list(prompt[:read]) for prompt in prompts], device=device)
        made = [0] * len(prompts)
        recent: list[list[int]] = [[] for _ in prompts]  # as much as is needed to find the longest ending
        running = set(range(len(prompts))) if max_new_tokens != 0 else set()
        while running:
            logits = next_logits(new)
            symbols: list[int | None] = [None] * len(prompts)
            for row in sorted(row for row in running if read >= len(prompts[row])):
                drawn = sample_next(
                    logits[row : row + 1],
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    generator=generators[row],
                )
                symbols[row] = symbol = int(drawn)
                made[row] += 1
                recent[row] = [*recent[row], symbol][-max(map(len, endings), default=1) :]
                ended = any(recent[row][-len(ending) :] == ending for ending in endings)
                if ended or made[row] == max_new_tokens:
                    running.remove(row)
            yield symbols
            # What rows that have ended are fed no longer matters, as rows do not see each other.
            column = [
                prompt[read] if read < len(prompt) else symbol or 0
                for prompt, symbol in zip(prompts, symbols, strict=True)
            ]
            new = torch.tensor(column, device=device).unsqueeze(1)
            read += 1

    return steps()


def generate(
    next_logits: Callable[[Tensor], Tensor],
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Continue prompts of one length by the same number of symbols; the global random state is not touched.

    Args:
        next_logits: See :func:`continue_prompts`.
        prompt: Long ``[b, n]``, n at least 1.
        max_new_tokens: Symbols to add.
        temperature: See :func:`sample_next`.
        top_k: See :func:`sample_next`.
        top_p: See :func:`sample_next`.
        seed: See :func:`continue_prompts`.

    Returns:
        Long ``[b, n + max_new_tokens]``.
    """
    steps = continue_prompts(
        next_logits,
        prompt.tolist(),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        device=prompt.device,
    )
    columns = [torch.tensor(symbols, device=prompt.device).unsqueeze(1) for symbols in steps]
    return torch.cat([prompt, *columns], dim=1)


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative; 0 takes the most probable symbol")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None to draw among all symbols")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1], or be None to draw among all symbols")
