"""The micro-batches of the optimizer step under way, kept so that they can be run again."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from danon_lightning.callbacks.nan_debugger.random_state import RandomState

# Of what is bad in a batch, as many samples are named.
_SAMPLES = 8


@dataclass
class MicroBatch:
    """One call of ``training_step``.

    Attributes:
        batch: What it was given: the tensors themselves in containers of its own, so that a step may take things out.
        batch_idx: Its index.
        random: The generators before the step.
        number: Which batch of the optimizer step it is, from 0.
        losses: Of its backward passes, on the device.
        versions: How often each tensor had been written to.
    """

    batch: Any
    batch_idx: int
    random: RandomState | None
    number: int
    losses: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def is_changed(self) -> bool:
        """Whether the step has written to the tensors of its batch, so that it cannot be run again as it was."""
        return self.versions != _versions(self.batch)


class StepBatches:
    """The micro-batches since the last optimizer step.

    Args:
        most: How many are kept at most: with manual optimization there may be no steps at all.
    """

    def __init__(self, most: int = 64) -> None:
        """See the class."""
        self._most = most
        self._batches: list[MicroBatch] = []
        self._count = 0

    def __iter__(self) -> Iterator[MicroBatch]:
        """Oldest first."""
        return iter(self._batches)

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._batches)

    @property
    def count(self) -> int:
        """How many there were, including those that are not kept."""
        return self._count

    def add(self, batch: Any, batch_idx: int, random: RandomState | None) -> None:
        """Note that a step begins."""
        own = tree_map(lambda leaf: leaf, batch)
        self._batches.append(MicroBatch(own, batch_idx, random, self._count, versions=_versions(own)))
        self._count += 1
        del self._batches[: -self._most]

    def add_loss(self, loss: Tensor) -> None:
        """Note a loss of the present step. It stays on its device."""
        if self._batches:
            self._batches[-1].losses.append(loss.detach())

    def losses(self) -> list[Tensor]:
        """Of all steps that are kept."""
        return [loss for one in self._batches for loss in one.losses]

    def clear_losses(self) -> None:
        """Begin anew with the same batches: the optimizer has made a step, and another one follows."""
        for one in self._batches:
            one.losses.clear()

    def clear(self) -> None:
        """Let go of all batches."""
        self._batches.clear()
        self._count = 0


@dataclass(frozen=True)
class BadLeaf:
    """A tensor of a batch that is not finite.

    Attributes:
        path: Where it is, such as ``batch["x"]``.
        nan: How many elements are NaN.
        inf: How many are infinite; as in a mask, they may be meant.
        samples: Which samples hold them, at most eight; empty where all do, or where there is but one.
    """

    path: str
    nan: int
    inf: int
    samples: tuple[int, ...] = ()

    def __str__(self) -> str:
        """In plain words."""
        counts = [f"{count} {name}" for count, name in ((self.nan, "NaN"), (self.inf, "infinite")) if count]
        where = f" in sample {', '.join(map(str, self.samples))}" if self.samples else ""
        return f"{self.path} has {' and '.join(counts)} values{where}"


def floating_leaves(batch: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a batch that can hold NaN, by their path."""
    leaves, _ = tree_flatten_with_path(batch)
    return [
        (f"batch{keystr(path)}", leaf)
        for path, leaf in leaves
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    ]


def bad_leaves(batch: Any) -> list[BadLeaf]:
    """What is not finite in a batch. Reads from the device: for when something is wrong."""
    found = []
    for path, leaf in floating_leaves(batch):
        nan, inf = torch.isnan(leaf), torch.isinf(leaf)
        counts = int(nan.sum()), int(inf.sum())
        if any(counts):
            found.append(BadLeaf(path, *counts, samples=_samples(nan if counts[0] else inf)))
    return found


def _samples(bad: Tensor) -> tuple[int, ...]:
    if bad.dim() == 0 or bad.shape[0] < 2:
        return ()
    which = bad.flatten(1).any(1) if bad.dim() > 1 else bad
    samples = which.nonzero().flatten().tolist()
    return () if len(samples) == bad.shape[0] else tuple(samples[:_SAMPLES])


def _versions(batch: Any) -> list[int]:
    leaves, _ = tree_flatten_with_path(batch)
    return [leaf._version for _, leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
