"""Process groups of some of the ranks."""

import weakref
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist


def own_group(
    groups: Sequence[list[int]], rank: int, backend: str | None, timeout: timedelta | None
) -> tuple[list[int], dist.ProcessGroup | None]:
    """Create process groups, and return that of this rank. Collective: every rank takes part in the creation of all.

    Args:
        groups: Global ranks, each in one of them.
        rank: This rank.
        backend: What moves the data; None for what the default group uses.
        timeout: How long an operation may take; None for torch's default.

    Returns:
        The ranks of the group, and the group itself; None for a single rank.
    """
    mine = None
    for ranks in groups:
        group = dist.new_group(ranks, backend=backend, timeout=timeout) if len(ranks) > 1 else None
        if rank in ranks:
            mine = ranks, group
    assert mine is not None
    return mine


class GroupReference:
    """A process group, for as long as torch.distributed has it.

    For whatever may live until the process ends. A group that is held then keeps gloo's threads running, and such a
    thread aborts the process if it has a tensor of Python's to give back while the interpreter shuts down.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Refer to a group.

        Args:
            group: Made by ``dist.new_group``, which keeps it until ``dist.destroy_process_group``.
        """
        self._group = weakref.ref(group)

    def __call__(self) -> dist.ProcessGroup:
        """The group.

        Raises:
            RuntimeError: If it has been destroyed.
        """
        group = self._group()
        if group is None:
            raise RuntimeError("the process group has been destroyed: the pipeline cannot be used any more")
        return group
