"""From a module, a batch and a cluster to a ranked list of plans."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from danon_lightning.planner.cluster import Cluster
from danon_lightning.planner.layouts import DEFAULT_COMPRESSIONS, DEFAULT_SCHEDULES, enumerate_layouts
from danon_lightning.planner.plans import Plan
from danon_lightning.planner.prediction import Predictor
from danon_lightning.planner.profile import Profile
from danon_lightning.planner.profiling import measure, shares
from danon_lightning.strategies.communication import available_compressors
from danon_lightning.strategies.pipeline.schedules import resolve_schedule


def plan(
    module: pl.LightningModule,
    batch: Any,
    cluster: Cluster,
    *,
    batch_size: int | None = None,
    schedules: Sequence[str] = DEFAULT_SCHEDULES,
    compressions: Sequence[str | None] = DEFAULT_COMPRESSIONS,
    checkpointing: Sequence[bool] = (False, True),
    sharding: Sequence[bool] = (False, True),
    pipeline_layers: str | None = None,
    precision: Any = "32-true",
    accelerator: str = "cpu",
) -> list[Plan]:
    """How to train a module on a cluster, best first. No process is started, and the module stays as it is.

    Args:
        module: The module.
        batch: A batch, or a LightningDataModule whose first one is taken; None for that of the module's own loader.
        cluster: Where it is to be trained.
        batch_size: Samples of a step, of all replicas together; None for the size of the batch.
        schedules: For pipelines.
        compressions: What gradients may be coded with.
        checkpointing: Whether activation checkpointing is tried.
        sharding: Whether optimizer sharding is tried.
        pipeline_layers: As for ``DanonHybridStrategy``.
        precision: As for the Trainer.
        accelerator: What to measure on.

    Returns:
        Feasible plans by their time, then the others by their memory.

    Raises:
        ValueError: If an argument is unknown or out of range, or no layout of all ranks can take the batch.
    """
    profile = measure(
        module, batch, None if batch_size is None else shares(batch_size, cluster.world_size),
        ranks=cluster.world_size, pipeline_layers=pipeline_layers, precision=precision, accelerator=accelerator,
    )  # fmt: skip
    return plan_profile(
        profile, cluster, batch_size or profile.batch_samples, schedules=schedules, compressions=compressions,
        checkpointing=checkpointing, sharding=sharding, pipeline_layers=pipeline_layers,
    )  # fmt: skip


def plan_profile(
    profile: Profile,
    cluster: Cluster,
    batch_size: int,
    *,
    schedules: Sequence[str] = DEFAULT_SCHEDULES,
    compressions: Sequence[str | None] = DEFAULT_COMPRESSIONS,
    checkpointing: Sequence[bool] = (False, True),
    sharding: Sequence[bool] = (False, True),
    pipeline_layers: str | None = None,
) -> list[Plan]:
    """The same for a module that has been measured already.

    Raises:
        ValueError: See :func:`plan`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    for name in schedules:
        resolve_schedule(name, 1)
    for compression in compressions:
        if compression is not None and compression not in available_compressors():
            known = ", ".join(available_compressors())
            raise ValueError(f"compression={compression!r} must be None or one of {known}")
    links = cluster.links
    blocks = 0 if profile.blocks is None else len(profile.blocks)
    layouts = enumerate_layouts(
        links.nodes, links.ranks_per_node, batch_size, blocks,
        schedules=schedules, compressions=compressions, checkpointing=checkpointing, sharding=sharding,
    )  # fmt: skip
    predictor = Predictor(profile, cluster, batch_size, pipeline_layers=pipeline_layers)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        plans = [predictor.predict(layout) for layout in layouts]
    finally:
        torch.set_num_threads(threads)
    if not plans:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared out among {links.world_size} ranks: take a multiple of "
            f"{links.world_size}" + (f". (It cannot be cut into stages: {profile.no_pipeline})" if not blocks else "")
        )
    return sorted(
        plans, key=lambda one: (not one.is_feasible, one.step_seconds if one.is_feasible else one.memory.total)
    )
