"""Which files a byte corpus is made of, and which of them are held out for validation."""

import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Source", "SourceFile", "in_validation", "list_source"]

# Installed packages differ from machine to machine, and test folders hold files with deliberately broken text.
_STDLIB_EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
_ALWAYS_EXCLUDED_FOLDERS = frozenset({"__pycache__"})


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, as it was when the source was listed."""

    path: str
    """Where to open it."""
    relative: str
    """Path relative to the source's folder, with forward slashes; the file's name if the source is one file."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change, nanoseconds since 1970."""


@dataclass(frozen=True)
class Source:
    """The files of a corpus in their fixed order."""

    label: str
    """What to call the source in tables and messages."""
    files: tuple[SourceFile, ...]
    """Sorted by relative path; empty files are left out."""
    is_single_file: bool
    """Whether ``path`` named one file, which is split by position and not by file."""

    def fingerprint(self, val_fraction: float) -> str:
        """Return a name for the corpus that these files give, without reading them.

        Args:
            val_fraction: Share held out for validation.

        Returns:
            32 hexadecimal digits over relative paths, sizes and times of change of all files, and the split.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.is_single_file} {val_fraction!r}".encode())
        for file in self.files:
            # A path cannot hold a NUL, so that no two lists give the same bytes.
            digest.update(_encode(file.relative) + f"\0{file.size}\0{file.mtime_ns}\0".encode())
        return digest.hexdigest()


def list_source(path: str | Path | None, pattern: str) -> Source:
    """List the files of a source.

    Files and folders whose name starts with a dot, ``__pycache__`` folders and empty files are left out. Links to
    folders are not followed.

    Args:
        path: A folder, a file, or ``None`` for the sources of Python's standard library without its tests.
        pattern: Which files of a folder to take: a glob over the path relative to the folder, in which ``*`` and
            ``?`` stay within one folder and ``**/`` stands for any number of folders. Not used for a file.

    Returns:
        The files, sorted by relative path.

    Raises:
        ValueError: If ``path`` does not exist, or no file matches.
    """
    excluded = _ALWAYS_EXCLUDED_FOLDERS
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        label = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"
        excluded = excluded | _STDLIB_EXCLUDED_FOLDERS
        remedy = "pass path= with a folder or a file of text"
    else:
        root = Path(path).expanduser()
        label = str(root)
        remedy = "pass a folder or a file of text that every node can read"
    if not root.exists():
        raise ValueError(f"path={str(root)!r} does not exist; {remedy}")
    if not root.is_dir():
        files = tuple(file for file in [_describe(str(root), root.name)] if file is not None)
        if not files:
            raise ValueError(f"path={str(root)!r} is empty or not a regular file; {remedy}")
        return Source(label=label, files=files, is_single_file=True)

    matches = _glob_regex(pattern).fullmatch
    found = [
        file
        for relative in _walk(root, excluded)
        if matches(relative) and (file := _describe(os.path.join(root, relative), relative)) is not None
    ]
    if not found:
        raise ValueError(
            f"pattern={pattern!r} matches no file with content in path={str(root)!r}; "
            "change pattern (for example '**/*' or '**/*.txt') or path"
        )
    found.sort(key=lambda file: _encode(file.relative))
    return Source(label=label, files=tuple(found), is_single_file=False)


def in_validation(relative: str, val_fraction: float) -> bool:
    """Tell whether a file of a folder is held out for validation.

    The answer depends on the relative path alone, so that a file keeps its side when others come or go, on every
    machine, and a larger fraction keeps what a smaller one held out.

    Args:
        relative: Path relative to the source's folder, with forward slashes.
        val_fraction: Share of the files to hold out, between 0 and 1.

    Returns:
        ``True`` for validation, ``False`` for training.
    """
    digest = hashlib.blake2b(_encode(relative), digest_size=8, person=b"danon-split").digest()
    return int.from_bytes(digest, "big") < val_fraction * 2.0**64


def _encode(relative: str) -> bytes:
    # Names that are not UTF-8 reach Python as surrogates.
    return relative.encode("utf-8", "surrogateescape")


def _walk(root: Path, excluded: frozenset[str]) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        # In place: os.walk does not enter what is taken out here.
        folders[:] = [name for name in folders if not name.startswith(".") and name not in excluded]
        prefix = Path(folder).relative_to(root).as_posix()
        for name in names:
            if not name.startswith("."):
                yield name if prefix == "." else f"{prefix}/{name}"


def _describe(path: str, relative: str) -> SourceFile | None:
    # A dangling link, a socket or a pipe is no text; reading a pipe would wait for ever.
    if not os.path.isfile(path):
        return None
    stat = os.stat(path)
    if stat.st_size == 0:
        return None
    return SourceFile(path=path, relative=relative, size=stat.st_size, mtime_ns=stat.st_mtime_ns)


def _glob_regex(pattern: str) -> re.Pattern[str]:
    # pathlib's own matching differs between Python versions, and glob.translate is new in 3.13.
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(wildcards.get(part, re.escape(part)) for part in parts), re.DOTALL)
