"""Sampling from a language model, symbol by symbol."""

import math
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence

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
        temperature: Divides the logits; 0, or one too small for float32, takes the most probable symbol.
        top_k: Draw among the k most probable only, of equal ones the first; None for all.
        top_p: Draw among the most probable only, as few as have this probability together (after ``top_k``); None for
            all.
        generator: Random state, on the device of ``logits``.

    Returns:
        Long ``[b, 1]``.

    Raises:
        ValueError: If ``temperature`` is negative or not finite, ``top_k`` no integer of at least 1 or ``top_p`` not in
            (0, 1].

    Reference:
        Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020 (arXiv:1904.09751).
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    # With the largest at zero, what a small temperature makes of the others overflows to a probability of zero.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None:
        others = logits.argsort(dim=-1, descending=True, stable=True)[:, top_k:]
        logits = logits.scatter(-1, others, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, symbols = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        enough = ordered.cumsum(dim=-1) - ordered >= top_p
        enough[:, 0] = False  # also where top_p is zero in float32
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
    if max_new_tokens is not None:
        check_count("max_new_tokens", max_new_tokens)
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


def append_symbols(steps: Iterable[Sequence[int | None]], rows: Sequence[MutableSequence[int]]) -> None:
    """Append to each of ``rows`` what the ``steps`` of :func:`continue_prompts` make for it."""
    for symbols in steps:
        for row, symbol in zip(rows, symbols, strict=True):
            if symbol is not None:
                row.append(symbol)


def generate(
    next_logits: Callable[[Tensor], Tensor],
    prompts: Tensor,
    max_new_tokens: int,
    *,
    real: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[Sequence[int]] = (),
    fill: int = 0,
    seed: int = 0,
) -> Tensor:
    """Continue prompts that lie side by side in a tensor; the global random state is not touched.

    Args:
        next_logits: See :func:`continue_prompts`.
        prompts: Long ``[b, n]``.
        max_new_tokens: Symbols to add to a row.
        real: True for the symbols of the prompts ``[b, n]``, boolean; None: all are. The others are not read.
        temperature: See :func:`sample_next`.
        top_k: See :func:`sample_next`.
        top_p: See :func:`sample_next`.
        stop: See :func:`continue_prompts`.
        fill: What stands after the end of rows that end before others.
        seed: See :func:`continue_prompts`.

    Returns:
        The prompts as they were given, and behind them what was made: ``[b, n + m]``, m ≤ ``max_new_tokens``.

    Raises:
        ValueError: As :func:`continue_prompts` does.
    """
    check_count("max_new_tokens", max_new_tokens)
    real = torch.ones_like(prompts, dtype=torch.bool) if real is None else real
    steps = continue_prompts(
        next_logits,
        [row[kept].tolist() for row, kept in zip(prompts, real, strict=True)],
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        seed=seed,
        device=prompts.device,
    )
    made: list[list[int]] = [[] for _ in prompts]
    append_symbols(steps, made)
    longest = max(map(len, made))
    filled = [row + [fill] * (longest - len(row)) for row in made]
    return torch.cat([prompts, torch.tensor(filled, dtype=prompts.dtype, device=prompts.device)], dim=1)


def check_count(argument: str, count: object) -> None:
    """Raise a ValueError unless ``count``, given as ``argument``, is an integer of at least 0."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"{argument}={count!r} must be an integer of at least 0; only streams go on without end")


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be finite and not negative; 0 takes the most probable symbol")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k={top_k!r} must be an integer of at least 1, or None to draw among all symbols")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1], or be None to draw among all symbols")
