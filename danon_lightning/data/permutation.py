"""Pseudo-random permutations whose every place can be computed by itself.

A permutation of any size costs no memory, and no time at the start of an epoch or of a resumed run. It depends on no
library's random generator, so that an upgrade cannot change it.
"""

import hashlib
import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["UInt64Array", "permuted", "random_keys"]

UInt64Array: TypeAlias = npt.NDArray[np.uint64]


def permuted(begin: int, end: int, *, size: int, keys: UInt64Array) -> list[int]:
    """Return places ``begin`` to ``end`` of a pseudo-random permutation of ``range(size)``.

    A generalised Feistel network permutes a grid of rows and columns that has ``size`` cells, or a few more. A value
    beyond the range is sent through again until it is inside, which permutes the range itself.

    Args:
        begin: First place.
        end: Place after the last one; at most ``size``.
        size: Length of the permutation, at least 1.
        keys: uint64 ``[rounds]``, rounds being even; other keys give another permutation.

    Returns:
        ``end - begin`` different numbers of ``range(size)``.

    Reference:
        Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002.
    """
    num_rows = math.isqrt(size - 1) + 1 if size > 1 else 1
    rows, columns = np.uint64(num_rows), np.uint64(-(-size // num_rows))
    values = np.arange(begin, end, dtype=np.uint64)
    outside = np.ones(len(values), dtype=np.bool_)
    while outside.any():
        row, column = values[outside] // columns, values[outside] % columns
        for row_key, column_key in zip(keys[::2], keys[1::2], strict=True):
            # Each line can be undone, since what is added depends on the other coordinate alone.
            row = (row + _mixed(column ^ row_key) % rows) % rows
            column = (column + _mixed(row ^ column_key) % columns) % columns
        values[outside] = row * columns + column
        outside = values >= np.uint64(size)
    return [int(value) for value in values]


def random_keys(text: str, count: int) -> UInt64Array:
    """Derive numbers from a text, the same ones on every machine.

    Args:
        text: Any text.
        count: How many.

    Returns:
        uint64 ``[count]``.
    """
    digest = hashlib.shake_128(text.encode()).digest(8 * count)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mixed(values: UInt64Array) -> UInt64Array:
    """Spread every input bit over all 64 output bits (the finaliser of SplitMix64; arithmetic is modulo 2**64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
