"""What a language model writes: symbols; or text at once, several together, or byte by byte without end."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from danon_lightning.attention import AttentionConfig, AttentionModel
from danon_lightning.attention.model import evaluating
from danon_lightning.models.generation import append_symbols, check_count, continue_prompts, generate


class TextGeneration(pl.LightningModule):
    """The part of a language model that writes, from the streaming form of the model: symbols, or bytes as text."""

    config: AttentionConfig
    model: AttentionModel
    head: nn.Linear

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | Sequence[int] = (),
        pad_token_id: int = 0,
        seed: int = 0,
    ) -> Tensor:
        """Continue rows of symbols together, each as if it were alone (up to rounding).

        Args:
            input_ids: Long ``[b, n]``, below ``vocab_size``, neither zero.
            max_new_tokens: Symbols to add to a row. They and the longest prompt together must fit
                ``max_sequence_length``, unless the model streams without end.
            attention_mask: 1 for the symbols of the prompts, 0 for padding on their left ``[b, n]``, boolean or
                integer; None: no row has padding. Padding is not read, so a row goes on as it would without.
            temperature: Divides the logits; 0 takes the most probable symbol.
            top_k: Draw among the k most probable symbols only; None for all.
            top_p: Draw among the most probable symbols only, as few as have this probability together; None for all.
            stop: A symbol or several; a row ends with the first of them that the model has made.
            pad_token_id: What stands behind rows that end before others.
            seed: Of the draws of the first row; the others have the seeds after it. The global random state is not
                touched.

        Returns:
            ``input_ids`` and what was made, ``[b, n + m]``; m is ``max_new_tokens``, or less where all rows end before.

        Raises:
            ValueError: For a value, shape or dtype that does not fit, or if the rows would be too long.
        """
        check_count("max_new_tokens", max_new_tokens)
        real = _real_symbols(input_ids, attention_mask, self.config.vocab_size)
        self._check_length(int(real.sum(dim=1).max()), max_new_tokens, "max_new_tokens", "symbols")
        return generate(
            self._reader(len(input_ids)),
            input_ids,
            max_new_tokens,
            real=real,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=[[symbol] for symbol in ([stop] if isinstance(stop, int) else stop)],
            fill=pad_token_id,
            seed=seed,
        )

    def generate_text(
        self,
        prompt: str,
        *,
        max_new_bytes: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | bytes | Sequence[str | bytes] = (),
        seed: int = 0,
    ) -> str:
        """Continue a text byte by byte, from the streaming form of the model.

        Args:
            prompt: At least one byte in UTF-8.
            max_new_bytes: Bytes to add. Prompt and continuation together must fit ``max_sequence_length``, unless the
                model streams without end.
            temperature: Divides the logits; 0 takes the most probable byte.
            top_k: Draw among the k most probable bytes only; None for all.
            top_p: Draw among the most probable bytes only, as few as have this probability together; None for all.
            stop: A string or several after which the text ends, once the model has made one; it is part of the text.
            seed: Of the draws. The global random state is not touched.

        Returns:
            The prompt and its continuation; what is no valid UTF-8 is replaced.

        Raises:
            ValueError: If the prompt is empty or the text would be too long, or for a value out of range.
        """
        [text] = self.generate_texts(
            [prompt],
            max_new_bytes=max_new_bytes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
        )
        return text

    def generate_texts(
        self,
        prompts: Sequence[str],
        *,
        max_new_bytes: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | bytes | Sequence[str | bytes] = (),
        seed: int = 0,
    ) -> list[str]:
        """Continue texts of any lengths together, each as if it were alone (up to rounding).

        The arguments are those of :meth:`generate_text`; the first text is continued with ``seed``, the second with
        ``seed + 1``, and so on. From the end of the shortest prompt on, prompts are read byte by byte.

        Raises:
            TypeError: If ``prompts`` is a single text.
            ValueError: As :meth:`generate_text` does.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts={prompts[:40]!r} is one text: put it in a list, ['…'], or use generate_text")
        check_count("max_new_bytes", max_new_bytes)
        texts = [bytearray(prompt.encode()) for prompt in prompts]
        steps = self._continue(
            [bytes(text) for text in texts],
            max_new_bytes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
        )
        append_symbols(steps, texts)
        return [text.decode(errors="replace") for text in texts]

    def stream_text(
        self,
        prompt: str,
        *,
        max_new_bytes: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | bytes | Sequence[str | bytes] = (),
        seed: int = 0,
    ) -> Iterator[bytes]:
        """Continue a text byte by byte and give each byte as soon as it is made, without end if wanted.

        The arguments are those of :meth:`generate_text`, and so are the bytes; the prompt is not repeated. Between two
        bytes the module is in the mode it was in before, so it may be trained; the state of the text stays as it is.

        Args:
            prompt: At least one byte in UTF-8.
            max_new_bytes: None goes on for as long as the caller asks for more. That takes a model that streams without
                end, in memory that does not grow, such as one with a fixed number of levels.
            temperature: See :meth:`generate_text`.
            top_k: See :meth:`generate_text`.
            top_p: See :meth:`generate_text`.
            stop: See :meth:`generate_text`.
            seed: See :meth:`generate_text`.

        Returns:
            An iterator over single bytes.

        Raises:
            ValueError: At once, for the same reasons, or if the model cannot go on without end.
        """
        steps = self._continue(
            [prompt.encode()],
            max_new_bytes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
        )
        return (bytes([symbol]) for [symbol] in steps if symbol is not None)

    def _continue(
        self,
        prompts: Sequence[bytes],
        max_new_bytes: int | None,
        *,
        stop: str | bytes | Sequence[str | bytes],
        **sampling: Any,
    ) -> Iterator[list[int | None]]:
        """Check what can be checked before the first byte, and return the steps of ``continue_prompts``."""
        self._check_prompts(prompts)
        if max_new_bytes is not None:
            check_count("max_new_bytes", max_new_bytes)
        self._check_length(max(map(len, prompts)), max_new_bytes, "max_new_bytes", "bytes")
        stops = [stop] if isinstance(stop, (str, bytes)) else stop
        encoded = [ending.encode() if isinstance(ending, str) else ending for ending in stops]
        return continue_prompts(
            self._reader(len(prompts)), prompts, max_new_bytes, stop=encoded, device=self.device, **sampling
        )

    def _reader(self, batch_size: int) -> Callable[[Tensor], Tensor]:
        """Return the ``next_logits`` of ``continue_prompts``, with a state of its own."""
        state = self.model.init_state(batch_size)

        def next_logits(tokens: Tensor) -> Tensor:
            nonlocal state
            with evaluating(self), torch.no_grad():
                output = self.model(tokens, state=state)
                logits: Tensor = self.head(output.last_hidden_state[:, -1])
            state = output.state
            return logits

        return next_logits

    def _check_prompts(self, prompts: Sequence[bytes]) -> None:
        if not prompts:
            raise ValueError("prompts is empty: give at least one text to continue")
        if not all(prompts):
            raise ValueError("prompt='' is empty: give the model at least one byte to continue")
        symbols = self.config.vocab_size
        if symbols > 256 or max(map(max, prompts)) >= symbols:
            raise ValueError(
                f"vocab_size={symbols} does not fit: text is made of bytes, below 256, and the prompt must be made of "
                "symbols of the model"
            )

    def _check_length(self, longest: int, new: int | None, argument: str, unit: str) -> None:
        if self.model.streams_without_end:
            return
        limit = self.config.max_sequence_length
        if new is None:
            raise ValueError(
                f"{argument}=None: this model cannot go on beyond max_sequence_length={limit}; set {argument} to "
                f"at most {limit - longest}, or build a model that streams without end, as with a fixed num_levels of "
                "msra or a limited max_cache_size of ucsa"
            )
        if longest + new > limit:
            raise ValueError(
                f"a prompt of {longest} {unit} and {argument}={new} exceed "
                f"max_sequence_length={limit}: shorten either, or train with a longer one"
            )


def _real_symbols(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Tensor:
    """Return which symbols are no padding ``[b, n]``, boolean, once all is checked; see ``TextGeneration.generate``."""
    if input_ids.dim() != 2 or 0 in input_ids.shape or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)} and dtype {input_ids.dtype}; it must be [batch, tokens], "
            "neither zero, torch.int64 or torch.int32; one prompt is a batch too: input_ids[None]"
        )
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if real.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {list(real.shape)}, but input_ids {list(input_ids.shape)}")
    if not real[:, -1].all() or (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError("attention_mask has zeros behind ones: prompts must be padded on the left, where they begin")
    read = input_ids[real]
    if read.min() < 0 or read.max() >= vocab_size:
        raise ValueError(
            f"input_ids lies in [{int(read.min())}, {int(read.max())}]; symbols of vocab_size={vocab_size} are "
            f"0 … {vocab_size - 1}"
        )
    return real
