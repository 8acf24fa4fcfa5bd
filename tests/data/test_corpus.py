import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from danon_lightning.data import corpus as corpus_module
from danon_lightning.data.corpus import Corpus, default_cache_dir, open_corpus, prepare_corpus
from danon_lightning.data.sources import in_validation, list_source


def _prepare(folder: Path, cache: Path, val_fraction: float = 0.3) -> Corpus:
    return prepare_corpus(list_source(folder, "**"), val_fraction, cache)


def _joined(folder: Path, val_fraction: float) -> tuple[bytes, bytes]:
    """The oracle: sort, split and join in memory."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    held_out = [in_validation(name, val_fraction) for name in names]
    parts = [
        b"\0".join((folder / name).read_bytes() for name, held in zip(names, held_out, strict=True) if held == wanted)
        for wanted in (False, True)
    ]
    return parts[0], parts[1]


def test_content_and_manifest(folder: Path, tmp_path: Path):
    corpus = _prepare(folder, tmp_path / "cache")
    train, val = _joined(folder, 0.3)
    assert corpus.train_path.read_bytes() == train
    assert corpus.val_path.read_bytes() == val
    assert (corpus.train_bytes, corpus.val_bytes) == (len(train), len(val))
    assert corpus.train_files + corpus.val_files == 40 and corpus.skipped_files == 0
    assert corpus.folder.name == list_source(folder, "**").fingerprint(0.3)
    assert sorted(path.name for path in corpus.folder.iterdir()) == ["manifest.json", "train.bin", "val.bin"]


def test_chunks_smaller_than_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = _prepare(folder, tmp_path / "whole")
    monkeypatch.setattr(corpus_module, "_CHUNK", 7)
    assert _prepare(folder, tmp_path / "chunks").digest == whole.digest


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_single_file_is_split_by_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(corpus_module, "_CHUNK", chunk)
    file = tmp_path / "one.txt"
    file.write_bytes(bytes(1 + index % 255 for index in range(1000)))
    corpus = _prepare(file, tmp_path / "cache", val_fraction=0.25)
    assert corpus.train_path.read_bytes() == file.read_bytes()[:750]
    assert corpus.val_path.read_bytes() == file.read_bytes()[750:]


def test_digest_is_about_content_and_not_about_times(folder: Path, tmp_path: Path):
    first = _prepare(folder, tmp_path / "cache")
    os.utime(folder / "part0" / "file00.txt", ns=(5, 5))
    second = _prepare(folder, tmp_path / "cache")
    assert first.folder != second.folder and first.digest == second.digest
    (folder / "part0" / "file00.txt").write_text("something else")
    assert _prepare(folder, tmp_path / "cache").digest != first.digest


def test_files_that_are_not_text_are_skipped(folder: Path, tmp_path: Path):
    expected = _prepare(folder, tmp_path / "cache").digest
    (folder / "image.png").write_bytes(b"\x89PNG\0\0\0")
    corpus = _prepare(folder, tmp_path / "cache")
    assert corpus.skipped_files == 1 and corpus.digest == expected


def test_second_call_reads_no_text(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = _prepare(folder, tmp_path / "cache")
    monkeypatch.setattr(corpus_module, "_write_parts", None)
    assert _prepare(folder, tmp_path / "cache") == first


def _truncate_train(folder: Path) -> None:
    os.truncate(folder / "train.bin", 10)


def _remove_val(folder: Path) -> None:
    (folder / "val.bin").unlink()


def _empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("")


def _manifest_of_another_type(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1]")


def _other_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


@pytest.mark.parametrize(
    "damage", [_truncate_train, _remove_val, _empty_manifest, _manifest_of_another_type, _other_format]
)
def test_damaged_corpus_is_rebuilt(folder: Path, tmp_path: Path, damage):
    cache = tmp_path / "cache"
    first = _prepare(folder, cache)
    damage(first.folder)
    assert open_corpus(first.folder) is None
    second = _prepare(folder, cache)
    assert second == first
    assert second.train_path.read_bytes() == _joined(folder, 0.3)[0]
    # Neither the damaged copy nor a working folder is left behind.
    assert list(cache.iterdir()) == [second.folder]


def test_failure_in_the_middle_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_module, "_write_manifest", full_disk)
    with pytest.raises(
        OSError, match=r"cannot write the corpus to cache_dir='.*' \(.*No space left on device\); pass an"
    ):
        _prepare(folder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_made(folder: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write the corpus to cache_dir='.*/file/cache'"):
        _prepare(folder, tmp_path / "file" / "cache")


def test_text_that_changes_while_it_is_read(folder: Path, tmp_path: Path):
    source = list_source(folder, "**")
    with open(folder / "part0" / "file00.txt", "a") as stream:
        stream.write("more")
    with pytest.raises(OSError, match=r"file00.txt' changed while it was being read; start again"):
        prepare_corpus(source, 0.3, tmp_path / "cache")
    (folder / "part0" / "file00.txt").unlink()
    with pytest.raises(OSError, match=r"cannot read '.*file00.txt' \(No such file or directory\)"):
        prepare_corpus(source, 0.3, tmp_path / "cache")


def test_builder_that_finishes_second_keeps_the_first_corpus(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = tmp_path / "cache"
    real = corpus_module._write_manifest
    inodes = []

    def overtaken(manifest: dict[str, object], building: Path) -> None:
        real(manifest, building)
        monkeypatch.setattr(corpus_module, "_write_manifest", real)
        inodes.append(_prepare(folder, cache).train_path.stat().st_ino)

    monkeypatch.setattr(corpus_module, "_write_manifest", overtaken)
    corpus = _prepare(folder, cache)
    # The same file: a reader that has mapped it keeps its mapping, also on network file systems.
    assert corpus.train_path.stat().st_ino == inodes[0]
    assert list(cache.iterdir()) == [corpus.folder]


def _build_often(folder: Path, cache: Path, start, failures) -> None:
    start.wait()
    for round_number in range(30):
        try:
            built = _prepare(folder, cache)
            if round_number % 3 == 0:
                os.truncate(built.train_path, 3)
        except FileNotFoundError:
            # The damage came too late: somebody else has already renamed this copy.
            pass
        except Exception as error:
            failures.put(repr(error))


def test_concurrent_builders(folder: Path, tmp_path: Path):
    context = multiprocessing.get_context("fork")
    start, failures = context.Barrier(2), context.Queue()
    cache = tmp_path / "cache"
    builders = [context.Process(target=_build_often, args=(folder, cache, start, failures)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
        assert builder.exitcode == 0
    reported = [] if failures.empty() else [failures.get()]
    # A builder may lose its corpus to the other one's damage just before it looks; that is reported, not hidden.
    assert all("was removed or damaged while it was built" in text for text in reported)
    final = _prepare(folder, cache)
    assert final.train_path.read_bytes() == _joined(folder, 0.3)[0]
    assert list(cache.iterdir()) == [final.folder]


def test_only_abandoned_working_folders_are_removed(folder: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    old, new = cache / ".a.1.tmp", cache / ".a.2.tmp"
    for path in (old, new):
        path.mkdir(parents=True)
    long_ago = time.time() - 30 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    _prepare(folder, cache)
    assert not old.exists() and new.exists()


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache_dir() == tmp_path / "x" / "danon_lightning" / "byte_text"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_cache_dir() == tmp_path / ".cache" / "danon_lightning" / "byte_text"
