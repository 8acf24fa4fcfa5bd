"""What is decided at set-up: which layers each stage has, and which ranks are neighbours."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from danon_lightning.strategies.communication.compressors import Compressor, LinearCompressor
from danon_lightning.strategies.communication.layout import uses_two_levels
from danon_lightning.strategies.mesh import Mesh
from danon_lightning.strategies.pipeline.balance import Costs, balanced_cuts, parameter_costs
from danon_lightning.strategies.pipeline.batches import split_batch
from danon_lightning.strategies.pipeline.blocks import Blocks, find_blocks
from danon_lightning.strategies.pipeline.dry_run import dry_run
from danon_lightning.strategies.pipeline.ownership import find_owners
from danon_lightning.strategies.pipeline.placement import Traffic, gradient_bytes, traffic_between_nodes
from danon_lightning.strategies.pipeline.profiling import measured_costs
from danon_lightning.strategies.pipeline.recording import Cuts, Recording
from danon_lightning.strategies.pipeline.schedules import Schedule
from danon_lightning.strategies.pipeline.slots import find_slots
from danon_lightning.strategies.pipeline.trial import first_batch, trial_step


def blocks_for(module: pl.LightningModule, name: str | None, schedule: Schedule) -> Blocks:
    """The body of a module.

    Args:
        module: The module.
        name: What the body is called; None to find it.
        schedule: Of which each stage must get a block.

    Raises:
        ValueError: If there is none, or it has too few blocks.
    """
    blocks = find_blocks(module, name)
    if len(blocks) < schedule.stages:
        raise ValueError(
            f"{blocks.name!r} has {len(blocks)} layers, too few for {schedule.stages} stages "
            f"(pipeline_parallel_size={schedule.ranks}, {schedule.stages_per_rank} a rank)"
        )
    return blocks


def choose_cuts(
    module: pl.LightningModule,
    blocks: Blocks,
    stages: int,
    stage_cut: Literal["parameters", "measured"] | Sequence[int],
    num_microbatches: int,
    device: torch.device,
) -> tuple[Cuts, Costs | None]:
    """Where to cut a module. Collective if it is to be measured.

    Args:
        module: The module.
        blocks: Its body.
        stages: How many there are to be.
        stage_cut: As for ``DanonHybridStrategy``.
        num_microbatches: Of a batch.
        device: Where the module runs.

    Returns:
        The cuts, and what was measured for them, in seconds.

    Raises:
        ValueError: If cuts are given that do not fit, or it cannot be measured.
    """
    if not isinstance(stage_cut, str):
        return Cuts.checked((0, *stage_cut, len(blocks)), len(blocks)), None
    costs = None
    if stage_cut == "measured" and module.trainer.state.fn == TrainerFn.FITTING:
        costs = _measure(module, blocks, num_microbatches, device)
    return balanced_cuts(costs or parameter_costs(module, blocks), stages), costs


def _measure(module: pl.LightningModule, blocks: Blocks, num_microbatches: int, device: torch.device) -> Costs:
    """The mean over all ranks of what the parts of a training step cost, in seconds."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            "stage_cut='measured' needs the whole module on every rank, but configure_model makes a part on each: take "
            "'parameters', and after some steps the stage_cut that a warning names, if it does"
        )
    batch = first_batch(module.trainer, device)
    if batch is None:
        raise ValueError(
            "stage_cut='measured' needs a first batch that is not lost by looking at it, from a DataLoader of a "
            "dataset that is no IterableDataset: else take 'parameters'"
        )
    module.to(device)  # metrics too
    part = split_batch(batch, num_microbatches)[0][0]
    costs = measured_costs(module, blocks, trial_step(module.trainer, part), device)
    mean = torch.tensor([costs.head, *costs.blocks, costs.tail], dtype=torch.float64, device=device)
    dist.all_reduce(mean)
    head, *per_block, tail = (mean / dist.get_world_size()).tolist()
    return Costs(head, tuple(per_block), tail)


def belongs_across_nodes(
    module: pl.LightningModule,
    blocks: Blocks,
    cuts: Cuts,
    schedule: Schedule,
    mesh: Mesh,
    *,
    compressor: Compressor | LinearCompressor | None,
    hierarchical: bool | Literal["auto"],
    device: torch.device,
) -> bool:
    """Whether less would be sent from node to node if pipelines were across nodes, not inside them. Collective.

    Args:
        module: The module, perhaps without data.
        blocks: Its body.
        cuts: Where it is cut.
        schedule: Which rank of a pipeline has which stage.
        mesh: With pipelines inside nodes.
        compressor: What gradients are coded with.
        hierarchical: As for ``DanonHybridStrategy``.
        device: Where ranks communicate.
    """
    if 1 in (mesh.num_nodes, mesh.ranks_per_node, mesh.data_parallel_size):
        return False  # it makes no difference
    try:
        across = replace(mesh, pipelines_across_nodes=True)
        levels = [uses_two_levels(one, hierarchical) for one in (mesh, across)]
    except ValueError:
        return False  # they do not fit so
    found = torch.zeros(2, 2, dtype=torch.float64, device=device)
    recording = _first_recording(module, blocks, device) if not mesh.rank else None
    if recording is not None:
        for row, one, two_levels in zip(found, (mesh, across), levels, strict=True):
            traffic = _traffic(module, blocks, cuts, schedule, recording, one, compressor, two_levels)
            row.copy_(torch.tensor([traffic.gradients, traffic.activations]))
    dist.broadcast(found, 0)
    inside, outside = (Traffic(*row) for row in found.tolist())
    if not inside.total:
        return False
    is_less = outside.total < inside.total
    chosen, other = (outside, inside) if is_less else (inside, outside)
    rank_zero_info(
        f"pipelines are {'across' if is_less else 'inside'} nodes: a training step sends {chosen} from node to node. "
        f"The other way it would be {other}"
    )
    return is_less


def _first_recording(module: pl.LightningModule, blocks: Blocks, device: torch.device) -> Recording | None:
    """A dry run of the first batch; None if this, or what a step does with it, cannot be known yet."""
    batch = first_batch(module.trainer, device)
    if batch is None:
        return None
    try:
        return dry_run(module, blocks, trial_step(module.trainer, batch))
    except Exception:  # a step may need what hooks make later; if something else is wrong, training will say so
        return None


def _traffic(
    module: pl.LightningModule,
    blocks: Blocks,
    cuts: Cuts,
    schedule: Schedule,
    recording: Recording,
    mesh: Mesh,
    compressor: Compressor | LinearCompressor | None,
    two_levels: bool,
) -> Traffic:
    """What a placement costs."""
    nodes = mesh.data_parallel_size // mesh.replicas_per_node
    gradients = [0.0] * mesh.pipeline_parallel_size
    slots = find_slots(module)
    for name, stages in find_owners(module, blocks, cuts, [recording]).items():
        parameter = slots[name].get()
        if slots[name].is_parameter and parameter.requires_grad:
            gradients[schedule.rank_of(stages[0])] += gradient_bytes(parameter, compressor, nodes)
    entering = [recording.blocks[cuts.blocks_of(stage).start].arrives.values() for stage in range(1, cuts.stages)]
    sizes = [sum(one.meta.numel() * one.meta.element_size() for one in metas) for metas in entering]
    activations = [float(size * module.trainer.accumulate_grad_batches) for size in sizes]
    return traffic_between_nodes(mesh, schedule, gradients, activations, hierarchical=two_levels)
