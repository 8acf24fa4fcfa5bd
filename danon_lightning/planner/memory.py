"""What a rank needs memory for."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from danon_lightning.planner.layouts import Layout
from danon_lightning.planner.profile import OptimizerCost, Part
from danon_lightning.planner.simulation import in_flight
from danon_lightning.strategies.communication.compressors import LinearCompressor, get_compressor
from danon_lightning.strategies.communication.cost_model import Levels
from danon_lightning.strategies.communication.messages import travels_dense
from danon_lightning.strategies.pipeline.orders import Action


@dataclass(frozen=True)
class Memory:
    """Bytes, at their most in a step.

    Attributes:
        parameters: Weights.
        gradients: Of them.
        optimizer: Its state.
        activations: What is kept for backward passes, and what passes need in between; what the optimizer or the
            exchange need after them, if that is more.
        communication: What compression remembers.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    communication: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.communication


def activation_bytes(
    order: Sequence[Action], stages: dict[int, Sequence[Part]], samples: float, layout: Layout
) -> float:
    """What a rank keeps for backward passes at most, with what one pass needs besides.

    Args:
        order: What it does.
        stages: The parts that each of its stages runs.
        samples: Of a micro-batch.
        layout: Which schedule, and whether with checkpointing.
    """
    kept = {stage: sum(_kept(part, samples, layout) for part in parts) for stage, parts in stages.items()}
    alone = max(_one_pass(parts, samples, layout) - kept[stage] for stage, parts in stages.items())
    splits = layout.pipeline > 1 and layout.resolved().splits_backward
    return in_flight(order, lambda stage: kept[stage], splits_backward=splits) + alone


def _one_pass(parts: Sequence[Part], samples: float, layout: Layout) -> float:
    """The peak of one micro-batch alone."""
    peak = before = 0.0
    for part in parts:
        peak = max(peak, before + part.forward_peak(samples), before + part.backward_peak(samples))
        before += _kept(part, samples, layout)
    return max(peak, before)


def _kept(part: Part, samples: float, layout: Layout) -> float:
    if layout.checkpointing and part.is_block:
        return min(part.entering(samples), part.kept(samples))
    return part.kept(samples)


def communication_bytes(parameters: Sequence[tuple[str, Tensor]], layout: Layout, levels: Levels) -> float:
    """What compression remembers from step to step.

    Args:
        parameters: Those of the rank that are trained.
        layout: With or without a pipeline, and the compression.
        levels: Of the exchange.
    """
    if layout.data == 1:
        return 0.0
    compressor = get_compressor(layout.compression)
    if compressor is None or not compressor.needs_error_feedback:
        return 0.0
    coded = 4.0 * sum(p.numel() for _, p in parameters if not travels_dense(p, compressor))
    # What is left out, and a second buffer for the step under way; on the sending side, and for sums that are coded
    # again on the other.
    residual = 2 * coded / levels.inner
    if not isinstance(compressor, LinearCompressor) and compressor.exchange == "reduce":
        residual += 2 * coded / (levels.inner * levels.outer)
    return residual


def shard_numel(parameters: Sequence[tuple[str, Tensor]], replicas: int) -> int:
    """How many numbers the replica with most has, if each parameter goes to the one that has least so far."""
    sizes = [0] * replicas
    for _, parameter in parameters:
        sizes[sizes.index(min(sizes))] += parameter.numel()
    return max(sizes)


def rank_memory(
    parameters: Sequence[tuple[str, Tensor]],
    optimizer: OptimizerCost,
    activations: float,
    layout: Layout,
    levels: Levels,
    bucket_bytes: int,
) -> Memory:
    """What a rank needs that holds these parameters.

    Args:
        parameters: By name.
        optimizer: What it remembers of each number.
        activations: See :func:`activation_bytes`.
        layout: How the model is spread.
        levels: Of the exchange of gradients.
        bucket_bytes: Size of its buckets.
    """
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    numel = sum(parameter.numel() for _, parameter in trained)
    remembered = shard_numel(trained, layout.data) if layout.sharding else numel
    communication = communication_bytes(trained, layout, levels)
    temporary = optimizer.temporary_bytes_per_element * remembered
    # With stages, gradients are copied to one bucket after another; without, they live in the buckets.
    copied = float(min(bucket_bytes, sum(p.nbytes for _, p in trained))) if layout.pipeline > 1 < layout.data else 0.0
    # Activations are gone when gradients are exchanged and the optimizer moves.
    return Memory(
        parameters=float(sum(parameter.nbytes for _, parameter in parameters)),
        gradients=float(sum(parameter.nbytes for _, parameter in trained)),
        optimizer=optimizer.state_bytes_per_element * remembered,
        activations=max(activations, copied, temporary),
        communication=communication,
    )
