"""The tasks: batches to train on, batches to evaluate on, and what is measured on them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from danon_lightning.benchmark.recall.mqar import IGNORED, MQAR
from danon_lightning.data import ByteTextDataModule, GlobalBatchSampler

# Every run is evaluated on the same data, whatever its seed.
_EVALUATION_SEED = 7
# Data must not be drawn from the state that weights are drawn from.
_DATA_SEED = 1000
_MQAR_SEQUENCES = 128
_TEXT_WINDOWS = 64
BYTES = 256

# Tokens and labels [b, n], int64; labels that do not count are IGNORED.
Batch = tuple[Tensor, Tensor]


class Data(ABC):
    """Batches of one run.

    Attributes:
        vocabulary: Number of tokens.
    """

    vocabulary: int

    @abstractmethod
    def training(self) -> Iterator[Batch]:
        """Batches without end."""

    @abstractmethod
    def evaluation(self) -> list[Batch]:
        """Batches to evaluate on, the same for every run."""

    @abstractmethod
    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is measured of each label that counts, a vector; its mean over all of them is the figure."""


class MQARData(Data):
    """Multi-query associative recall; the figure is the share of queries that are answered.

    Args:
        task: The task.
        batch: Sequences of a batch.
        seed: Seed of the training data.
    """

    def __init__(self, task: MQAR, batch: int, seed: int) -> None:
        """Keep the arguments."""
        self.task = task
        self.size = batch
        self.seed = seed
        self.vocabulary = task.vocabulary

    def training(self) -> Iterator[Batch]:
        """Fresh sequences at each step."""
        random = torch.Generator().manual_seed(_DATA_SEED + self.seed)
        while True:
            yield self.task.batch(self.size, random)

    def evaluation(self) -> list[Batch]:
        """A few batches."""
        random = torch.Generator().manual_seed(_EVALUATION_SEED)
        return [self.task.batch(self.size, random) for _ in range(-(-_MQAR_SEQUENCES // self.size))]

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """One where the answer is right, zero elsewhere."""
        asked = labels != IGNORED
        return (logits[asked].argmax(-1) == labels[asked]).float()


class TextData(Data):
    """Bytes of the sources of Python's standard library; the figure is bits a byte on files held out.

    Args:
        length: Bytes of a window.
        batch: Windows of a batch.
        seed: Seed of their order.
    """

    def __init__(self, length: int, batch: int, seed: int) -> None:
        """Open the text, building its cache if it is not there."""
        windows = -(-_TEXT_WINDOWS // batch) * batch
        self.module = ByteTextDataModule(context_length=length, global_batch_size=batch, val_windows=windows, seed=seed)
        self.module.setup("fit")
        self.vocabulary = BYTES

    def training(self) -> Iterator[Batch]:
        """Windows in random order, epoch by epoch."""
        for epoch in count():
            loader = self.module.train_dataloader()
            assert isinstance(loader.sampler, GlobalBatchSampler)
            loader.sampler.set_epoch(epoch)
            for window in loader:
                yield window[:, :-1], window[:, 1:]

    def evaluation(self) -> list[Batch]:
        """Windows spread evenly over the files held out."""
        return [(window[:, :-1], window[:, 1:]) for window in self.module.val_dataloader()]

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Bits of each byte."""
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none") / math.log(2)
