import pickle
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from danon_lightning.data.corpus import Corpus
from danon_lightning.data.permutation import permuted, random_keys
from danon_lightning.data.windows import (
    ByteWindows,
    check_lengths,
    num_train_windows,
    num_val_windows,
    train_window_starts,
    val_window_starts,
)


@pytest.mark.parametrize("size", [*range(1, 40), 1000, 4097])
def test_permutation_is_one(size: int):
    keys = random_keys("any", 8)
    whole = permuted(0, size, size=size, keys=keys)
    assert sorted(whole) == list(range(size))
    middle = size // 3
    assert permuted(middle, size, size=size, keys=keys) == whole[middle:]
    assert permuted(middle, middle, size=size, keys=keys) == []


def test_permutation_never_changes():
    # Checkpoints rely on it. Whoever changes the order raises ORDER_VERSION.
    keys = random_keys("order 0 0", 8)
    assert permuted(0, 8, size=1000, keys=keys) == [100, 123, 395, 182, 374, 465, 314, 239]
    assert permuted(10**12, 10**12 + 2, size=10**12 + 5, keys=keys) == [561703092551, 947614829052]


def test_permutation_looks_random():
    size, epochs = 20, 2000
    at = torch.zeros(size, size)
    for epoch in range(epochs):
        for place, value in enumerate(permuted(0, size, size=size, keys=random_keys(f"epoch {epoch}", 8))):
            at[place, value] += 1
    expected = epochs / size
    chi_square = ((at - expected) ** 2 / expected).sum() / (size - 1) ** 2
    assert 0.8 < chi_square < 1.25


@pytest.mark.parametrize(("num_bytes", "context"), [(1000, 7), (1001, 7), (1006, 7), (64, 8), (20, 10), (500, 1)])
def test_train_windows(num_bytes: int, context: int):
    count = num_train_windows(num_bytes, context)
    orders = [
        train_window_starts(0, count, num_bytes=num_bytes, context_length=context, seed=3, epoch=epoch)
        for epoch in range(30)
    ]
    for starts in orders:
        assert len(starts) == count
        # Next to each other without a gap: no byte is a target twice.
        assert all(after - before == context for before, after in pairwise(sorted(starts)))
        assert min(starts) >= 0 and max(starts) + context + 1 <= num_bytes
    if context > 1:
        assert len({min(starts) % context for starts in orders}) > 1
    if count > 3:
        assert len({tuple(starts) for starts in orders}) == 30


def test_order_depends_on_seed_and_epoch_alone():
    def starts(seed: int, epoch: int) -> list[int]:
        random.seed(seed * epoch)
        torch.manual_seed(epoch)
        return train_window_starts(0, 50, num_bytes=5000, context_length=16, seed=seed, epoch=epoch)

    assert starts(0, 1) == starts(0, 1)
    # Runs with neighbouring seeds must not share epochs, as with seed + epoch.
    assert len({tuple(starts(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_val_windows_are_spread_out():
    assert num_val_windows(81, 8) == 10
    assert num_val_windows(80, 8) == 9
    assert val_window_starts(0, 10, num_bytes=81, context_length=8, num_windows=10) == list(range(0, 80, 8))
    starts = val_window_starts(0, 4, num_bytes=8001, context_length=8, num_windows=4)
    assert starts == [0, 2000, 4000, 6000]
    assert val_window_starts(2, 4, num_bytes=8001, context_length=8, num_windows=4) == starts[2:]


def test_dataset_maps_and_does_not_load(tmp_path: Path):
    path = tmp_path / "large.bin"
    size = 1 << 34
    # A hole of 16 GiB with a few bytes behind it: reading it whole would take far more memory than there is.
    with open(path, "wb") as stream:
        stream.seek(size - 3)
        stream.write(b"abc")
    dataset = ByteWindows(path, size, context_length=4)
    assert len(dataset) == size - 4
    window = dataset[size - 5]
    assert window.dtype == torch.int64
    assert window.tolist() == [0, 0, *b"abc"]
    for outside in (-1, size - 4):
        with pytest.raises(IndexError, match=f"a window of 5 bytes at {outside} is not within {size}"):
            dataset[outside]
    # Spawned workers get the dataset by pickle, without the content.
    packed = pickle.dumps(dataset)
    assert len(packed) < 1000
    assert pickle.loads(packed)[size - 5].tolist() == window.tolist()


def _check(train_bytes: int, val_bytes: int, skipped: int = 0) -> None:
    corpus = Corpus(Path(), train_bytes, val_bytes, 1, 1, skipped, "digest")
    check_lengths(corpus, context_length=10, global_batch_size=4, val_fraction=0.1)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((0, 99), "the training part has 0 bytes, less than the 11 of one window of context_length=10; lower"),
        ((10, 99), "the training part has 10 bytes, less than the 11 of one window"),
        ((99, 10), r"the validation part has 10 bytes, less .* give more text through path, or raise val_fraction=0.1"),
        ((49, 99), r"49 bytes and so 3 windows of context_length=10, less than one batch of global_batch_size=4; set "
                   r"global_batch_size to at most 3, set context_length to at most 9, .* or lower val_fraction=0.1"),
        ((99, 40), r"the validation part has 40 bytes and so 3 windows .* set context_length to at most 9, "),
        ((11, 99), r"has 11 bytes and so 0 windows of context_length=10, less .*=4; set context_length to at most 2, "),
        ((9, 9, 7), r"the training part has 9 bytes \(7 files were left out as not text\), less than"),
    ],
)  # fmt: skip
def test_too_short(lengths: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        _check(*lengths)


def test_just_long_enough():
    _check(50, 41)
    # The limits that the messages name are exact.
    for num_bytes, longest in ((49, 9), (11, 2)):
        assert num_train_windows(num_bytes, longest) >= 4 > num_train_windows(num_bytes, longest + 1)
    assert num_val_windows(40, 9) >= 4 > num_val_windows(40, 10)
