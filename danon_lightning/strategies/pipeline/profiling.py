"""How long the parts of a step take, measured in one process that holds the whole module."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from danon_lightning.strategies.pipeline.balance import Costs
from danon_lightning.strategies.pipeline.blocks import Blocks
from danon_lightning.strategies.pipeline.module_state import restored
from danon_lightning.strategies.pipeline.random_numbers import generators_restored
from danon_lightning.strategies.pipeline.torch_internals import calls_replaced

# The first run, which is slower, does not count.
_RUNS = 4


def measured_costs(root: nn.Module, blocks: Blocks, step: Callable[[], object], device: torch.device) -> Costs:
    """Run a step some times, and measure its forward pass. Backward passes are taken to follow it in proportion.

    Module and generators of random numbers stay as they are.

    Args:
        root: The module, all of it in this process.
        blocks: Its body.
        step: Runs the user's step on a micro-batch.
        device: Where it runs.

    Returns:
        In seconds, of each part the shortest. What happens between two blocks counts for the first of them.

    Raises:
        ValueError: If the step does not call all blocks, one after another.
    """
    runs = [_run(root, blocks, step, device) for _ in range(_RUNS)][1:]
    head, *per_block, tail = (min(parts) for parts in zip(*runs, strict=True))
    return Costs(head, tuple(per_block), tail)


def _run(root: nn.Module, blocks: Blocks, step: Callable[[], object], device: torch.device) -> list[float]:
    """The seconds of the head, of each block, and of the tail."""
    called: list[int] = []
    moments: list[float] = []
    left = 0.0

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def timed(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            called.append(index)
            moments.append(now())
            result = original(*args, **kwargs)
            left = now()
            return result

        return call

    with restored(root), generators_restored(device), torch.no_grad(), calls_replaced(blocks.modules, timed):
        begin = now()
        step()
        end = now()
    if called != list(range(len(blocks))):
        raise ValueError(f"the step calls blocks {called} of {blocks.name!r}: it must call each once, in their order")
    moments = [begin, *moments, left, end]
    return [after - before for before, after in zip(moments, moments[1:], strict=False)]
