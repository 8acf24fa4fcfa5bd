"""What is done about a step that was not finite."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor

Policy: TypeAlias = Literal["raise", "skip", "fallback", "report"]


class NonFiniteError(RuntimeError):
    """Training has met a NaN or an infinity. The message is the whole report.

    Attributes:
        cause: The class of the cause, such as "forward".
    """

    def __init__(self, message: str, cause: str = "") -> None:
        """Take the report."""
        super().__init__(message)
        self.cause = cause


def check_policy(policy: str) -> Policy:
    """The policy itself.

    Raises:
        ValueError: If there is none of that name.
    """
    if policy not in get_args(Policy):
        raise ValueError(f"policy={policy!r} must be one of {', '.join(map(repr, get_args(Policy)))}")
    return policy  # type: ignore[return-value]


@dataclass
class Skips:
    """Counts steps that were left out.

    Attributes:
        most: So many in a row are too many.
        in_a_row: Since the last finite step.
        total: Since the beginning.
    """

    most: int
    in_a_row: int = 0
    total: int = 0

    def add(self) -> bool:
        """Count one; whether there have been too many in a row."""
        self.in_a_row += 1
        self.total += 1
        return self.in_a_row > self.most

    def reset(self) -> None:
        """There was a finite step."""
        self.in_a_row = 0


def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Have the optimizer leave these parameters, and what it keeps for them, as they are."""
    for parameter in parameters:
        parameter.grad = None


class ScalerWatch:
    """Tells the search of a gradient scaler for its scale, which begins with infinities, from a fault.

    Args:
        most_skips: So many steps in a row that the scaler had to leave out are a fault.
        least_scale: A scale below it is one, too.
    """

    def __init__(self, most_skips: int, least_scale: float) -> None:
        """See the class."""
        if most_skips < 1:
            raise ValueError(f"max_scaler_skips={most_skips} must be at least 1")
        if not least_scale > 0:
            raise ValueError(f"min_loss_scale={least_scale} must be positive")
        self.most_skips, self.least_scale = most_skips, least_scale
        self.in_a_row = 0

    def look(self, gradients_finite: bool, losses_finite: bool, scale: float) -> str:
        """Why this step is a fault; empty if it is none.

        Args:
            gradients_finite: Whether they are; if not, the scaler leaves the step out.
            losses_finite: Whether the losses are, without the scale.
            scale: With which the gradients were computed.
        """
        if not losses_finite:
            return "the loss itself is not finite, which no loss scale can cure"
        if gradients_finite:
            self.in_a_row = 0
            return ""
        self.in_a_row += 1
        if self.in_a_row >= self.most_skips:
            skipped, self.in_a_row = self.in_a_row, 0
            return f"the gradient scaler has left out {skipped} steps in a row, its scale is down to {scale:g}"
        if scale < self.least_scale:
            return f"the scale of the gradient scaler is down to {scale:g}, below {self.least_scale:g}"
        return ""
