"""A process that has imported what most ranks need, and forks them; started as a script, never imported.

    python fork_server.py SOCKET [FOLDER_OF_SYS_PATH ...]

Importing torch and Lightning takes seconds of processor time, a fork some milliseconds. The parent
(:mod:`danon_lightning.testing.forking`) sends requests through the socket with that number. For each, the server forks
a supervisor, which forks the process that runs the requested script; the two do what ``supervisor.py`` and a new Python
would do. The server itself does nothing else and has one thread. It ends with its parent; if that dies while the server
is importing, once it has done so.

What a fork cannot have of its own: the seed of hashes and the addresses of what was imported are the same in all ranks,
so all walk through a set of strings in the same order, which new processes do not. Resource limits, the umask and the
processors to run on are those that the parent had when it started the server.
"""

import gc
import importlib
import os
import pickle
import runpy
import signal
import socket
import struct
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any

_IMPORTED = (
    "danon_lightning.callbacks",
    "danon_lightning.models",
    "danon_lightning.strategies",
    "danon_lightning.testing",
    "lightning.pytorch",
    "pytest",
    "torch.distributed.pipelining",
    "torch.utils.tensorboard",
    "torchmetrics",
)
# They tell by these whether to print, and take them from the environment when they are imported.
_RANKS_TAKEN_ON_IMPORT = (
    ("lightning_utilities.core.rank_zero", "RANK"),
    ("torchmetrics.utilities.prints", "LOCAL_RANK"),
)


def _import() -> None:
    importlib.import_module("danon_lightning.testing.supervisor")
    for name in _IMPORTED:
        # What cannot be imported is for the ranks that need it to report.
        with suppress(Exception):
            importlib.import_module(name)
    # A collection in a rank, above all the one at its end, would write to every page that it shares with the others.
    gc.collect()
    gc.freeze()


def _threads() -> list[str]:
    """Returns the names of the threads that keep this process from being forked."""
    # Libraries that know of forks, such as OpenBLAS, end their threads before one.
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    names = []
    for thread in os.listdir("/proc/self/task"):
        if int(thread) != os.getpid():
            with open(f"/proc/self/task/{thread}/comm") as file:
                names.append(file.read().strip())
    return names


def _reap(*_: object) -> None:
    """Takes note of supervisors that have ended: how, they have told by themselves."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _serve(control: socket.socket) -> dict[str, Any] | None:
    """Forks supervisors until the parent closes the socket or dies.

    Returns:
        None then; but what is to be run in a process that a supervisor has forked.
    """
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        message, (*descriptors,), _, _ = socket.recv_fds(control, 1, 3)
        if not message:
            _reap()
            return None
        try:
            child = os.fork()
        except OSError:
            # The parent notices that the other end of the first descriptor is closed.
            child = -1
        if child == 0:
            control.close()
            return _supervise(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _supervise(lifeline_number: int, stdout: int, stderr: int) -> dict[str, Any]:
    """Turns this process into a supervisor, which tells its number, then how the process it supervises has ended.

    Returns:
        The request, in the process that is to fulfil it.
    """
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for descriptor, number in ((stdout, 1), (stderr, 2)):
            os.dup2(descriptor, number)
            os.close(descriptor)
        lifeline = socket.socket(fileno=lifeline_number)
        with lifeline.makefile("rb") as stream:
            request: dict[str, Any] = pickle.load(stream)
        lifeline.sendall(struct.pack("i", os.getpid()))
        supervisor = importlib.import_module("danon_lightning.testing.supervisor")
        child = supervisor.fork()
        if child == 0:
            lifeline.close()
            return request
        threading.Thread(target=_end_with_parent, args=[lifeline], daemon=True).start()
        lifeline.sendall(struct.pack("i", supervisor.supervise(child)))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)


def _end_with_parent(lifeline: socket.socket) -> None:
    """Ends this supervisor once the parent has closed its end, on purpose or by dying."""
    lifeline.recv(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _run(request: dict[str, Any], changed_by_imports: dict[str, str]) -> None:
    """Makes this process look like a new one and runs the script."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update({**changed_by_imports, **request["env"]})
    for name, variable in _RANKS_TAKEN_ON_IMPORT:
        if name in sys.modules and variable in os.environ:
            sys.modules[name].rank_zero_only.rank = int(os.environ[variable])
    # Otherwise all ranks would draw the same numbers. Python does the same with its own generator.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    importlib.invalidate_caches()
    sys.argv[:] = request["argv"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    """Imports, then serves."""
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:] = sys.argv[2:]
    before = dict(os.environ)
    _import()
    threads = _threads()
    sys.stdout.flush()
    control.sendall(f"imports have started threads: {', '.join(threads)}".encode() if threads else b"ready")
    changed_by_imports = {name: value for name, value in os.environ.items() if before.get(name) != value}
    request = _serve(control)
    if request is None:
        # There is nothing to clean up but a great many modules.
        os._exit(0)
    _run(request, changed_by_imports)


if __name__ == "__main__":
    main()
