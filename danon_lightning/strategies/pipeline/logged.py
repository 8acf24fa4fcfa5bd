"""What a step logs: known to the last stage alone, and logged by all ranks."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from danon_lightning.strategies.pipeline.batches import weighted_mean
from danon_lightning.strategies.pipeline.errors import UnsupportedStepError, user_location

_SIGNATURE = inspect.signature(pl.LightningModule.log)
_COMBINED: dict[str, Callable[[Sequence[float]], float]] = {"sum": sum, "max": max, "min": min}


@dataclass
class _Call:
    value: Any
    options: dict[str, Any]
    of_batch: Any = None  # what a metric has given for the micro-batch alone


@dataclass
class Logged:
    """The calls of ``self.log`` in a step, by micro-batch and name."""

    calls: dict[int, dict[str, _Call]] = field(default_factory=dict)
    _current: int = 0

    def begin(self, index: int) -> None:
        """Begin with a micro-batch, and forget what an earlier run (of an earlier stage, say) has logged for it."""
        self._current = index
        self.calls[index] = {}

    def note(self, name: str, value: Any, options: dict[str, Any]) -> None:
        """Note a call for the micro-batch that was begun last."""
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"self.log({name!r}, ...) takes one number, but was given {value.numel()}")
            value = value.detach()
        self.calls[self._current][name] = _Call(value, options, getattr(value, "_forward_cache", None))

    def combined(self, weights: Sequence[float], metrics: dict[int, str]) -> list[dict[str, Any]]:
        """What would have been logged for the whole batch, as plain data.

        Args:
            weights: By how much each micro-batch counts in means.
            metrics: Where the module has which metric, by its ``id``.

        Returns:
            For each name its value, the other arguments, and for a metric where the module has it; then the value is
            that of this batch.
        """
        names = dict.fromkeys(name for index in sorted(self.calls) for name in self.calls[index])
        return [self._combine(name, weights, metrics) for name in names]

    def _combine(self, name: str, by_index: Sequence[float], metrics: dict[int, str]) -> dict[str, Any]:
        found = [(self.calls[at][name], by) for at, by in enumerate(by_index) if name in self.calls.get(at, ())]
        given, weights = [call for call, _ in found], [weight for _, weight in found]
        options = dict(given[-1].options)
        if options.get("batch_size") is not None:
            options["batch_size"] = sum(int(call.options["batch_size"]) for call in given)
        reduction = options.get("reduce_fx", "mean")
        if callable(reduction):
            reduction = options["reduce_fx"] = reduction.__name__
        metric = given[0].value
        if isinstance(metric, Metric):
            path = options.get("metric_attribute") or metrics.get(id(metric))
            if path is None:
                raise UnsupportedStepError(
                    f"self.log({name!r}, ...) was given a {type(metric).__name__} that is no attribute of the "
                    "LightningModule: other ranks cannot find it. Assign it to self in __init__"
                )
            options["metric_attribute"] = path
            known = [call.of_batch for call in given if isinstance(call.of_batch, Tensor)]
            of_batch = None
            if len(known) == len(given):
                of_batch = number_of(weighted_mean([float(one) for one in known], weights), known[0])
            return {"name": name, "metric": path, "value": of_batch, "options": options}
        numbers = [float(call.value) for call in given]
        if reduction in _COMBINED:
            number = _COMBINED[reduction](numbers)
        elif reduction == "mean":
            number = weighted_mean(numbers, weights)
        else:
            raise UnsupportedStepError(
                f"self.log({name!r}, reduce_fx={reduction!r}) cannot be combined over micro-batches: 'mean', 'sum', "
                "'max' and 'min' can"
            )
        return {"name": name, "value": number_of(number, given[0].value), "options": options}


@contextmanager
def captured(module: pl.LightningModule, logged: Logged | None) -> Iterator[None]:
    """Have a module note what it logs; with None, have it keep silent, as it must where the values are absent."""

    def log(*args: Any, **kwargs: Any) -> None:
        arguments = _SIGNATURE.bind(module, *args, **kwargs).arguments
        options = {key: option for key, option in arguments.items() if key not in ("self", "name", "value")}
        if logged is None:
            return
        if options.get("enable_graph"):
            raise UnsupportedStepError(
                f"self.log(enable_graph=True) at {user_location()}: with pipeline stages a graph cannot be kept"
            )
        logged.note(arguments["name"], arguments["value"], options)

    before = module.__dict__.get("log")
    module.__dict__["log"] = log
    try:
        yield
    finally:
        del module.__dict__["log"]
        if before is not None:
            module.__dict__["log"] = before


def replay(module: pl.LightningModule, combined: Sequence[dict[str, Any]]) -> None:
    """Log for real what :meth:`Logged.combined` has returned, on every rank."""
    for one in combined:
        number = None if one["value"] is None else tensor_of(one["value"], module.device)
        value: Any = number
        if "metric" in one:
            value = module.get_submodule(one["metric"])
            value._forward_cache = number
        module.log(one["name"], value, **one["options"])


def number_of(number: float, like: object) -> tuple[float, str]:
    """A number as plain data, with the dtype of what it was made from, or of plain numbers."""
    dtype = torch.get_default_dtype()
    if isinstance(like, Tensor):
        dtype = torch.promote_types(like.dtype, dtype)
    return number, str(dtype).removeprefix("torch.")


def tensor_of(number: Sequence[Any], device: torch.device) -> Tensor:
    """What :func:`number_of` has described, as a tensor."""
    value, dtype = number
    return torch.tensor(value, dtype=getattr(torch, dtype), device=device)
