"""What may be chosen, and how readily: settings of ``compression="auto"``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from danon_lightning.strategies.communication.compressors import Compressor, LinearCompressor, get_compressor

Candidate = Compressor | LinearCompressor | None

# What dense gradients are called among the choices.
OFF = "off"
# From the least lossy one on. These are tolerated by any optimizer.
FOR_ANY_OPTIMIZER: tuple[str | None, ...] = (None, "bf16", "int8", "int4")
# With error feedback, these are tolerated by SGD.
FOR_SGD: tuple[str | None, ...] = (*FOR_ANY_OPTIMIZER, "powersgd", "topk", "sign")


@dataclass(frozen=True)
class AutoCompression:
    """Chooses by measurement what gradients are compressed with, again and again.

    Args:
        candidates: What may be chosen, from the least lossy one on: names, compressors, or None for dense gradients,
            which is always among them. By default what the optimizer is known to tolerate: "bf16", "int8" and "int4",
            and with ``torch.optim.SGD`` "powersgd", "topk" and "sign" too. Of those given, what the optimizer does not
            tolerate is left out, with a warning.
        every_n_steps: Exchanges between two looks at what has been measured; twice as many while all is as expected. A
            choice is changed after as many looks as ``confirmations``, with the next exchange, so with 5 and 2 what has
            changed is answered within 16.
        gain: By which share a step must become shorter for a choice to be changed after ``confirmations`` looks. If it
            would become shorter by less, that must be found at more looks in a row: by half of it, at twice as many.
        confirmations: Number of looks in a row.
        tie: Choices whose steps differ by less than this share are alike; the least lossy is preferred.

    Raises:
        ValueError: For a value out of range, an unknown compression, or a candidate that is named twice.
    """

    candidates: Sequence[str | Compressor | LinearCompressor | None] | None = None
    every_n_steps: int = 5
    gain: float = 0.1
    confirmations: int = 2
    tie: float = 0.03

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.every_n_steps < 1:
            raise ValueError(f"every_n_steps={self.every_n_steps} must be at least 1 exchange")
        if self.confirmations < 1:
            raise ValueError(f"confirmations={self.confirmations} must be at least 1 look")
        if not 0 < self.tie < self.gain < math.inf:
            raise ValueError(f"tie={self.tie} must be above 0 and below gain={self.gain}, or choices would swing")
        self.resolve(FOR_SGD)

    def resolve(self, default: Sequence[str | None]) -> list[Candidate]:
        """The candidates, dense first, then in order.

        Args:
            default: What to take if none were given.
        """
        chosen = list(default if self.candidates is None else self.candidates)
        if chosen == ["auto"] or isinstance(self.candidates, str):
            raise ValueError(f"candidates={self.candidates!r} must be a list, such as ['bf16', 'int8']")
        found: list[Candidate] = [None]
        for compression in chosen:
            compressor = get_compressor(compression)
            if compressor is not None:
                if label(compressor) in map(label, found):
                    raise ValueError(f"candidates: {label(compressor)} is named twice")
                found.append(compressor)
        return found


def label(compressor: Candidate) -> str:
    """What a choice is called: "off", or the compressor's name, with the settings that are not the usual ones."""
    if compressor is None:
        return OFF
    try:
        usual = vars(get_compressor(compressor.name))
    except ValueError:  # one of the user's own
        usual = {}
    own = [f"{name}={value!r}" for name, value in vars(compressor).items() if usual.get(name, compressor) != value]
    return f"{compressor.name}({', '.join(own)})" if own else compressor.name


def resolve_auto(compression: object) -> AutoCompression | None:
    """Settings, if ``compression`` asks for "auto"; else None."""
    if isinstance(compression, AutoCompression):
        return compression
    return AutoCompression() if compression == "auto" else None


def check_auto(error_feedback: object, stages: int) -> None:
    """Refuse what does not go with "auto".

    Raises:
        ValueError: Saying which argument to change.
    """
    if error_feedback != "auto":
        raise ValueError(
            f"error_feedback={error_feedback!r} cannot be used with compression='auto', which sets it for what it has "
            "chosen: leave it at 'auto'"
        )
    if stages > 1:
        raise ValueError(
            "compression='auto' cannot be used with pipeline stages, whose exchanges share the links without knowing "
            "of one another: name a compression, such as 'int8'"
        )
