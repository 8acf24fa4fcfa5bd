"""Text from a language model: at once, several together, or byte by byte without end."""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from danon_lightning.attention import AttentionConfig, AttentionModel
from danon_lightning.models.generation import continue_prompts


class TextGeneration(pl.LightningModule):
    """The part of a language model over bytes that makes text, from the streaming form of the model."""

    config: AttentionConfig
    model: AttentionModel
    head: nn.Linear

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
        """
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
        for symbols in steps:
            for text, symbol in zip(texts, symbols, strict=True):
                if symbol is not None:
                    text.append(symbol)
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
        self._check_lengths(prompts, max_new_bytes)
        state = self.model.init_state(batch_size=len(prompts))

        def next_logits(tokens: Tensor) -> Tensor:
            nonlocal state
            was_training = self.training
            self.eval()
            try:
                with torch.no_grad():
                    output = self.model(tokens, state=state)
                    logits: Tensor = self.head(output.last_hidden_state[:, -1])
            finally:
                self.train(was_training)
            state = output.state
            return logits

        stops = [stop] if isinstance(stop, (str, bytes)) else stop
        encoded = [ending.encode() if isinstance(ending, str) else ending for ending in stops]
        return continue_prompts(next_logits, prompts, max_new_bytes, stop=encoded, device=self.device, **sampling)

    def _check_lengths(self, prompts: Sequence[bytes], max_new_bytes: int | None) -> None:
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
        if self.model.streams_without_end:
            return
        longest, limit = max(map(len, prompts)), self.config.max_sequence_length
        if max_new_bytes is None:
            raise ValueError(
                f"max_new_bytes=None: this model cannot go on beyond max_sequence_length={limit}; set max_new_bytes to "
                f"at most {limit - longest}, or build a model that streams without end, as with a fixed num_levels of "
                "msra or a limited max_cache_size of ucsa"
            )
        if longest + max_new_bytes > limit:
            raise ValueError(
                f"a prompt of {longest} bytes and max_new_bytes={max_new_bytes} exceed "
                f"max_sequence_length={limit}: shorten either, or train with a longer one"
            )
