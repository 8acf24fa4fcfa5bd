"""The account of what is bad: by storage, who is to blame for it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from danon_lightning.callbacks.nan_debugger.origin import Origin
from danon_lightning.callbacks.nan_debugger.sources import Sources
from danon_lightning.callbacks.nan_debugger.values import (
    StorageKey,
    bad_sample,
    badness,
    statistics_of,
    storages,
)

Blamed = frozenset[int]
NOBODY: Blamed = frozenset()


@dataclass(frozen=True)
class Candidate:
    """Something that may be to blame.

    Attributes:
        origin: What to report of it.
        meant: An infinity that was meant: a mask, a constant. To blame only if it reaches the loss as it is.
        received: It has come from another rank, which will report it.
    """

    origin: Origin
    meant: bool = False
    received: bool = False


@dataclass
class _Record:
    key: StorageKey  # held, so that no other storage gets the same
    blamed: Blamed = NOBODY
    unwritten: bool = False  # as a whole: some of it may have been


class Ledger:
    """Keeps candidates, in the order in which they came up, and which of them are to blame for what a storage holds."""

    def __init__(self, sources: Sources, batch_size: int | None) -> None:
        """Start with nothing.

        Args:
            sources: What was there before.
            batch_size: To tell samples apart.
        """
        self.candidates: list[Candidate] = []
        self._sources = sources
        self._batch_size = batch_size
        self._records: dict[int, _Record] = {}

    def add(self, candidate: Candidate) -> Blamed:
        """Add a candidate."""
        self.candidates.append(candidate)
        return frozenset((len(self.candidates) - 1,))

    def blame(self, tensor: Tensor, blamed: Blamed) -> None:
        """Note who is to blame for what an operation has written into a tensor."""
        for record in self._records_of(tensor):
            record.blamed |= blamed

    def note_written(self, tensor: Tensor) -> None:
        """Forget what was in a storage, if the tensor that was written is all of it."""
        size = tensor.numel() * tensor.element_size()
        for record in self._records_of(tensor, make=False):
            if record.key.size == size:
                record.blamed, record.unwritten = NOBODY, False

    def note_unwritten(self, tensor: Tensor) -> None:
        """Note that the memory of a tensor holds anything."""
        for record in self._records_of(tensor):
            record.blamed, record.unwritten = NOBODY, True

    def unwritten(self, tensor: Tensor) -> bool:
        """Whether what is bad in a tensor is what happened to be in its memory."""
        records = self._records_of(tensor, make=False)
        return any(one.unwritten and not one.blamed for one in records)

    def blamed(self, tensor: Tensor, describe: Callable[[], Origin]) -> Blamed:
        """Who is to blame for what is bad in a tensor.

        Args:
            tensor: Which is not finite.
            describe: Describes the operation that takes it, for values that were there before the step.
        """
        records = self._records_of(tensor, make=False)
        found = NOBODY.union(*(one.blamed for one in records))
        if found or any(one.unwritten for one in records):
            return found
        found = self.add(self._from_before(tensor, describe()))
        self.blame(tensor, found)
        return found

    def unmeant(self, blamed: Iterable[int]) -> Blamed:
        """Those of the candidates whose bad values were not meant."""
        return frozenset(one for one in blamed if not self.candidates[one].meant)

    def first(self, blamed: Iterable[int]) -> Origin | None:
        """The one to report of several: the first that was not meant; None if all has come from other ranks."""
        own = sorted(one for one in blamed if not self.candidates[one].received)
        chosen = next((one for one in own if not self.candidates[one].meant), own[0] if own else None)
        return None if chosen is None else self.candidates[chosen].origin

    def guess(self) -> Origin | None:
        """The first NaN, or else the first infinity that was not meant, whether it has reached anything or not."""
        known = [one.origin for one in self.candidates if not (one.meant or one.received)]
        known.sort(key=lambda one: one.output is None or one.output.nan_count == 0)
        return known[0] if known else None

    def _from_before(self, tensor: Tensor, origin: Origin) -> Candidate:
        source = self._sources.find(tensor)
        whole = tensor if source.tensor is None else source.tensor
        origin = replace(origin, inputs=(statistics_of(whole, source.name),), parameter=None, node="", forward_op="")
        meant = source.meant(tensor, nan=badness(tensor).nan)
        if source.kind == "input":
            return Candidate(
                replace(origin, cause="input", leaf=source.name, sample=bad_sample(whole, self._batch_size)), meant
            )
        note = "" if source.name else "a tensor from before the step that is neither in the batch nor in the module"
        return Candidate(replace(origin, cause="weight", parameter=source.name or None, sample=None, note=note), meant)

    def _records_of(self, tensor: Tensor, make: bool = True) -> Sequence[_Record]:
        keys = storages(tensor)
        if make:
            return [self._records.setdefault(key.key, _Record(key)) for key in keys]
        return [self._records[key.key] for key in keys if key.key in self._records]

    @staticmethod
    def is_same(one: Tensor, other: Tensor) -> bool:
        """Whether two tensors lie in the same memory."""
        keys = {key.key for key in storages(one)}
        return any(key.key in keys for key in storages(other))
