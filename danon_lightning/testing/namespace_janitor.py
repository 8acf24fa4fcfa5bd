"""Removes network namespaces when its standard input ends; started as a script.

    python -I -S namespace_janitor.py NAMESPACE [NAMESPACE ...]

The other end of its input belongs to the process that uses the namespaces. The system closes that end however the
process goes, SIGKILL included, so this one clean-up serves every way out. What still runs in them is killed: a
namespace lives on with its last process.
"""

import os
import signal
import subprocess
import sys
import time

# Where the command ip keeps the names.
_NAMES = "/var/run/netns"
_PAUSE_SECONDS = 0.02
# Processes may be starting others while they are being killed.
_MAX_ROUNDS = 100


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _kill_all_in(identities: set[tuple[int, int]]) -> bool:
    """Kills the processes in these namespaces; returns whether there were any."""
    processes = [name for name in os.listdir("/proc") if name.isdigit()]
    found = [name for name in processes if _identity(f"/proc/{name}/ns/net") in identities]
    for name in found:
        try:
            os.kill(int(name), signal.SIGKILL)
        except ProcessLookupError:
            pass
    return bool(found)


def remove(namespaces: list[str]) -> None:
    """Removes these namespaces and kills all processes in them; those that do not exist are passed over."""
    identities = {found for name in namespaces if (found := _identity(f"{_NAMES}/{name}")) is not None}
    # First the names, so that nobody else can enter.
    for namespace in namespaces:
        subprocess.run(["ip", "netns", "del", namespace], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # Somebody may have opened a name just before and enter only now: once none is found, look once more.
    empty_rounds = 0
    for _ in range(_MAX_ROUNDS):
        empty_rounds = 0 if _kill_all_in(identities) else empty_rounds + 1
        if empty_rounds == 2:
            return
        time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    remove(sys.argv[1:])
