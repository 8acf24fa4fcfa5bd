"""Compiles ``kernels.cpp`` on the machine that runs it, once, and keeps the result."""

import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
# Results must equal eager torch's to the bit: no fused multiply-add, and never -ffast-math.
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
_TIMEOUT = 120.0  # seconds; it takes two


class BuildError(Exception):
    """The kernels cannot be built here; the message says why."""


@contextmanager
def built_library() -> Iterator[Path]:
    """The shared library, built if need be; to be loaded before the context is left.

    Raises:
        BuildError: If there is no compiler, or it fails.
    """
    compiler = find_compiler()
    name = f"kernels-{_key(compiler)}.so"
    directory = cache_directory()
    if directory is not None:
        yield _built_once(compiler, directory / name)
        return
    _log.warning("the compiled kernels are not kept: there is no cache folder that is the user's alone to write to")
    # Gone as soon as it is loaded: the mapping stays.
    with tempfile.TemporaryDirectory(prefix="danon-lightning-") as private:
        yield _built_once(compiler, Path(private) / name)


def find_compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX``, or the first of the usual names.

    Raises:
        BuildError: If there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler found ({' '.join(chosen) or ', '.join(COMPILERS)})")


def cache_directory() -> Path | None:
    """``danon_lightning/kernels`` in the user's cache folder, made if need be; None where it cannot be had or trusted.

    What lies there is loaded into the process. So it must belong to the user, nobody else may write to it, and nobody
    else may own the folder above and put another in its place.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        parent = (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "danon_lightning"
        parent.mkdir(parents=True, exist_ok=True)
        directory = parent / "kernels"
        directory.mkdir(mode=0o700, exist_ok=True)
        trusted = _is_ours(parent, 0o002) and _is_ours(directory, 0o022) and directory.is_dir()
        return directory if trusted and os.access(directory, os.W_OK) else None
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None


def _is_ours(path: Path, forbidden: int) -> bool:
    """Whether the user owns what lies at ``path``, and it is no link and has none of the ``forbidden`` mode bits."""
    found = path.lstat()
    return not stat.S_ISLNK(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & forbidden


def _key(compiler: list[str]) -> str:
    """Differs wherever the compiled code may."""
    version = _run([*compiler, "--version"])
    digest = hashlib.sha256(SOURCE.read_bytes())
    for part in (*compiler, *FLAGS, version, platform.machine(), _cpu()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def _cpu() -> str:
    """What -march=native depends on: machines that share a home may differ in it."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return ""
    return "\n".join(line for line in first.splitlines() if line.startswith(wanted))


def _built_once(compiler: list[str], library: Path) -> Path:
    """Builds ``library`` unless it exists. Several processes may come at once: one builds, the others wait for it."""
    if not _exists(library):
        with _lock(library.with_suffix(".lock")):
            if not _exists(library):
                _compile(compiler, library)
    return library


def _exists(library: Path) -> bool:
    try:
        if _is_ours(library, 0o022):
            return True
    except FileNotFoundError:
        return False
    raise BuildError(f"{library} does not belong to this user alone; remove it")


def _compile(compiler: list[str], library: Path) -> None:
    number, part = tempfile.mkstemp(dir=library.parent, prefix=library.stem, suffix=".part")
    os.close(number)
    try:
        _run([*compiler, *FLAGS, str(SOURCE), "-o", part])
        os.chmod(part, 0o700)
        os.replace(part, library)  # complete or not there, also where locks do not work
    finally:
        Path(part).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: at worst each process builds
        yield
