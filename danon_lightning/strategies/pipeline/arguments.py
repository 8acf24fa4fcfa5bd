"""Whether the arguments for pipeline stages go together."""

from collections.abc import Sequence

from danon_lightning.strategies.pipeline.schedules import Schedule


def check_arguments(
    *,
    schedule: Schedule,
    pipeline_parallel_size: int,
    num_microbatches: int,
    stage_cut: str | Sequence[int],
    pipeline_placement: str,
    activation_checkpointing: bool | str,
    only_for_stages: dict[str, bool],
) -> None:
    """Refuse values out of range, and what does not go together.

    Args:
        schedule: The resolved one; the following are as users give them, but for ``num_microbatches="auto"``.
        pipeline_parallel_size: See ``DanonHybridStrategy``.
        num_microbatches: See there.
        stage_cut: See there.
        pipeline_placement: See there.
        activation_checkpointing: See there.
        only_for_stages: Further arguments that mean nothing without stages, by name, and whether they are set.

    Raises:
        ValueError: Naming argument, value and remedy.
    """
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches={num_microbatches} must be at least 1, or 'auto'")
    if activation_checkpointing not in (True, False, "offload"):
        raise ValueError(f"activation_checkpointing={activation_checkpointing!r} must be True, False or 'offload'")
    if pipeline_placement not in ("auto", "inside_nodes", "across_nodes"):
        raise ValueError(f"pipeline_placement={pipeline_placement!r} must be 'auto', 'inside_nodes' or 'across_nodes'")
    for_stages = {
        **only_for_stages,
        "stage_cut": stage_cut != "parameters",
        "pipeline_placement": pipeline_placement != "auto",
        "activation_checkpointing": bool(activation_checkpointing),
    }
    if pipeline_parallel_size == 1 and any(for_stages.values()):
        names = " and ".join(name for name, is_set in for_stages.items() if is_set)
        raise ValueError(f"{names} are for pipeline stages: set pipeline_parallel_size to 2 or more")
    if activation_checkpointing and schedule.splits_backward:
        raise ValueError(
            f"activation_checkpointing={activation_checkpointing!r} cannot be used with schedule={schedule.name!r}, "
            "which runs the backward pass of a layer in two parts: take '1f1b' or 'interleaved_1f1b'"
        )
    if isinstance(stage_cut, str):
        if stage_cut not in ("parameters", "measured"):
            raise ValueError(f"stage_cut={stage_cut!r} must be 'parameters', 'measured' or a list of layers")
    else:
        cut, stages = list(stage_cut), schedule.stages
        if len(cut) != stages - 1 or cut != sorted(set(cut)) or min(cut) < 1:
            raise ValueError(
                f"stage_cut={stage_cut!r} must give the first layers of stages 1 to {stages - 1}, ascending, or be "
                "'parameters' or 'measured'"
            )
