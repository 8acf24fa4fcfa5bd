"""Measures how the streaming state of a variant grows with the tokens it has seen, in a process of its own."""

from dataclasses import dataclass
from typing import Any

import torch

from danon_lightning.attention import map_state
from danon_lightning.benchmark.attention.cell import clock, prepare_process
from danon_lightning.benchmark.attention.inputs import Inputs
from danon_lightning.benchmark.attention.memory import PeakMemory, limit_memory
from danon_lightning.benchmark.attention.settings import build_core
from danon_lightning.benchmark.workers import Tell

# Tokens that are fed at once.
PIECE = 1024


@dataclass(frozen=True)
class StreamPlan:
    """What to measure.

    Attributes:
        label: The variant, as in the settings.
        lengths: Numbers of tokens after which to look at the state, rising.
        heads: Heads H.
        head_dim: Width d of a head.
        device: "cpu" or "cuda".
        budget: Seconds after which it is left at that.
        memory_limit: Bytes that it may have, on CPU; None for no limit.
        modules: Modules that register variants.
    """

    label: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    device: str
    budget: float
    memory_limit: int | None
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class StreamPoint:
    """The state after some tokens.

    Attributes:
        length: Number of tokens.
        state_bytes: Size of the state.
        peak_bytes: Most memory so far beyond that before the first token, inputs of a piece included.
        seconds: Time so far.
    """

    length: int
    state_bytes: int
    peak_bytes: int
    seconds: float


def measure_stream(plan: StreamPlan, tell: Tell) -> list[StreamPoint]:
    """Feed random tokens piece by piece, and tell and return the points that were reached in time."""
    prepare_process(plan.device, plan.modules)
    core = build_core(plan.label, heads=plan.heads, head_dim=plan.head_dim, length=max(plan.lengths)).to(plan.device)
    core.eval()
    if plan.memory_limit is not None and plan.device == "cpu":
        limit_memory(plan.memory_limit)
    points: list[StreamPoint] = []
    seen, seconds = 0, 0.0
    with torch.no_grad():
        state = core.init_state(1, device=torch.device(plan.device), dtype=torch.float32)
        peak = PeakMemory(plan.device)
        for length in plan.lengths:
            while seen < length and seconds <= plan.budget:
                piece = min(PIECE, length - seen)
                inputs = Inputs.random(piece, heads=plan.heads, head_dim=plan.head_dim, device=plan.device, seed=seen)
                start = clock(plan.device)
                _, new_state = core(inputs.x, inputs.q, inputs.k, inputs.v, state=state)
                seconds += clock(plan.device) - start
                assert new_state is not None
                state, seen = new_state, seen + piece
            if seen < length:
                break
            points.append(StreamPoint(length, state_bytes(state), peak.grown(), seconds))
            tell(points[-1])
    return points


def state_bytes(state: Any) -> int:
    """Bytes that the tensors of a state keep alive: whole storages, each counted once."""
    storages: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    map_state(count, state)
    return sum(storages.values())
