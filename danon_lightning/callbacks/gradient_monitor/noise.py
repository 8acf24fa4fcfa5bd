"""The gradient noise scale: how many samples make a batch whose gradient is as much signal as noise.

Reference:
    McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.1.
"""

from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True)
class Pieces:
    """What the gradients of the pieces of a batch have told.

    The pieces are the micro-batches of all replicas, of the same size each; the gradient of the batch is their mean.

    Attributes:
        square_of_piece: Mean of |g_p|² over the pieces p.
        square_of_mean: |ḡ|².
        number: Of pieces, at least 2.
        between_ranks: Whether each replica had one piece, so that comparing pieces is comparing ranks.
        samples: In a piece; 0 if unknown.
    """

    square_of_piece: float
    square_of_mean: float
    number: float
    between_ranks: bool
    samples: float = 0.0

    @property
    def mean_product(self) -> float:
        """Mean of g_p · g_q over all pairs p ≠ q, exactly: |Σ g|² = Σ |g_p|² + Σ g_p · g_q. Estimates |G|²."""
        return (self.number * self.square_of_mean - self.square_of_piece) / (self.number - 1)

    @property
    def cosine(self) -> float:
        """Mean product of two gradients, divided by their mean square: 1 if all are alike, 0 if all is noise."""
        return self.mean_product / self.square_of_piece if self.square_of_piece else float("nan")

    @property
    def variance(self) -> float:
        """An unbiased estimate of tr(Σ) of the gradient of a piece: (|g_small|² − |g_big|²) / (1 − 1/number)."""
        return (self.square_of_piece - self.square_of_mean) / (1 - 1 / self.number)


class NoiseScale:
    """Averages over steps. Numerator and denominator are averaged before dividing: their quotient would be biased.

    Args:
        decay: Weight of the average so far, where the new value has 1 − ``decay``.

    Attributes:
        variance: Average of tr(Σ), of the gradient of one sample (of one piece, if nobody knows how many it has).
        square: Average of |G|².
        batch: Average number of samples in a batch (of pieces, if nobody knows).
        updates: How many values they are made of.
        counts_samples: Whether the number of samples is known.
    """

    def __init__(self, decay: float) -> None:
        """See the class."""
        self.decay = decay
        self.variance = self.square = self.batch = 0.0
        self.updates = 0
        self.counts_samples = False

    def update(self, pieces: Pieces) -> None:
        """Add what a step has told, unless it is not finite."""
        self.counts_samples = pieces.samples > 0
        size = pieces.samples or 1.0
        variance, square = size * pieces.variance, pieces.mean_product
        if not (isfinite(variance) and isfinite(square)):
            return
        self.updates += 1
        # Weights as if all earlier values had been there from the start: the first value is not shrunk towards zero.
        new = (1 - self.decay) / (1 - self.decay**self.updates)
        self.variance += new * (variance - self.variance)
        self.square += new * (square - self.square)
        self.batch += new * (pieces.number * size - self.batch)

    @property
    def in_batches(self) -> float | None:
        """B_simple = tr(Σ) / |G|², in batches; None as long as the signal is not above the noise of its estimate."""
        return self.variance / self.square / self.batch if self.updates and self.square > 0 else None

    @property
    def in_samples(self) -> float | None:
        """B_simple in samples; None also if nobody knows how many samples there are."""
        return self.variance / self.square if self.counts_samples and self.updates and self.square > 0 else None

    def state_dict(self) -> dict[str, float]:
        """All averages."""
        names = ("variance", "square", "batch", "updates", "counts_samples")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self.variance, self.square, self.batch = state["variance"], state["square"], state["batch"]
        self.updates, self.counts_samples = int(state["updates"]), bool(state["counts_samples"])
