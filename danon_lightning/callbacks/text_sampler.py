"""Shows in the logs what a language model would write."""

import math
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override


@runtime_checkable
class TextGenerator(Protocol):
    """What a LightningModule must offer to be sampled."""

    def generate_text(
        self, prompt: str, *, max_new_bytes: int, temperature: float, top_k: int | None, seed: int
    ) -> str:
        """Continue ``prompt``; the global random state must not change."""
        ...


class TextSampler(pl.Callback):
    """Logs a sample of generated text after each validation, as text in every logger that takes text.

    Only rank 0 generates, without any communication. If that fails it warns, and training goes on. The sample has a
    random state of its own, so that training is the same with and without it.

    Keys logged:
        ``sample`` (text): the prompt and its continuation.

    Args:
        prompt: What the model is to continue.
        max_new_bytes: Bytes to generate.
        temperature: Divides the logits; 0 takes the most probable byte each time.
        top_k: Keep only the k most probable bytes; None keeps all.
        seed: Of the sample's random state, so that samples of one run can be compared.

    Raises:
        ValueError: For a value out of range.
        TypeError: At the start of ``fit``, if the LightningModule has no ``generate_text``.
    """

    def __init__(
        self,
        prompt: str = "def ",
        *,
        max_new_bytes: int = 200,
        temperature: float = 0.8,
        top_k: int | None = 40,
        seed: int = 0,
    ) -> None:
        """See the class."""
        if not prompt:
            raise ValueError("prompt='' is empty: give the model at least one byte to continue")
        if not isinstance(max_new_bytes, int) or max_new_bytes < 1:
            raise ValueError(f"max_new_bytes={max_new_bytes!r} must be an integer of at least 1")
        if not 0 <= temperature < math.inf:
            raise ValueError(
                f"temperature={temperature} must be finite and not negative; 0 takes the most probable byte"
            )
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k={top_k!r} must be an integer of at least 1, or None to draw among all bytes")
        self.prompt = prompt
        self.max_new_bytes = max_new_bytes
        self.temperature = temperature
        self.top_k = top_k
        self.seed = seed

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module that cannot generate before any time is spent on it."""
        if not isinstance(pl_module, TextGenerator):
            raise TypeError(
                f"TextSampler needs a LightningModule with a method generate_text, {type(pl_module).__name__} has "
                "none: leave the callback out (callbacks=quiet), or add the method"
            )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Generate and log."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        experiments: list[Any] = [getattr(logger, "experiment", None) for logger in trainer.loggers]
        writers = [experiment for experiment in experiments if hasattr(experiment, "add_text")]
        if not writers:
            return
        assert isinstance(pl_module, TextGenerator)
        try:
            text = pl_module.generate_text(
                self.prompt,
                max_new_bytes=self.max_new_bytes,
                temperature=self.temperature,
                top_k=self.top_k,
                seed=self.seed,
            )
        except (ValueError, RuntimeError) as error:
            # A text too long for the model, or a model that has diverged: no reason to end the training.
            rank_zero_warn(f"TextSampler has no sample of step {trainer.global_step}: {error}")
            return
        # Markdown: four spaces in front of each line keep it as it is, whatever fences the text itself contains.
        block = "\n".join("    " + line for line in text.splitlines())
        for writer in writers:
            writer.add_text("sample", block, trainer.global_step)
