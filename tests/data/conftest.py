import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every test away from the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "danon_lightning" / "byte_text"


@pytest.fixture
def random_file(tmp_path: Path) -> Callable[[int], Path]:
    """Write a file of random bytes without zeros, so that every window of it is unlike all others."""

    def write(size: int) -> Path:
        path = tmp_path / f"random-{size}.bin"
        source = random.Random(size)
        path.write_bytes(bytes(source.randint(1, 255) for _ in range(size)))
        return path

    return write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder of forty small text files in two levels."""
    root = tmp_path / "texts"
    for index in range(40):
        path = root / f"part{index % 4}" / f"file{index:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is text number {index}\n" * (3 + index))
    return root
