"""Random numbers that depend on step, micro-batch and block only, and so are the same for every cut."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

from danon_lightning.strategies.seeds import seed_from

# In the place of a block, for what is drawn before the first one.
HEAD = -1


def reseed(seed: int, micro_batch: int, block: int) -> None:
    """Seed the generators of torch (CPU, and the CUDA device in use), numpy and Python.

    Args:
        seed: That of the step: the same on all stages.
        micro_batch: Index of the micro-batch in the step.
        block: The block that has just been called, or :data:`HEAD`.
    """
    number = seed_from(seed, micro_batch, block)
    # torch.manual_seed formats a stack trace at every call where CUDA is not in use: a millisecond for each block.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)
    numpy.random.seed(number % 2**32)
    random.seed(number)


@contextmanager
def generators_restored(device: torch.device) -> Iterator[None]:
    """Restore the states of the generators at the end.

    Args:
        device: The one besides the CPU whose generator is used inside.
    """
    python, array, cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
