"""How replicas synchronise, as users say it."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from danon_lightning.strategies.communication.error_feedback import ErrorFeedback


@dataclass(frozen=True)
class AsyncSync:
    """Gradients are exchanged while the next step computes, and move the weights one step late.

    What arrives was computed for weights that have moved since. To first order in that movement, a gradient g for
    weights w is g + λ·g²·(w' − w) for weights w': the diagonal of the Hessian is approximated by g² (delay
    compensation, Zheng et al. 2017, eq. 10). λ is ``compensation`` divided by the root mean square of each parameter's
    gradient (their adaptive variant), so that it does not depend on the scale of the loss.

    Args:
        compensation: λ₀; 0 for none, which saves the memory of one model copy.

    Raises:
        ValueError: If it is negative or not finite.
    """

    compensation: float = 0.0

    def __post_init__(self) -> None:
        """Check the value."""
        if not (math.isfinite(self.compensation) and self.compensation >= 0):
            raise ValueError(f"compensation={self.compensation} must be a number of at least 0")


@dataclass(frozen=True)
class PeriodicSync:
    """Each replica trains by itself for some steps; then the weights are moved by the mean of what they have found.

    That mean is the gradient of an outer optimizer, SGD with Nesterov momentum (DiLoCo, Douillard et al. 2023; with
    ``outer_momentum=0`` and ``outer_learning_rate=1`` it is the plain averaging of local SGD). A compression is applied
    to it. Takes the memory of two model copies.

    Args:
        every_n_steps: Optimizer steps between two exchanges.
        outer_learning_rate: That of the outer optimizer.
        outer_momentum: Its momentum; 0 for none.

    Raises:
        ValueError: For a value out of range.
    """

    every_n_steps: int = 50
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.9

    def __post_init__(self) -> None:
        """Check the values."""
        if self.every_n_steps < 1:
            raise ValueError(f"every_n_steps={self.every_n_steps} must be at least 1")
        if not (math.isfinite(self.outer_learning_rate) and self.outer_learning_rate > 0):
            raise ValueError(f"outer_learning_rate={self.outer_learning_rate} must be positive")
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(f"outer_momentum={self.outer_momentum} must be in [0, 1)")


def resolve_sync_mode(mode: "str | AsyncSync | PeriodicSync") -> "AsyncSync | PeriodicSync | None":
    """Settings for a mode.

    Args:
        mode: "full", "async", "periodic", or settings.

    Returns:
        None for "full".

    Raises:
        ValueError: For another name.
    """
    if isinstance(mode, (AsyncSync, PeriodicSync)):
        return mode
    if mode == "full":
        return None
    if mode == "async":
        return AsyncSync()
    if mode == "periodic":
        return PeriodicSync()
    raise ValueError(f"sync_mode={mode!r} must be 'full', 'async', 'periodic', AsyncSync(…) or PeriodicSync(…)")


def check_sync_mode(
    mode: "AsyncSync | PeriodicSync | None",
    feedback: ErrorFeedback | None,
    optimizer_sharding: bool,
    find_unused_parameters: bool,
) -> None:
    """Refuse what does not go with a mode.

    Raises:
        ValueError: Saying which argument to change.
    """
    if mode is None:
        return
    name = "async" if isinstance(mode, AsyncSync) else "periodic"
    if feedback is not None and feedback.momentum is not None:
        raise ValueError(
            f"ErrorFeedback(momentum={feedback.momentum}) cannot be used with sync_mode={name!r}, which moves the "
            "weights at other times: leave momentum at None"
        )
    if find_unused_parameters and isinstance(mode, AsyncSync):
        raise ValueError("find_unused_parameters=True cannot be used with sync_mode='async'")
    if optimizer_sharding and isinstance(mode, PeriodicSync):
        raise ValueError(
            "optimizer_sharding=True cannot be used with sync_mode='periodic', where each replica has an optimizer of "
            "its own: leave one of them out"
        )


def keep_local(state: Any, bucket: GradBucket) -> Future[Tensor]:
    """A hook for DistributedDataParallel that exchanges nothing."""
    future: Future[Tensor] = Future()
    future.set_result(bucket.buffer())
    return future
