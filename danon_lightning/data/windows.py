"""Windows of a mapped byte corpus, and the order in which they are visited."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from danon_lightning.data.corpus import Corpus
from danon_lightning.data.permutation import permuted, random_keys

__all__ = [
    "ORDER_VERSION",
    "ByteWindows",
    "check_lengths",
    "num_train_windows",
    "num_val_windows",
    "train_window_starts",
    "val_window_starts",
]

ORDER_VERSION = 1
"""Raised whenever the order of samples for given settings changes; a checkpoint of another version is refused."""

_ROUNDS = 8


class ByteWindows(Dataset[Tensor]):
    """Every stretch of ``context_length + 1`` bytes of a file, indexed by the position of its first byte.

    The file is mapped into memory on first use, in each process; nothing is read before it is asked for.

    Args:
        path: A file of bytes.
        num_bytes: Its length.
        context_length: Length of a model's input, in bytes.
    """

    def __init__(self, path: Path, num_bytes: int, context_length: int) -> None:
        """Keep the arguments; the file is not opened yet."""
        self.path = path
        self.num_bytes = num_bytes
        self.context_length = context_length
        self._bytes: np.memmap[Any, np.dtype[np.uint8]] | None = None

    def __len__(self) -> int:
        """Return the number of positions at which a window can start."""
        return max(0, self.num_bytes - self.context_length)

    @override
    def __getitem__(self, start: int) -> Tensor:
        """Return one window.

        Args:
            start: Position of the first byte.

        Returns:
            Byte values 0 to 255, int64, ``[context_length + 1]``.

        Raises:
            IndexError: If the window does not lie within the file.
        """
        if not 0 <= start < len(self):
            raise IndexError(f"a window of {self.context_length + 1} bytes at {start} is not within {self.num_bytes}")
        if self._bytes is None:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r", shape=(self.num_bytes,))
        return torch.from_numpy(self._bytes[start : start + self.context_length + 1].astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapping out: pickled for a spawned worker, it would turn into a copy of the whole file."""
        return {**self.__dict__, "_bytes": None}


def num_train_windows(num_bytes: int, context_length: int) -> int:
    """Return how many training windows an epoch has, which is the same for every epoch.

    Args:
        num_bytes: Length of the training part.
        context_length: Length of a model's input, in bytes.
    """
    # One window less than fits: it leaves room for every offset.
    return max(0, num_bytes // context_length - 1)


def num_val_windows(num_bytes: int, context_length: int) -> int:
    """Return how many windows a validation part has.

    Args:
        num_bytes: Length of the validation part.
        context_length: Length of a model's input, in bytes.
    """
    return max(0, (num_bytes - 1) // context_length)


def train_window_starts(
    begin: int, end: int, *, num_bytes: int, context_length: int, seed: int, epoch: int
) -> list[int]:
    """Return a stretch of an epoch's order of training windows, as positions of first bytes.

    Windows begin ``context_length`` bytes apart, so that within an epoch no byte is a target twice; a window's last
    byte, a target only, is the next one's first, an input only. Where the first window begins changes from epoch to
    epoch, and with it all borders between windows.

    Args:
        begin: First place in the order.
        end: Place after the last one; at most ``num_train_windows(num_bytes, context_length)``.
        num_bytes: Length of the training part.
        context_length: Length of a model's input, in bytes.
        seed: Seed of the order.
        epoch: Number of the epoch, from 0.

    Returns:
        ``end - begin`` positions.
    """
    keys = random_keys(f"order {seed} {epoch}", _ROUNDS + 1)
    offset = int(keys[0] % np.uint64(context_length))
    indices = permuted(begin, end, size=num_train_windows(num_bytes, context_length), keys=keys[1:])
    return [offset + context_length * index for index in indices]


def val_window_starts(begin: int, end: int, *, num_bytes: int, context_length: int, num_windows: int) -> list[int]:
    """Return a stretch of the validation windows, as positions of first bytes: evenly spread and never shuffled.

    Args:
        begin: First window.
        end: Window after the last one; at most ``num_windows``.
        num_bytes: Length of the validation part.
        context_length: Length of a model's input, in bytes.
        num_windows: How many windows to spread over the part; at most ``num_val_windows(num_bytes, context_length)``.

    Returns:
        ``end - begin`` positions.
    """
    available = num_val_windows(num_bytes, context_length)
    return [index * available // num_windows * context_length for index in range(begin, end)]


def check_lengths(corpus: Corpus, *, context_length: int, global_batch_size: int, val_fraction: float) -> None:
    """Check that both parts of a corpus give at least one global batch.

    Args:
        corpus: The corpus.
        context_length: Length of a model's input, in bytes.
        global_batch_size: Windows of one batch over all data-parallel ranks.
        val_fraction: The share held out for validation, for the message.

    Raises:
        ValueError: If a part is too short; the message says which numbers to change, and to what.
    """
    parts = (
        ("training", corpus.train_bytes, num_train_windows, 1, "lower"),
        ("validation", corpus.val_bytes, num_val_windows, 0, "raise"),
    )
    for name, num_bytes, count, spare, direction in parts:
        remedy = f"give more text through path, or {direction} val_fraction={val_fraction}"
        if num_bytes < context_length + 1:
            left_out = f" ({corpus.skipped_files} files were left out as not text)" if corpus.skipped_files else ""
            raise ValueError(
                f"the {name} part has {num_bytes} bytes{left_out}, less than the {context_length + 1} of one window "
                f"of context_length={context_length}; lower context_length, {remedy}"
            )
        windows = count(num_bytes, context_length)
        if windows < global_batch_size:
            smaller = f"set global_batch_size to at most {windows}, " if windows else ""
            # The longest context that gives enough windows, from the formulas of the two counts.
            longest = (num_bytes - 1 + spare) // (global_batch_size + spare)
            shorter = f"set context_length to at most {longest}, " if longest else ""
            raise ValueError(
                f"the {name} part has {num_bytes} bytes and so {windows} windows of context_length={context_length}, "
                f"less than one batch of global_batch_size={global_batch_size}; {smaller}{shorter}{remedy}"
            )
