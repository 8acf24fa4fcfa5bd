"""What the components of a hybrid cost, measured while they run."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from danon_lightning.attention.core import AttentionCore, observing
from danon_lightning.attention.kept_bytes import KeptBytes

__all__ = ["PerformanceStats", "monitoring"]


@dataclass
class PerformanceStats:
    """What was measured of each component, over all layers and all passes under the monitor.

    Attributes:
        computation_time: Seconds spent in the forward passes of a component.
        memory_usage: Most bytes that a forward pass of a component, in all layers together, has kept for its backward
            pass, beyond inputs and parameters; 0 without gradients, and where all is computed again.
        attention_distribution: Mean weight of a component in the output; over all components of a layer they add up to
            one, and layers without a component do not count.
        passes: Number of forward passes of the model.
    """

    computation_time: dict[str, float] = field(default_factory=dict)
    memory_usage: dict[str, int] = field(default_factory=dict)
    attention_distribution: dict[str, float] = field(default_factory=dict)
    passes: int = 0


@contextmanager
def monitoring(
    model: torch.nn.Module, hybrids: Sequence[AttentionCore], components: Sequence[Mapping[str, AttentionCore]]
) -> Iterator[PerformanceStats]:
    """Measure the components of each layer for the time of the context.

    On an accelerator each component is waited for before and after, which slows the model down.

    Args:
        model: The model that the layers belong to.
        hybrids: The core of each layer; ``component_weights`` is observed.
        components: Its components by name.

    Yields:
        The statistics, which grow with every forward pass.
    """
    stats = PerformanceStats()
    kept: dict[str, int] = {}
    running: dict[AttentionCore, tuple[float, KeptBytes | None]] = {}
    # Checkpointed activations are computed once more in the backward pass, which is not to be measured.
    in_forward = False
    shares: dict[str, list[float]] = {}

    def before(core: AttentionCore, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not in_forward:
            return
        _wait(args[0].device)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        # What is computed again is not kept, and has hooks of its own.
        recomputed = core.training and (core.config.gradient_checkpointing or core.config.memory_efficient)
        counter = None if recomputed else KeptBytes([*tensors, *core.parameters()])
        if counter is not None:
            counter.__enter__()
        running[core] = (time.perf_counter(), counter)

    def after_component(name: str, core: AttentionCore, args: tuple[Any, ...], output: Any) -> None:
        if core not in running:
            return
        started, counter = running.pop(core)
        if counter is not None:
            counter.__exit__(None, None, None)
        if output is None:
            # It has failed: nothing to tell.
            return
        _wait(args[0].device)
        kept[name] = kept.get(name, 0) + (0 if counter is None else counter.count)
        stats.computation_time[name] = stats.computation_time.get(name, 0.0) + time.perf_counter() - started

    with ExitStack() as stack:
        observed = stack.enter_context(observing(hybrids, ["component_weights"]))

        def before_pass(*_: Any) -> None:
            nonlocal in_forward
            in_forward = True
            kept.clear()

        def after_pass(model: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal in_forward
            in_forward = False
            if output is None:
                return
            stats.passes += 1
            for name, count in kept.items():
                stats.memory_usage[name] = max(stats.memory_usage.get(name, 0), count)
            for by_name, values in zip(components, observed, strict=True):
                weights = values["component_weights"]
                if weights is not None:
                    for name, share in zip(by_name, weights.detach().float().mean(dim=(0, 2, 3)).tolist(), strict=True):
                        shares.setdefault(name, []).append(share)
            stats.attention_distribution = {name: sum(parts) / len(parts) for name, parts in shares.items()}

        for by_name in components:
            for name, core in by_name.items():
                stack.callback(core.register_forward_pre_hook(before, with_kwargs=True).remove)
                # Also after an error, for else tensors would be counted, and kept, for ever.
                hook = core.register_forward_hook(partial(after_component, name), always_call=True)
                stack.callback(hook.remove)
        stack.callback(model.register_forward_pre_hook(before_pass).remove)
        stack.callback(model.register_forward_hook(after_pass, always_call=True).remove)
        yield stats


def _wait(device: torch.device) -> None:
    """Wait until an accelerator has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
