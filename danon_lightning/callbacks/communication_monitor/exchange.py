"""What strategies tell of their exchange of gradients."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch.nn.parallel import DistributedDataParallel

from danon_lightning.callbacks.performance_monitor.monitor import HasCommunicationStats


@dataclass(frozen=True)
class Exchange:
    """What a rank has exchanged in a window. NaN for what is not known.

    Attributes:
        exposed_seconds: What the exchange has added to the steps.
        hidden_seconds: For how long it was at work beside the backward pass.
        inter_node_bytes: Sent to ranks of other nodes.
        intra_node_bytes: Sent to ranks of the same node.
        dense_bytes: Of the gradients themselves.
        skipped_steps: Steps that were left out since gradients were not finite.
        residual_norm: Of what this rank keeps for later steps.
        compression_ratio: Bytes that a dense exchange would have sent over the compressed level, over those sent there.
    """

    exposed_seconds: float = math.nan
    hidden_seconds: float = math.nan
    inter_node_bytes: float = math.nan
    intra_node_bytes: float = math.nan
    dense_bytes: float = math.nan
    skipped_steps: float = math.nan
    residual_norm: float = math.nan
    compression_ratio: float = math.nan


_NOTHING = Exchange(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
_SUMS = ("exposed_seconds", "hidden_seconds", "inter_node_bytes", "intra_node_bytes", "dense_bytes", "skipped_steps")


class ExchangeMeter:
    """Reads what a strategy tells, window by window.

    A strategy with ``communication_stats()`` tells all of it. torch's DistributedDataParallel measures one step in each
    window: how long its exchange took, and how much of that was hidden by the backward pass. It does not know how many
    bytes were sent, which depends on the algorithm of the backend. With one rank nothing is exchanged; of other
    strategies nothing is known.

    Args:
        trainer: Whose strategy is asked, at the start of training.
        every_n_steps: The length of a window.
    """

    def __init__(self, trainer: pl.Trainer, every_n_steps: int) -> None:
        """See the class."""
        self._strategy: Any = trainer.strategy
        self._tells_all = isinstance(trainer.strategy, HasCommunicationStats)
        self._is_alone = trainer.world_size == 1
        self._before: Mapping[str, Any] = {}
        model = getattr(trainer.strategy, "model", None)
        self._ddp: Any = model if isinstance(model, DistributedDataParallel) else None
        if self._ddp is not None and not self._tells_all:
            # A prototype of torch's, as is what it measures: without it, nothing is known.
            set_rate = getattr(self._ddp, "_set_ddp_runtime_logging_sample_rate", None)
            if set_rate is not None:
                set_rate(every_n_steps)

    def take(self, steps: int) -> Exchange:
        """What was exchanged since the last call.

        Args:
            steps: Optimizer steps since then.
        """
        if self._tells_all:
            now, before = self._strategy.communication_stats(), self._before
            self._before = now
            if not now:  # one rank, or one replica
                return _NOTHING
            sums = {name: float(now[name]) - float(before.get(name, 0)) for name in _SUMS}
            return Exchange(
                **sums, residual_norm=float(now["residual_norm"]), compression_ratio=float(now["compression_ratio"])
            )
        if self._is_alone:
            return _NOTHING
        return self._of_ddp(steps)

    def _of_ddp(self, steps: int) -> Exchange:
        read = getattr(self._ddp, "_get_ddp_logging_data", None)
        told = read() if read is not None else {}
        whole, hidden = told.get("backward_comm_time"), told.get("backward_compute_comm_overlap_time")
        if whole is None or hidden is None:
            return Exchange()
        nanoseconds = 1e-9 * steps
        return Exchange(
            exposed_seconds=max(0, whole - hidden) * nanoseconds,
            hidden_seconds=hidden * nanoseconds,
            dense_bytes=float(told.get("total_parameter_size_bytes", math.nan)) * steps,
        )
