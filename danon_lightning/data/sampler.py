"""A sampler and a loader whose order does not depend on the number of ranks and that resume within an epoch."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

__all__ = ["GlobalBatchSampler", "Order", "Position", "ResumableDataLoader", "check_divisible"]

Order: TypeAlias = Callable[[int, int, int], list[int]]
"""``order(epoch, begin, end)`` gives places ``begin`` to ``end`` of an epoch's order as dataset indices."""
Position: TypeAlias = Callable[[], int]
"""``position()`` gives how many batches the run has trained so far, over all epochs."""


class GlobalBatchSampler(DistributedSampler[int]):
    """Deals global batches out to data-parallel ranks.

    The batches of a run are numbered through: batch ``t`` is batch ``t % num_batches`` of epoch ``t // num_batches``,
    and batch ``b`` of an epoch is places ``b * global_batch_size`` to ``(b + 1) * global_batch_size`` of that epoch's
    order, for any number of ranks. Rank ``r`` of ``R`` takes the ``r``-th of ``R`` equal consecutive shares. An
    incomplete last batch is dropped, so that every rank has the same number of batches.

    It is a :class:`~torch.utils.data.distributed.DistributedSampler` so that Lightning keeps it and calls its
    ``set_epoch``.

    Args:
        order: The order of every epoch, see :data:`Order`.
        num_samples: Length of the order, the same in every epoch.
        global_batch_size: Samples of one batch over all data-parallel ranks.
        num_replicas: Number of data-parallel ranks.
        rank: This process's data-parallel rank.
        position: Where the run stands, see :data:`Position`. It is asked for when an iteration's first sample is drawn,
            and the iteration starts with the batch that follows. ``None``: with the first batch of the epoch that
            ``set_epoch`` has set.

    Raises:
        ValueError: If ``global_batch_size`` is not a positive multiple of ``num_replicas``, ``rank`` is not one of
            the ranks, or there is not one full batch.
    """

    def __init__(
        self,
        order: Order,
        *,
        num_samples: int,
        global_batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        position: Position | None = None,
    ) -> None:
        """Check the arguments; no order is computed yet."""
        check_divisible(global_batch_size, num_replicas)
        if num_samples < global_batch_size:
            raise ValueError(
                f"num_samples={num_samples} is less than one batch of global_batch_size={global_batch_size}; "
                "lower global_batch_size or give more samples"
            )
        self.num_batches = num_samples // global_batch_size
        self.global_batch_size = global_batch_size
        self.order = order
        self.position = position
        super().__init__(
            range(self.num_batches * global_batch_size),  # type: ignore[arg-type]  # only its length is used
            num_replicas=num_replicas,
            rank=rank,
            drop_last=True,
        )

    @property
    def local_batch_size(self) -> int:
        """Samples of one batch on this rank."""
        return self.global_batch_size // self.num_replicas

    @override
    def __iter__(self) -> Iterator[int]:
        """Yield this rank's dataset indices of ``num_batches`` batches, also when starting within an epoch.

        Whoever iterates stops at the end of the epoch. Lightning's epochs may end early (``limit_train_batches``) or,
        after some resumes, a batch late; the next iteration goes on from there.
        """
        first = self.epoch * self.num_batches if self.position is None else self.position()
        for number in range(first, first + self.num_batches):
            epoch, batch = divmod(number, self.num_batches)
            begin = batch * self.global_batch_size + self.rank * self.local_batch_size
            yield from self.order(epoch, begin, begin + self.local_batch_size)


class ResumableDataLoader(DataLoader[Tensor]):
    """A loader that starts where training stands, for a :class:`GlobalBatchSampler` that knows the position.

    Lightning iterates a loader while it still sets up, before it calls ``set_epoch``, and a plain loader with workers
    draws its first samples at that moment. This one begins when the first batch is asked for. Its length is always that
    of a whole epoch.

    It takes the arguments of :class:`~torch.utils.data.DataLoader`.
    """

    @override
    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        """Return an iterator that does nothing, and starts no worker, until its first batch is asked for."""
        return self._batches()

    def _batches(self) -> Iterator[Tensor]:
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return no state: the position is Lightning's own batch counter, which its checkpoints hold.

        The method and its counterpart tell Lightning that the loader resumes within an epoch.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that this loader can resume within an epoch.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            RuntimeError: If the sampler cannot know the position, because the loader was handed to the trainer without
                the data module it came from.
        """
        if getattr(self.sampler, "position", None) is None:
            raise RuntimeError(
                "this loader cannot resume within an epoch, because its data module is not attached to the trainer; "
                "call Trainer.fit(model, datamodule=...) in place of Trainer.fit(model, train_dataloaders=...)"
            )


def check_divisible(global_batch_size: int, num_replicas: int) -> None:
    """Check that a global batch can be dealt out evenly.

    Args:
        global_batch_size: Samples of one batch over all data-parallel ranks.
        num_replicas: Number of data-parallel ranks.

    Raises:
        ValueError: If it cannot; the message names the nearest sizes that can.
    """
    if global_batch_size > 0 and global_batch_size % num_replicas == 0:
        return
    below = global_batch_size // num_replicas * num_replicas
    valid = f"{below} or {below + num_replicas}" if below > 0 else f"{num_replicas}"
    raise ValueError(
        f"global_batch_size={global_batch_size} does not divide evenly among {num_replicas} data-parallel ranks; "
        f"change global_batch_size to {valid}, or the number of ranks"
    )
