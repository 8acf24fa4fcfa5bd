"""Which stages hold which parameters and buffers: those that use them."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from danon_lightning.strategies.pipeline.blocks import Blocks
from danon_lightning.strategies.pipeline.recording import Cuts, Recording, position_of
from danon_lightning.strategies.pipeline.slots import blocks_of_slots, find_slots


def find_owners(
    root: nn.Module, blocks: Blocks, cuts: Cuts, recordings: Iterable[Recording]
) -> dict[str, tuple[int, ...]]:
    """Find the stages that hold each parameter and buffer.

    A tensor belongs to the stage where it is used, one of a block always to that of the block. What is used on several
    stages (tied embeddings) is held by all of them. Where the tail could not be followed, the last stage holds all that
    it may need. Buffers outside of blocks (positions, tables) are held by all stages, since each runs the head.

    Args:
        root: The module.
        blocks: Its blocks.
        cuts: Where it is cut.
        recordings: Dry runs, for instance of training and of validation.

    Returns:
        The stages in ascending order, by first full name. The first of those that use a buffer keeps it up to date; it
        comes first.
    """
    slots = find_slots(root)
    of_blocks = blocks_of_slots(slots, blocks.modules)
    recordings = list(recordings)
    last = cuts.stages - 1
    owners: dict[str, tuple[int, ...]] = {}
    for name, slot in slots.items():
        positions = {position_of(block) for block in of_blocks.get(name, ())}
        for recording in recordings:
            positions |= recording.uses.get(name, frozenset())
        stages = {cuts.stage_at(position) for position in positions}
        if name not in of_blocks and any(_may_use_unseen(r, bool(stages)) for r in recordings):
            stages.add(last)
        # What has not been used so far may be yet (by another kind of step, or in a later epoch), and who knows where.
        users = sorted(stages) or list(range(cuts.stages))
        if slot.is_parameter or name in of_blocks:
            owners[name] = tuple(users)
        else:
            owners[name] = (users[0], *(stage for stage in range(cuts.stages) if stage != users[0]))
    return owners


def owners_before_use(root: nn.Module, blocks: Blocks, cuts: Cuts) -> dict[str, tuple[int, ...]]:
    """The stages that hold each parameter and buffer as long as no step has been seen.

    Args:
        root: The module.
        blocks: Its blocks.
        cuts: Where it is cut.

    Returns:
        As :func:`find_owners` does: for what is in blocks their stages, for all else every stage.
    """
    slots = find_slots(root)
    of_blocks = blocks_of_slots(slots, blocks.modules)
    every = tuple(range(cuts.stages))
    return {
        name: tuple(sorted({cuts.stage_of_block(block) for block in of_blocks[name]})) if name in of_blocks else every
        for name in slots
    }


def _may_use_unseen(recording: Recording, seen: bool) -> bool:
    """Whether the tail may use a parameter without this having been recorded."""
    return recording.tail_problem is not None or (recording.tail_reads and not seen)


def shared(owners: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """What several stages hold: the gradients of these parameters are to be added up."""
    return {name: tuple(stages) for name, stages in owners.items() if len(stages) > 1}
