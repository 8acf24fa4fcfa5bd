"""A bounded store of tensors that counts what it does."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

__all__ = ["AttentionCache", "CacheStats", "CacheValue"]

CacheValue: TypeAlias = Tensor | tuple[Tensor, ...]
POLICIES = ("lru", "fifo", "lfu")


class CacheStats(NamedTuple):
    """What a cache has done since it was made or its statistics were reset.

    Attributes:
        hits: Calls of ``get`` that found their key.
        misses: Calls of ``get`` that did not.
        hit_rate: Hits over calls; 0 before the first call.
        entries: Entries held now.
        memory_usage: Bytes that these entries keep alive now.
        eviction_count: Entries removed to make room for others.
        expiration_count: Entries removed because of their age.
        average_access_time: Mean seconds that a call of ``get`` took, waiting for other threads included.
    """

    hits: int
    misses: int
    hit_rate: float
    entries: int
    memory_usage: int
    eviction_count: int
    expiration_count: int
    average_access_time: float


class _Entry(NamedTuple):
    value: CacheValue
    nbytes: int
    born: float


class AttentionCache:
    """Tensors by key, within limits of number, bytes and age; threads may share it.

    Values are held as they are, not copied. A view keeps the whole storage behind it alive, so that is what it counts;
    a storage that two entries share counts twice. A copy or a pickle of the cache has the same settings and no entries.

    Args:
        max_entries: Most entries held; ``None`` for no limit.
        max_bytes: Most bytes held; ``None`` for no limit.
        policy: Which entry makes room: ``"lru"``, the one read or written longest ago; ``"fifo"``, the one written
            first; ``"lfu"``, the one read least often since it was written, among equals the one used longest ago.
        ttl: Seconds after which an entry is gone; ``None`` for no limit.
        clock: Returns the time in seconds; never goes back.

    Raises:
        ValueError: If a limit is out of range or the policy is unknown.
    """

    def __init__(
        self,
        *,
        max_entries: int | None = 1024,
        max_bytes: int | None = None,
        policy: str = "lru",
        ttl: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start empty."""
        for name, limit in (("max_entries", max_entries), ("max_bytes", max_bytes)):
            if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
                raise ValueError(f"{name}={limit!r} must be an integer of at least 1, or None for no limit")
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} must be one of {', '.join(map(repr, POLICIES))}")
        if ttl is not None and not ttl > 0:
            raise ValueError(f"ttl={ttl!r} must be a positive number of seconds, or None for no limit")
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.policy = policy
        self.ttl = ttl
        self.clock = clock
        self._start()

    def get(self, key: Hashable) -> CacheValue | None:
        """Return the value of ``key``, or ``None`` if there is none or it is too old."""
        before = self.clock()
        with self._lock:
            self._expire()
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
            else:
                self._hits += 1
                self._use(key)
            self._access_time += self.clock() - before
        return None if entry is None else entry.value

    def put(self, key: Hashable, value: CacheValue) -> bool:
        """Store a value, in place of an earlier one of the same key; others make room where there is none.

        Args:
            key: Anything hashable.
            value: A tensor, or a tuple of tensors.

        Returns:
            Whether it was stored: ``False`` if it alone exceeds ``max_bytes``; the earlier value is gone all the same.

        Raises:
            TypeError: If the value is neither a tensor nor a tuple of tensors.
        """
        nbytes = _bytes_kept_alive(value)
        with self._lock:
            self._expire()
            if key in self._entries:
                self._remove(key)
            if self.max_bytes is not None and nbytes > self.max_bytes:
                return False
            while self._is_full(nbytes):
                self._remove(next(iter(self._ranks[min(self._ranks)])))
                self._evictions += 1
            self._entries[key] = _Entry(value, nbytes, self.clock())
            self._nbytes += nbytes
            self._place(key, 0)
        return True

    def clear(self) -> None:
        """Remove all entries; the statistics go on."""
        with self._lock:
            self._clear()

    def reset_stats(self) -> None:
        """Let the statistics start from zero; the entries stay."""
        with self._lock:
            self._reset_stats()

    def stats(self) -> CacheStats:
        """Return the statistics."""
        with self._lock:
            self._expire()
            calls = self._hits + self._misses
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                hit_rate=self._hits / max(1, calls),
                entries=len(self._entries),
                memory_usage=self._nbytes,
                eviction_count=self._evictions,
                expiration_count=self._expirations,
                average_access_time=self._access_time / max(1, calls),
            )

    def __len__(self) -> int:
        """Return the number of entries."""
        with self._lock:
            self._expire()
            return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        """Tell whether there is a value of ``key``; this counts neither as a use nor in the statistics."""
        with self._lock:
            self._expire()
            return key in self._entries

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings: a lock cannot be copied, and entries belong to one process."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, settings: dict[str, Any]) -> None:
        """Start empty with these settings."""
        self.__dict__.update(settings)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._clear()
        self._reset_stats()

    def _clear(self) -> None:
        # In the order of writing, which is that of age: what is too old is found at the front.
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        # Keys by rank, those of a rank in order; the first key of the lowest rank makes room. Only "lfu" has several
        # ranks, the numbers of reads.
        self._ranks: dict[int, OrderedDict[Hashable, None]] = {}
        self._rank_of: dict[Hashable, int] = {}
        self._nbytes = 0

    def _reset_stats(self) -> None:
        self._hits = self._misses = self._evictions = self._expirations = 0
        self._access_time = 0.0

    def _is_full(self, nbytes: int) -> bool:
        too_many = self.max_entries is not None and len(self._entries) >= self.max_entries
        return too_many or (self.max_bytes is not None and self._nbytes + nbytes > self.max_bytes)

    def _expire(self) -> None:
        if self.ttl is None:
            return
        now = self.clock()
        while self._entries and now - next(iter(self._entries.values())).born >= self.ttl:
            self._remove(next(iter(self._entries)))
            self._expirations += 1

    def _use(self, key: Hashable) -> None:
        if self.policy == "fifo":
            return
        rank = self._displace(key)
        self._place(key, rank + 1 if self.policy == "lfu" else rank)

    def _place(self, key: Hashable, rank: int) -> None:
        self._ranks.setdefault(rank, OrderedDict())[key] = None
        self._rank_of[key] = rank

    def _displace(self, key: Hashable) -> int:
        rank = self._rank_of.pop(key)
        del self._ranks[rank][key]
        if not self._ranks[rank]:
            del self._ranks[rank]
        return rank

    def _remove(self, key: Hashable) -> None:
        self._nbytes -= self._entries.pop(key).nbytes
        self._displace(key)


def _bytes_kept_alive(value: Any) -> int:
    """Return the bytes of the distinct storages behind a value, or raise if it is no tensor and no tuple of tensors."""
    tensors = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(f"value is of type {type(value).__name__}; it must be a tensor or a tuple of tensors")
    storages = {id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
