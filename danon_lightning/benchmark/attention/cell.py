"""Measures one contender at one length in one direction, in a process of its own."""

import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from danon_lightning.benchmark.attention.contenders import Shape, contenders
from danon_lightning.benchmark.attention.inputs import Inputs
from danon_lightning.benchmark.attention.memory import PeakMemory, limit_memory
from danon_lightning.benchmark.workers import Tell

# Loads what the first run of a kernel loads, and is over soon.
_WARM_UP_LENGTH = 256
# Short runs are repeated for so many seconds in all, as single ones say little.
_LEAST_SECONDS = 0.2


@dataclass(frozen=True)
class CellPlan:
    """What to measure.

    Attributes:
        contender: Its name.
        shape: What it is built for.
        repeats: Runs, of which the median counts; fewer where the budget ends, more where they are short.
        budget: Seconds after which no further run begins.
        memory_limit: Bytes that it may have beyond the inputs, on CPU; None for no limit.
        modules: Modules that register variants.
    """

    contender: str
    shape: Shape
    repeats: int
    budget: float
    memory_limit: int | None
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        seconds: Median run: time of the processor on CPU, of the clock on CUDA.
        best_seconds: Shortest run.
        runs: Their number.
        peak_bytes: Most memory during the first run, beyond inputs and parameters.
        input_bytes: Size of the inputs.
    """

    seconds: float
    best_seconds: float
    runs: int
    peak_bytes: int
    input_bytes: int


def measure_cell(plan: CellPlan, tell: Tell) -> Measurement:
    """Measure it; nothing else must have run in this process."""
    prepare_process(plan.shape.device, plan.modules)
    shape = plan.shape
    built = contenders()[plan.contender].build(shape)

    def inputs_of(length: int) -> Inputs:
        return Inputs.random(length, heads=shape.heads, head_dim=shape.head_dim, device=shape.device)

    inputs = inputs_of(shape.length)
    step = _step(built.run, built.parameters, shape.direction, inputs)
    if built.any_length:
        _step(built.run, built.parameters, shape.direction, inputs_of(min(shape.length, _WARM_UP_LENGTH)))()
    else:
        step()
    if plan.memory_limit is not None and shape.device == "cpu":
        limit_memory(plan.memory_limit)
    peak = PeakMemory(shape.device)
    seconds = [_timed(step, shape.device)]
    peak_bytes = peak.grown()
    while (len(seconds) < plan.repeats or sum(seconds) < _LEAST_SECONDS) and sum(seconds) + seconds[-1] <= plan.budget:
        seconds.append(_timed(step, shape.device))
    return Measurement(statistics.median(seconds), min(seconds), len(seconds), peak_bytes, inputs.num_bytes)


def prepare_process(device: str, modules: tuple[str, ...]) -> None:
    """Make a fresh process ready to measure: one thread, all variants, and no words that nobody would see."""
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    for module in modules:
        importlib.import_module(module)


def clock(device: str) -> float:
    """Seconds of this process's processor time, or, on CUDA, of a clock that has waited for the device."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _timed(step: Callable[[], None], device: str) -> float:
    start = clock(device)
    step()
    return clock(device) - start


def _step(
    run: Callable[[Inputs], torch.Tensor],
    parameters: tuple[torch.nn.Parameter, ...],
    direction: str,
    inputs: Inputs,
) -> Callable[[], None]:
    """One run: forward without a graph, or forward and the gradients of all inputs and parameters."""

    def forward() -> None:
        with torch.no_grad():
            run(inputs)

    if direction == "forward":
        return forward
    sources = [tensor.requires_grad_() for tensor in inputs.tensors] + list(parameters)
    gradient = torch.randn_like(inputs.q)

    def both() -> None:
        torch.autograd.grad(run(inputs), sources, gradient, allow_unused=True)

    return both
