"""Starts Python scripts in processes that need not import torch and Lightning: forks of a server that has done so."""

import atexit
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from danon_lightning.testing.environment import is_of_launcher

_SERVER = Path(__file__).with_name("fork_server.py")
# On a busy machine the imports take many times the few seconds that they take otherwise.
_IMPORT_SECONDS = 120.0
_FORK_SECONDS = 30.0
_STOP_SECONDS = 5.0
# Each takes some hundred MB of memory. Two, because one test with variables of its own comes between others.
_MOST_SERVERS = 2
# All other variables may be read by the imported libraries once and for all, or by the interpreter.
_READ_LATE = frozenset({"PL_GLOBAL_SEED", "PL_SEED_WORKERS", "PYTEST_CURRENT_TEST"})
# These libraries set themselves when they are imported.
_SET_BY_IMPORTS = frozenset({"PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR"})


class ForkedProcess:
    """A supervised process that a server has forked, with those methods of ``subprocess.Popen`` that are needed."""

    def __init__(self, lifeline: socket.socket, pid: int) -> None:
        """Takes the process over.

        Args:
            lifeline: The supervisor sends the exit code through it, and ends when it is closed.
            pid: Of the supervisor.
        """
        self._lifeline = lifeline
        self._pid = pid
        self._returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code (minus the signal, if one ended it), or None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code once it has ended.

        Raises:
            subprocess.TimeoutExpired: It has not within so many seconds.
        """
        if self._returncode is None:
            self._lifeline.settimeout(timeout)
            try:
                message = self._lifeline.recv(struct.calcsize("i"))
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired("forked process", timeout or 0.0) from None
            except ConnectionError:
                message = b""
            # Only a supervisor that was killed says nothing; the process has died with it.
            self._returncode = struct.unpack("i", message)[0] if message else -signal.SIGKILL
            self._lifeline.close()
        return self._returncode

    def terminate(self) -> None:
        """Tells the supervisor to end it."""
        with suppress(OSError):
            self._lifeline.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """Kills the supervisor, and with it the process."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)


class ForkServer:
    """A running server; see ``fork_server.py``. It ends with this object or this process."""

    def __init__(self, env: Mapping[str, str], path: Sequence[str]) -> None:
        """Starts it and waits until it has imported everything.

        Args:
            env: The environment to import in.
            path: The folders to import from.

        Raises:
            OSError: It did not come up.
        """
        self._control, theirs = _socketpair()
        with theirs, tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                [sys.executable, str(_SERVER), str(theirs.fileno()), *path],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                # Ctrl+C in the terminal is not for the server.
                start_new_session=True,
            )
            theirs.close()
            try:
                self._control.settimeout(_IMPORT_SECONDS)
                answer = self._control.recv(4096)
                if answer != b"ready":
                    log.seek(0)
                    raise OSError(answer.decode() or f"it ended early: {log.read().decode(errors='replace')}")
            except BaseException:
                # While it imports, it would not notice that it is no longer needed.
                self._process.kill()
                self.stop()
                raise

    @property
    def alive(self) -> bool:
        """Whether it can be asked for processes."""
        return self._process.poll() is None

    def start(
        self, arguments: Sequence[str], *, env: Mapping[str, str], stdout: BinaryIO, stderr: BinaryIO
    ) -> ForkedProcess:
        """Runs a script in a fork of the server.

        Args:
            arguments: The script's file, and its arguments.
            env: Its whole environment.
            stdout: An open file for its standard output.
            stderr: And for its standard error.

        Raises:
            OSError: The server is gone, or could not fork.
        """
        lifeline, theirs = _socketpair()
        with theirs:
            socket.send_fds(self._control, [b"+"], [theirs.fileno(), stdout.fileno(), stderr.fileno()])
        try:
            lifeline.settimeout(_FORK_SECONDS)
            lifeline.sendall(pickle.dumps({"argv": [*arguments], "env": dict(env), "cwd": os.getcwd()}))
            answer = lifeline.recv(struct.calcsize("i"))
            if not answer:
                raise OSError("it could not fork")
        except BaseException:
            lifeline.close()
            raise
        return ForkedProcess(lifeline, *struct.unpack("i", answer))

    def stop(self) -> None:
        """Ends the server; processes that it has forked go on."""
        self._control.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# By what they have imported. A fork of this process has none, and must not keep alive what is to end with this process.
_servers: dict[object, ForkServer] = {}
_sockets: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()
_lock = threading.Lock()
_given_up = sys.platform != "linux"


def _socketpair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    _sockets.add(ours)
    return ours, theirs


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _servers.clear()
    for end in list(_sockets):
        end.close()


def _stop() -> None:
    while _servers:
        _servers.popitem()[1].stop()


os.register_at_fork(after_in_child=_forget)
atexit.register(_stop)


def fork_server(env: Mapping[str, str]) -> ForkServer | None:
    """Returns a server for scripts in such an environment, newly started if need be.

    Args:
        env: Environment variables. Only those that libraries read when they are imported make another server necessary,
            as does a change of ``sys.path``.

    Returns:
        None where there can be none: on other systems than Linux, and after :func:`give_up`.

    Warns:
        RuntimeWarning: It cannot be started. There will be no other attempt.
    """
    path = tuple(os.path.abspath(entry) for entry in sys.path)
    early = {name: value for name, value in env.items() if not _is_read_late(name)}
    key = (sys.executable, path, frozenset(early.items()))
    with _lock:
        if _given_up:
            return None
        server = _servers.pop(key, None)
        if server is None or not server.alive:
            try:
                server = ForkServer(early, path)
            except OSError as error:
                give_up(error)
                return None
        _servers[key] = server
        while len(_servers) > _MOST_SERVERS:
            # The one that was not used for the longest time.
            _servers.pop(next(iter(_servers))).stop()
        return server


def give_up(error: OSError) -> None:
    """Have :func:`fork_server` return None from now on, and warn of the reason, once."""
    global _given_up
    if not _given_up:
        _given_up = True
        warnings.warn(f"ranks start slowly, because there is no fork server: {error}", RuntimeWarning, stacklevel=2)


def _is_read_late(name: str) -> bool:
    """Tells whether a variable changes nothing of what has been imported already."""
    return name in _READ_LATE | _SET_BY_IMPORTS or name.startswith("DANON_") or is_of_launcher(name)
