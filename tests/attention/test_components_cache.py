"""The bounded store of tensors."""

import copy
import pickle
import sys
import threading

import pytest
import torch

from danon_lightning.attention.components import AttentionCache


class Clock:
    """Moves on by ``step`` with every look at it."""

    def __init__(self, step: float = 0.0) -> None:
        self.now = 100.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def value(number: float, elements: int = 4) -> torch.Tensor:
    return torch.full((elements,), float(number))


def fill(cache: AttentionCache, keys: str) -> None:
    for key in keys:
        cache.put(key, value(ord(key)))


def held(cache: AttentionCache, keys: str = "abcdefg") -> str:
    return "".join(key for key in keys if key in cache)


def test_values_come_back():
    cache = AttentionCache()
    one, pair = value(1), (value(2), value(3))
    assert cache.put("one", one) and cache.put(("a", 2), pair)
    assert cache.get("one") is one and cache.get(("a", 2)) is pair
    assert cache.get("other") is None
    assert len(cache) == 2 and "one" in cache and "other" not in cache
    cache.clear()
    assert len(cache) == 0 and cache.get("one") is None and cache.stats().memory_usage == 0


@pytest.mark.parametrize(
    ("policy", "left"),
    # a is read three times, then c, then b; d and e come in one after the other.
    [("lru", "bde"), ("fifo", "cde"), ("lfu", "abe")],
)
def test_policies_choose_who_makes_room(policy, left):
    cache = AttentionCache(max_entries=3, policy=policy)
    fill(cache, "abc")
    for key in "aaacb":
        assert cache.get(key) is not None
    if policy == "lfu":
        # One read each for b and c: of these c was used longer ago. Then d, never read, makes room for e.
        fill(cache, "d")
        assert held(cache) == "abd"
        fill(cache, "e")
    else:
        fill(cache, "de")
    assert held(cache) == left
    assert cache.stats().eviction_count == 2


def test_what_is_written_again_is_new():
    for policy in ("lru", "fifo", "lfu"):
        cache = AttentionCache(max_entries=2, policy=policy)
        fill(cache, "ab")
        cache.put("a", value(7))
        assert len(cache) == 2 and cache.get("a")[0] == 7
        assert cache.stats().eviction_count == 0
    fill(cache := AttentionCache(max_entries=2, policy="fifo"), "aba")
    fill(cache, "c")
    assert held(cache) == "ac"


def test_bytes_are_limited():
    cache = AttentionCache(max_entries=None, max_bytes=100)
    for number in range(5):
        assert cache.put(number, value(number, elements=8))  # 32 bytes
        assert cache.stats().memory_usage == 32 * min(3, number + 1) <= 100
    assert [number in cache for number in range(5)] == [False, False, True, True, True]
    assert cache.put("large", value(0, elements=20)) and len(cache) == 1
    assert cache.stats().eviction_count == 2 + 3
    assert not cache.put("large", value(0, elements=26))
    assert "large" not in cache and cache.stats().memory_usage == 0


def test_bytes_are_those_kept_alive():
    cache = AttentionCache()
    whole = torch.zeros(1000)
    cache.put("view", whole[:2])
    assert cache.stats().memory_usage == 4000
    cache.put("view", (whole[:2], whole[5:], torch.zeros(3, dtype=torch.int8)))
    assert cache.stats().memory_usage == 4003


@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu"])
def test_entries_grow_old(policy):
    clock = Clock()
    cache = AttentionCache(ttl=10.0, clock=clock, policy=policy)
    fill(cache, "ab")
    clock.now += 6
    fill(cache, "cb")
    assert cache.get("a") is not None
    clock.now += 3.9
    assert held(cache) == "abc"
    clock.now += 0.1
    assert held(cache) == "bc" and cache.get("a") is None and len(cache) == 2
    assert cache.stats().expiration_count == 1 and cache.stats().eviction_count == 0
    clock.now += 100
    assert cache.stats().memory_usage == 0


def test_statistics_are_measured():
    cache = AttentionCache(clock=Clock(step=0.5))
    assert cache.stats()[:3] == (0, 0, 0.0) and cache.stats().average_access_time == 0
    fill(cache, "a")
    for key in "aab":
        cache.get(key)
    assert "b" not in cache
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.memory_usage) == (2, 1, 1, 16)
    assert stats.hit_rate == pytest.approx(2 / 3)
    assert stats.average_access_time == 0.5  # from one look at the clock to the next
    cache.reset_stats()
    assert cache.stats().hits == 0 and len(cache) == 1


def test_threads_share_it():
    cache = AttentionCache(max_entries=8, max_bytes=8 * 16)
    failures = []

    def work(seed: int) -> None:
        for step in range(500):
            key = (seed * 7 + step * 3) % 16
            found = cache.get(key)
            if found is not None and not (found == key).all():
                failures.append(key)
            cache.put(key, value(key))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    stats = cache.stats()
    assert not failures
    assert stats.hits + stats.misses == 8 * 500 and 0 < stats.hits
    assert stats.entries == 8 and stats.memory_usage == 8 * 16


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_has_the_settings_and_no_entries(duplicate):
    cache = AttentionCache(max_entries=2, policy="fifo", ttl=1e9)
    fill(cache, "ab")
    other = duplicate(cache)
    assert (other.max_entries, other.policy, other.ttl, len(other)) == (2, "fifo", 1e9, 0)
    fill(other, "abc")
    assert held(other) == "bc" and held(cache) == "ab"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_entries": 0}, "max_entries=0 must be an integer of at least 1, or None"),
        ({"max_entries": True}, "max_entries=True"),
        ({"max_bytes": 1.5}, "max_bytes=1.5"),
        ({"policy": "random"}, "policy='random' must be one of 'lru', 'fifo', 'lfu'"),
        ({"ttl": 0}, "ttl=0 must be a positive number of seconds"),
        ({"ttl": float("nan")}, "ttl=nan"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionCache(**settings)


@pytest.mark.parametrize("wrong", ["text", [torch.zeros(1)], (torch.zeros(1), 2), None])
def test_only_tensors_are_stored(wrong):
    cache = AttentionCache()
    with pytest.raises(TypeError, match="must be a tensor or a tuple of tensors"):
        cache.put("a", wrong)
    assert len(cache) == 0
