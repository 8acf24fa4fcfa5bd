"""Settings: what compression leaves out is not lost, but kept and added to the next step (see memory.py)."""

from dataclasses import dataclass
from typing import Literal

from danon_lightning.strategies.communication.compressors import Compressor, LinearCompressor


@dataclass(frozen=True)
class ErrorFeedback:
    """How the error of compression is fed back.

    Whoever codes values v with a residual e sends C(v + γ·e) and keeps v + γ·e − C(v + γ·e): the *worker*, who codes
    the sum over its node, and in exchanges that code twice also the *server*, who codes the sum over all nodes.

    With ``momentum`` this is Deep Gradient Compression, which brings Top-K with SGD to dense quality. A plain optimizer
    would apply its momentum when an element is sent at last, steps late; so momentum is gathered before elements are
    chosen: u ← m·u + g, and v = u takes part in the above. Where an element is sent, u is cleared too (factor masking),
    for its momentum is stale. The optimizer must then be SGD *without* momentum. What travels dense gets ordinary
    momentum, on all ranks alike.

    Args:
        decay: γ, in [0, 1]. Below 1, old errors fade; nothing is conserved then.
        flush_every: Number of steps after which everything kept is sent at once, dense, so that no element stays behind
            for long; None for never.
        momentum: m, in [0, 1); None for no momentum correction.
        clip_norm: Largest 2-norm of a parameter's gradient, clipped on each node before it is gathered (where several
            ranks share a parameter, each clips its part to its share). Clipping after the exchange, as Lightning does
            it, would clip momentum too. None for no clipping.

    Raises:
        ValueError: If an argument lies outside its range.

    Reference:
        Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019
        (arXiv:1901.09847); Tang et al., "DoubleSqueeze", ICML 2019 (arXiv:1905.05957) for the server's side; Lin et
        al., "Deep Gradient Compression", ICLR 2018 (arXiv:1712.01887) for momentum correction, masking and local
        clipping.
    """

    decay: float = 1.0
    flush_every: int | None = None
    momentum: float | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay} must lie in [0, 1]; 1 keeps errors in full")
        if self.flush_every is not None and self.flush_every < 1:
            raise ValueError(f"flush_every={self.flush_every} must be at least 1 step, or None for never")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1), or be None for no momentum correction")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive, or None for no clipping")


def resolve_error_feedback(
    error_feedback: "bool | Literal['auto'] | ErrorFeedback", compressor: Compressor | LinearCompressor | None
) -> ErrorFeedback | None:
    """What a user wrote as ``error_feedback``: None if there is to be none.

    Raises:
        ValueError: If it is none of the above, or is asked for without a compressor.
    """
    if (
        isinstance(error_feedback, str)
        and error_feedback != "auto"
        or not isinstance(error_feedback, bool | str | ErrorFeedback)
    ):
        raise ValueError(f"error_feedback={error_feedback!r} must be True, False, 'auto' or an ErrorFeedback")
    if compressor is None:
        if error_feedback in (False, "auto"):
            return None
        raise ValueError("error_feedback needs a compression: dense gradients have no error. Leave it at 'auto'")
    if isinstance(error_feedback, ErrorFeedback):
        return error_feedback
    if error_feedback == "auto":
        error_feedback = compressor.needs_error_feedback
    return ErrorFeedback() if error_feedback else None
