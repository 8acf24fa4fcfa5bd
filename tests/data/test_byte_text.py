from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from danon_lightning.data import ByteTextDataModule


def _set_up(**arguments) -> ByteTextDataModule:
    module = ByteTextDataModule(**arguments)
    module.prepare_data()
    module.setup("fit")
    return module


def test_standard_library(own_cache: Path):
    module = _set_up(num_workers=0)
    batch = next(iter(module.train_dataloader()))
    assert batch.dtype == torch.int64 and batch.shape == (16, 513)
    assert 0 <= batch.min() and batch.max() <= 255
    # Mostly printable: this is text.
    assert ((batch >= 32) & (batch < 127)).float().mean() > 0.8
    assert len(module.val_dataloader()) == 256 // 16
    assert next(iter(module.val_dataloader())).shape == (16, 513)
    assert len(list(own_cache.iterdir())) == 1
    facts = module.describe()
    assert facts["source"].startswith("Python 3.")
    assert facts["batches per epoch"] == f"{len(module.train_dataloader()):,}"


def test_describe(random_file: Callable[[int], Path], folder: Path):
    path = random_file(10_000)
    module = _set_up(path=path, context_length=16, global_batch_size=4, val_windows=None)
    assert module.describe() == {
        "source": f"{path} (1 file, split by position)",
        "training": "9.0 kB, 561 windows",
        "validation": "1.0 kB, 60 windows used",
        "context": "16 bytes",
        "global batch": "4 windows",
        "batches per epoch": "140",
    }
    (folder / "image.png").write_bytes(b"\0")
    module = _set_up(path=str(folder), context_length=16, global_batch_size=4, val_fraction=0.3)
    assert module.describe()["source"] == f"{folder} (30 + 10 files, 1 left out as not text)"


def test_batches_are_the_text(random_file: Callable[[int], Path]):
    path = random_file(5000)
    text = path.read_bytes()
    module = _set_up(path=path, context_length=20, global_batch_size=4)
    train, val = ([bytes(row.tolist()) for batch in loader for row in batch]
                  for loader in (module.train_dataloader(), module.val_dataloader()))  # fmt: skip
    # Random bytes: every window is at one place only. The first nine tenths are for training.
    train_starts, val_starts = sorted(map(text.index, train)), [text.index(window) for window in val]
    assert len(set(train_starts)) == len(train) == 224 // 4 * 4
    assert train_starts[-1] + 21 <= 4500
    assert val_starts == [4500 + 20 * index for index in range(24)]


def test_train_and_validation_share_no_file(folder: Path):
    module = _set_up(path=folder, context_length=8, global_batch_size=1, val_fraction=0.3, val_windows=None)
    assert module._corpus is not None
    parts = [path.read_bytes().split(b"\0") for path in (module._corpus.train_path, module._corpus.val_path)]
    assert sorted(parts[0] + parts[1]) == sorted(path.read_bytes() for path in folder.rglob("*.txt"))
    assert not set(parts[0]) & set(parts[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_are_deterministic(random_file: Callable[[int], Path], num_workers: int):
    path = random_file(2000)

    def epochs(seed: int) -> list[torch.Tensor]:
        module = _set_up(path=path, context_length=16, global_batch_size=4, seed=seed, num_workers=num_workers)
        loader = module.train_dataloader()
        batches = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            batches.append(torch.cat(list(loader)))
        return batches

    torch.manual_seed(1)
    first = epochs(0)
    torch.manual_seed(2)
    again, other = epochs(0), epochs(1)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


def test_pattern(folder: Path):
    settings = {"context_length": 8, "global_batch_size": 1, "val_fraction": 0.3}
    module = _set_up(path=folder, pattern="part1/*.txt", **settings)
    assert "texts (9 + 1 files)" in module.describe()["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context_length": 0}, "context_length=0 is too small; give at least 1"),
        ({"global_batch_size": -4}, "global_batch_size=-4 is too small; give at least 1"),
        ({"num_workers": -1}, "num_workers=-1 is too small; give at least 0"),
        ({"val_windows": 0}, "val_windows=0 is too small; give at least 1"),
        ({"context_length": 8.0}, r"context_length=8.0 is not an integer; give a whole number"),
        ({"global_batch_size": True}, "global_batch_size=True is not an integer"),
        ({"seed": "0"}, "seed='0' is not an integer"),
        ({"val_fraction": 0.0}, "val_fraction=0.0 is not between 0 and 1; give the share held out"),
        ({"val_fraction": 1}, "val_fraction=1 is not between 0 and 1"),
        ({"val_fraction": float("nan")}, "val_fraction=nan is not between 0 and 1"),
        ({"val_fraction": "0.1"}, "val_fraction='0.1' is not between 0 and 1"),
        (
            {"val_windows": 8},
            "val_windows=8 is less than one batch of global_batch_size=16; set val_windows to at least",
        ),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ByteTextDataModule(**arguments)  # type: ignore[arg-type]


def test_failures_of_preparation_are_raised_by_setup(tmp_path: Path, folder: Path):
    def attempt(**arguments) -> None:
        module = ByteTextDataModule(**arguments)
        # On one process of each node only: raising here would leave the others waiting.
        module.prepare_data()
        module.setup("fit")

    with pytest.raises(ValueError, match="path='.*/nowhere' does not exist"):
        attempt(path=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="matches no file"):
        attempt(path=folder, pattern="*.py")
    with pytest.raises(OSError, match="cannot write the corpus to cache_dir="):
        attempt(path=folder, cache_dir=folder / "part0" / "file00.txt")
    with pytest.raises(ValueError, match="the validation part has .* raise val_fraction=0.0001"):
        attempt(path=folder, val_fraction=0.0001, context_length=16)
    with pytest.raises(ValueError, match="context_length=100000; lower context_length"):
        attempt(path=folder, context_length=100_000)


def test_batch_that_ranks_cannot_share(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", {"num_replicas": 3, "rank": 1})
    module = ByteTextDataModule(path=folder, context_length=8, global_batch_size=4)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="global_batch_size=4 .* 3 data-parallel ranks; change .* to 3 or 6, or the"):
        module.setup("fit")


def test_use_before_setup():
    module = ByteTextDataModule()
    for call in (module.train_dataloader, module.val_dataloader, module.describe):
        with pytest.raises(RuntimeError, match=r"the data is not set up; call setup\('fit'\) first"):
            call()
