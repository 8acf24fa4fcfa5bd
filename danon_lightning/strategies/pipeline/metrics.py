"""Metrics of torchmetrics in a module: updated by the last stage alone, and computed for all ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

from danon_lightning.strategies.pipeline.absent import find_absent
from danon_lightning.strategies.pipeline.agreement import broadcast_plain
from danon_lightning.strategies.process_groups import GroupReference


class SharedMetrics:
    """Makes ``compute`` of a module's metrics give, on each rank of a pipeline, what the last stage has.

    Args:
        module: The module.
        source: Rank of the pipeline that has the last stage.
        pipeline: The ranks of the pipeline.
        replicas: The ranks that have the same stages: over these, metrics synchronize themselves.
        device: Where the ranks communicate.

    Attributes:
        source: See above.
        paths: Where the module has which metric, by its ``id``.
    """

    def __init__(
        self,
        module: nn.Module,
        source: int,
        pipeline: GroupReference,
        replicas: GroupReference | None,
        device: torch.device,
    ) -> None:
        """See the class."""
        self.source, self._pipeline, self._device = source, pipeline, device
        self._in_step = False
        self._metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
        self.paths = {id(metric): name for name, metric in self._metrics.items()}
        for metric in self._metrics.values():
            if replicas is None:
                metric.distributed_available_fn = _no
            else:
                metric.dist_sync_fn = _gathering_over(replicas, metric.dist_sync_fn or gather_all_tensors)
            metric.compute = self._shared(metric, metric.compute)  # type: ignore[method-assign]
        for part in module.modules():
            if isinstance(part, (Metric, MetricCollection)):
                part.update = _given_data(part, part.update)  # type: ignore[method-assign]
                part.forward = _given_data(part, part.forward)  # type: ignore[method-assign]

    @contextmanager
    def step(self) -> Iterator[None]:
        """While a step runs, metrics are what they were: other ranks have nothing to do with its values."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def _shared(self, metric: Metric, compute: Callable[[], Any]) -> Callable[[], Any]:
        def shared_compute() -> Any:
            if self._in_step:
                return compute()
            mine = None
            if dist.get_rank(self._pipeline()) == self.source:
                with self.step():  # a metric may compute others
                    mine = compute()
            value = broadcast_plain(mine, self.source, self._pipeline(), self._device)
            metric._computed = value
            return value

        return shared_compute


def _given_data(metric: Metric | MetricCollection, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, but nothing where a step is run without data, only to see what it does."""

    def only_with_data(*args: Any, **kwargs: Any) -> Any:
        if find_absent((args, kwargs)) is None:
            return method(*args, **kwargs)
        nothing = torch.zeros(())
        return dict.fromkeys(metric.keys(), nothing) if isinstance(metric, MetricCollection) else nothing

    return only_with_data


def _gathering_over(replicas: GroupReference, gather: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    def gather_over_replicas(tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
        return gather(tensor, group=group or replicas())

    return gather_over_replicas


def _no() -> bool:
    return False
