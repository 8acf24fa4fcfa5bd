"""Multi-query associative recall: pairs of a key and a value, then the keys again, in place of which values are due.

Reference:
    Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv:2312.04927).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# What the loss does not look at.
IGNORED = -100
_BLANK = 0
# The power law of the published generator: gaps of g have probability proportional to g^(a - 1).
_POWER = 0.01


@dataclass(frozen=True)
class MQAR:
    """The task.

    A sequence starts with the pairs, keys at even positions, each followed by its value. Each key then occurs once more
    at an even distance from there; the label at that position is the value it had. All other labels are
    :data:`IGNORED`. The blank is 0, keys are drawn from 1 to vocabulary / 2 - 1, values from the other half, neither
    twice in a sequence.

    Args:
        length: Tokens n, even.
        pairs: Pairs of key and value; four of them need 16 tokens.
        vocabulary: Number of tokens, even.
        generator: "uniform": queries anywhere with equal probability, blanks between them. "zoology": as published,
            most queries soon after the pairs, by a power law, and random tokens between them.

    Raises:
        ValueError: If the sizes do not fit each other.
    """

    length: int
    pairs: int
    vocabulary: int
    generator: Literal["uniform", "zoology"] = "uniform"

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.length % 2 or self.length < 4 * self.pairs:
            raise ValueError(f"length={self.length} must be even and at least four times pairs={self.pairs}")
        if self.vocabulary % 2 or self.vocabulary < 2 * self.pairs + 2:
            raise ValueError(
                f"vocabulary={self.vocabulary} must be even and at least {2 * self.pairs + 2} for pairs={self.pairs}"
            )

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw sequences.

        Args:
            size: Number of sequences b.
            random: Random state.

        Returns:
            Tokens and labels, int64 ``[b, n]`` each.
        """
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + _choose(torch.ones(size, half - 1), self.pairs, random)
        values = half + _choose(torch.ones(size, half), self.pairs, random)
        tokens = torch.full((size, self.length), _BLANK)
        tokens[:, 0:context:2] = keys
        tokens[:, 1:context:2] = values
        places = (self.length - context) // 2
        weights = torch.ones(places)
        if self.generator == "zoology":
            weights = torch.arange(1, places + 1, dtype=torch.float64) ** (_POWER - 1)
        positions = context + 2 * _choose(weights.expand(size, places), self.pairs, random)
        labels = torch.full_like(tokens, IGNORED)
        tokens.scatter_(1, positions, keys)
        labels.scatter_(1, positions, values)
        if self.generator == "zoology":
            filler = torch.randint(self.vocabulary, tokens.shape, generator=random)
            tokens = torch.where(tokens == _BLANK, filler, tokens)
        return tokens, labels


def _choose(weights: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Indices ``[b, count]`` of different entries of ``weights [b, m]``, with probabilities in proportion to them."""
    return torch.multinomial(weights, count, replacement=False, generator=random)
