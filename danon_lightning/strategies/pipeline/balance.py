"""Where to cut a pipeline, so that no stage has much more to do than the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table
from torch import Tensor, nn

from danon_lightning.strategies.pipeline.blocks import Blocks
from danon_lightning.strategies.pipeline.recording import Cuts
from danon_lightning.strategies.pipeline.schedules import Schedule
from danon_lightning.strategies.pipeline.slots import blocks_of_slots, find_slots

# By how much the slowest stage may exceed the average before other cuts are looked for.
_UNEVEN = 1.1


@dataclass(frozen=True)
class Costs:
    """What the parts of a step cost, in any one unit.

    Attributes:
        head: What comes before the blocks.
        blocks: Each block.
        tail: What comes after them.
    """

    head: float
    blocks: tuple[float, ...]
    tail: float

    def of_stage(self, cuts: Cuts, stage: int) -> float:
        """The cost of a stage."""
        cost = sum(self.blocks[index] for index in cuts.blocks_of(stage))
        return cost + self.head * (stage == 0) + self.tail * (stage == cuts.stages - 1)


def parameter_costs(root: nn.Module, blocks: Blocks, of: Callable[[Tensor], float] = Tensor.numel) -> Costs:
    """The numbers of parameters, or something else of each of them.

    Those outside of blocks count as head or tail, depending on whether they are registered before the blocks or after
    them; a tied one counts as both, where it is in both.
    """
    slots = {name: slot for name, slot in find_slots(root).items() if slot.is_parameter}
    of_blocks = blocks_of_slots(slots, blocks.modules)
    order = [name for name, _ in root.named_parameters(remove_duplicate=False)]
    inside = [order.index(name) for name in of_blocks]
    first = min(inside, default=0)
    head = tail = 0.0
    per_block = [0.0] * len(blocks)
    for name, slot in slots.items():
        cost = of(slot.get())
        for index in of_blocks.get(name, ()):
            per_block[index] += cost
        if name not in of_blocks:
            places = {order.index(other) < first for other in slot.names}
            head += cost * (True in places)
            tail += cost * (False in places)
    return Costs(head, tuple(per_block), tail)


def balanced_cuts(costs: Costs, stages: int) -> Cuts:
    """The cuts whose most expensive stage is the cheapest; each stage has a block at least.

    Of equally good ones, those whose stages are the most alike: with the smallest sum of squares.

    Raises:
        ValueError: If there are fewer blocks than stages.
    """
    count = len(costs.blocks)
    if count < stages:
        raise ValueError(f"{count} blocks cannot be cut into {stages} stages")
    sums = [0.0]
    for cost in costs.blocks:
        sums.append(sums[-1] + cost)

    def cost_of(stage: int, start: int, stop: int) -> float:
        ends = costs.head * (stage == 0) + costs.tail * (stage == stages - 1)
        return sums[stop] - sums[start] + ends

    # best[stop]: the cheapest way to put the blocks before ``stop`` into the stages so far, and its bounds.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for stage in range(stages):
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for start, (largest, squares, bounds) in best.items():
            for stop in range(start + 1, count - (stages - 1 - stage) + 1):
                cost = cost_of(stage, start, stop)
                candidate = max(largest, cost), squares + cost * cost, (*bounds, stop)
                if stop not in following or candidate < following[stop]:
                    following[stop] = candidate
        best = following
    return Cuts.checked(best[count][2], count)


def suggested_cuts(parts: Costs, cuts: Cuts, seconds: Sequence[float]) -> Cuts | None:
    """Better cuts, after a step has been measured.

    Args:
        parts: What time is taken to follow inside a stage.
        cuts: What was measured.
        seconds: How long each stage has been at work in the step.

    Returns:
        None if the slowest stage takes no more than a tenth longer than they do on average, or nothing else promises
        to be better.
    """
    slowest = max(seconds)
    if slowest * len(seconds) <= _UNEVEN * sum(seconds):
        return None
    rates = [took / (parts.of_stage(cuts, stage) or 1.0) for stage, took in enumerate(seconds)]
    blocks = [cost * rates[cuts.stage_of_block(index)] for index, cost in enumerate(parts.blocks)]
    times = Costs(parts.head * rates[0], tuple(blocks), parts.tail * rates[-1])
    better = balanced_cuts(times, cuts.stages)
    promised = max(times.of_stage(better, stage) for stage in range(cuts.stages))
    return better if promised * _UNEVEN < slowest else None


def cut_table(root: nn.Module, blocks: Blocks, schedule: Schedule, cuts: Cuts, costs: Costs | None) -> Table:
    """Which rank has what, for the start of a run.

    Args:
        root: The module.
        blocks: Its body.
        schedule: Which rank has which stage.
        cuts: Which blocks each stage has.
        costs: What was measured, in seconds; None if nothing was: numbers of parameters are all that is known then.
    """
    numels, sizes = parameter_costs(root, blocks), parameter_costs(root, blocks, _bytes_with_gradient)
    table = Table("stage", "rank", "layers", "parameters", "memory", "cost", title=f"pipeline stages of {blocks.name}")
    known = costs or numels
    total = sum(known.of_stage(cuts, stage) for stage in range(cuts.stages)) or 1.0
    for stage in range(cuts.stages):
        own = cuts.blocks_of(stage)
        ends = ["what comes before"] * (stage == 0) + ["what comes after"] * (stage == cuts.stages - 1)
        layers = str(own.start) if len(own) == 1 else f"{own.start}–{own.stop - 1}"
        table.add_row(
            str(stage),
            str(schedule.rank_of(stage)),
            ", ".join([layers, *ends]),
            f"{numels.of_stage(cuts, stage):,.0f}",
            f"{sizes.of_stage(cuts, stage) / (1 << 20):,.1f} MiB",
            f"{known.of_stage(cuts, stage) / total:.0%}",
        )
    shares = "number of parameters" if costs is None else "measured time"
    table.caption = f"memory: of parameters and their gradients; cost: share of the {shares}"
    return table


def _bytes_with_gradient(parameter: Tensor) -> float:
    return parameter.numel() * parameter.element_size() * (1 + parameter.requires_grad)
