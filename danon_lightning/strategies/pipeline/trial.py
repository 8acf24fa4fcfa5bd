"""A training step on trial, at set-up: the first batch, and what runs a step on it."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils.data import DataLoader, IterableDataset

from danon_lightning.strategies.pipeline.logged import captured
from danon_lightning.strategies.pipeline.random_numbers import generators_restored


def first_batch(trainer: pl.Trainer, device: torch.device) -> Any:
    """The first samples of the training data, as a batch. Samplers and generators of random numbers stay as they are.

    Args:
        trainer: About to fit.
        device: Where the batch is to be.

    Returns:
        None where samples cannot be had without being lost: they must have numbers, as in a list of batches, or in a
        ``DataLoader`` of a dataset that is no ``IterableDataset``.
    """
    module = trainer.lightning_module
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        return None
    with generators_restored(device):
        loader = source.dataloader()
        if isinstance(loader, DataLoader):
            if isinstance(loader.dataset, IterableDataset):
                return None
            size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
            if size is None:
                return None
            samples = [loader.dataset[index] for index in range(min(size, len(loader.dataset)))]  # type: ignore[arg-type]
            batch = loader.collate_fn(samples)
        elif isinstance(loader, Sequence) and len(loader):
            batch = loader[0]
        else:
            return None
        batch = trainer.precision_plugin.convert_input(batch)
        return module._apply_batch_transfer_handler(batch, device=device)


def trial_step(trainer: pl.Trainer, batch: Any) -> Callable[[], Any]:
    """Runs ``training_step``, which logs nothing.

    Args:
        trainer: Whose module it is.
        batch: For the step.
    """
    module = trainer.lightning_module
    has_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    def step() -> Any:
        with captured(module, None), trainer.precision_plugin.train_step_context():
            return module.training_step(batch, *([0] if has_index else []))

    return step
