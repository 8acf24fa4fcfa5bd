"""The corpus on disk: one file of bytes for training and one for validation, built once and then mapped.

A finished corpus is a folder ``<cache_dir>/<fingerprint>`` with ``train.bin``, ``val.bin`` and ``manifest.json``. It
appears under its name in one step, complete and flushed to disk. Builders on one or on many nodes therefore need no
lock: each works in a folder of its own, the first to finish publishes, and the others discard their identical copy.
The cache may be deleted whenever no run uses it.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from danon_lightning.data.sources import Source, SourceFile, in_validation

__all__ = ["SEPARATOR", "Corpus", "default_cache_dir", "open_corpus", "prepare_corpus"]

SEPARATOR = b"\0"
"""Stands between two files; it cannot be mistaken for text."""

_MANIFEST = "manifest.json"
_FORMAT = 1
_CHUNK = 4 * 1024 * 1024
# The rule that git uses: text has no NUL near its beginning.
_BINARY_PROBE = 8192
_ABANDONED_AFTER_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Corpus:
    """A finished corpus."""

    folder: Path
    """Holds ``train.bin`` and ``val.bin``, both plain bytes."""
    train_bytes: int
    val_bytes: int
    train_files: int
    val_files: int
    skipped_files: int
    """Files left out because they are not text."""
    digest: str
    """32 hexadecimal digits over the content of both parts; equal on every machine with the same text."""

    @property
    def train_path(self) -> Path:
        """The training part."""
        return self.folder / "train.bin"

    @property
    def val_path(self) -> Path:
        """The validation part."""
        return self.folder / "val.bin"


def default_cache_dir() -> Path:
    """Return the folder for corpora in the user's cache: ``$XDG_CACHE_HOME`` if it is set, else ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    root = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    return root / "danon_lightning" / "byte_text"


def open_corpus(folder: Path) -> Corpus | None:
    """Open a corpus that :func:`prepare_corpus` has built.

    Args:
        folder: ``<cache_dir>/<fingerprint>``.

    Returns:
        The corpus, or ``None`` if a file is missing, does not have the length it was written with, or is of another
        format.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("format") != _FORMAT or set(manifest) != {f.name for f in fields(Corpus)} - {"folder"}:
            return None
        corpus = Corpus(folder=folder, **manifest)
        complete = (
            corpus.train_path.stat().st_size == corpus.train_bytes
            and corpus.val_path.stat().st_size == corpus.val_bytes
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return corpus if complete else None


def prepare_corpus(source: Source, val_fraction: float, cache_dir: Path) -> Corpus:
    """Open a source's corpus, and build it first if it is missing or damaged.

    Files are joined in the order of the source with :data:`SEPARATOR` between them. A folder is split by file, a single
    file by position: its last part is for validation.

    Args:
        source: The files.
        val_fraction: Share held out for validation, between 0 and 1.
        cache_dir: Where corpora are kept.

    Returns:
        The corpus, complete on disk.

    Raises:
        OSError: If a file of the source cannot be read or changes meanwhile, or the cache cannot be written.
    """
    final = cache_dir / source.fingerprint(val_fraction)
    corpus = open_corpus(final)
    if corpus is not None:
        return corpus
    building = cache_dir / f".{final.name}.{uuid.uuid4().hex}.tmp"
    try:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(cache_dir)
            building.mkdir()
            manifest = _write_parts(source, val_fraction, building)
            _write_manifest(manifest, building)
            _publish(building, final)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except _SourceError as error:
        raise OSError(str(error)) from error
    except OSError as error:
        raise OSError(
            f"cannot write the corpus to cache_dir={str(cache_dir)!r} ({error}); pass another cache_dir"
        ) from error
    corpus = open_corpus(final)
    if corpus is None:
        raise OSError(f"the corpus in {str(final)!r} was removed or damaged while it was built; start again")
    return corpus


class _SourceError(Exception):
    """A file of the source cannot be used."""


class _Part:
    """One growing part of a corpus."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.hash = hashlib.blake2b(digest_size=16)
        self.num_bytes = 0
        self.num_files = 0
        self._file: SourceFile | None = None

    def add(self, file: SourceFile, data: bytes) -> None:
        if not data:
            return
        if file is not self._file:
            data = SEPARATOR + data if self.num_files else data
            self.num_files += 1
            self._file = file
        self.stream.write(data)
        self.hash.update(data)
        self.num_bytes += len(data)


def _write_parts(source: Source, val_fraction: float, folder: Path) -> dict[str, Any]:
    with open(folder / "train.bin", "wb") as train_stream, open(folder / "val.bin", "wb") as val_stream:
        train, val = _Part(train_stream), _Part(val_stream)
        skipped = 0
        for file in source.files:
            if source.is_single_file:
                cut = file.size - int(file.size * val_fraction)
            else:
                cut = 0 if in_validation(file.relative, val_fraction) else file.size
            position = 0
            for data in _text_chunks(file):
                train.add(file, data[: max(0, cut - position)])
                val.add(file, data[max(0, cut - position) :])
                position += len(data)
            skipped += position == 0
        for stream in (train_stream, val_stream):
            stream.flush()
            os.fsync(stream.fileno())
    return {
        "train_bytes": train.num_bytes,
        "val_bytes": val.num_bytes,
        "train_files": train.num_files,
        "val_files": val.num_files,
        "skipped_files": skipped,
        "digest": hashlib.blake2b(train.hash.digest() + val.hash.digest(), digest_size=16).hexdigest(),
    }


def _text_chunks(file: SourceFile) -> Iterator[bytes]:
    """Yield the content of a file, or nothing if it is not text."""
    try:
        with open(file.path, "rb") as stream:
            if SEPARATOR in stream.read(_BINARY_PROBE):
                return
            stream.seek(0)
            position = 0
            while data := stream.read(_CHUNK):
                position += len(data)
                yield data
            stat = os.fstat(stream.fileno())
    except OSError as error:
        raise _SourceError(f"cannot read {file.path!r} ({error.strerror}); make it readable or take it out") from error
    # The fingerprint stands for what was listed: any other content under its name would stay in the cache for good.
    if (position, stat.st_size, stat.st_mtime_ns) != (file.size, file.size, file.mtime_ns):
        raise _SourceError(f"{file.path!r} changed while it was being read; start again when nothing writes to it")


def _write_manifest(manifest: dict[str, Any], folder: Path) -> None:
    with open(folder / _MANIFEST, "w", encoding="utf-8") as stream:
        json.dump({"format": _FORMAT, **manifest}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    _sync_folder(folder)


def _publish(building: Path, final: Path) -> None:
    """Give a complete folder its final name, unless another builder was first."""
    # More than one round is needed only if other builders replace the same damaged corpus at this moment.
    for _ in range(10):
        try:
            os.rename(building, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            _sync_folder(final.parent)
            return
        if open_corpus(final) is not None:
            return
        # A damaged corpus is renamed and not emptied in place: nobody sees a half-removed one.
        damaged = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        with suppress(FileNotFoundError):
            os.rename(final, damaged)
        shutil.rmtree(damaged, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    # Windows cannot open a folder; there a rename is as durable as the file system makes it.
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove what builders that were killed long ago have left."""
    for folder in cache_dir.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)
