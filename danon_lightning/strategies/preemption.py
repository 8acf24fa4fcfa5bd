"""A checkpoint at a signal, as SLURM sends it before it takes the nodes away: on all ranks before the same batch."""

from types import FrameType

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment


class PostponedRequeue:
    """Does what Lightning does at the signal, but where all ranks are at the same point.

    A signal finds each rank somewhere else: one in the middle of a step, another already in the next one. To write a
    checkpoint they must talk to each other, and it must be of one step.
    """

    def __init__(self, trainer: pl.Trainer, device: torch.device) -> None:
        """Put a note in the place of Lightning's handler, which is registered after this.

        Args:
            trainer: About to fit.
            device: Where ranks communicate.
        """
        self._connector = connector = trainer._signal_connector
        self._device = device
        self._handle = type(connector)._slurm_sigusr_handler_fn.__get__(connector)
        self._signal, self._is_done = 0, False
        connector._slurm_sigusr_handler_fn = self._note  # type: ignore[method-assign]

    def end(self) -> None:
        """Give Lightning its handler back, for what the trainer does next."""
        vars(self._connector).pop("_slurm_sigusr_handler_fn", None)

    @staticmethod
    def is_wanted(trainer: pl.Trainer) -> bool:
        """Whether the job is one that SLURM would start again."""
        environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        return isinstance(environment, SLURMEnvironment) and environment.auto_requeue

    def _note(self, signum: int, _: FrameType | None) -> None:
        self._signal = int(signum)

    def check(self) -> None:
        """Write the checkpoint if any rank has got the signal, but only once: some may get it later. Collective."""
        if self._is_done:
            return
        signum = torch.tensor(self._signal, device=self._device)
        if dist.is_initialized():
            dist.all_reduce(signum, dist.ReduceOp.MAX)
        if int(signum):
            self._is_done = True
            self._handle(int(signum), None)
