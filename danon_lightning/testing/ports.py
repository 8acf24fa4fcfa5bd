"""A TCP port that stays free until it is used."""

import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Systems give out ports above these by themselves (Linux from 32768), so nobody is handed one of them by chance.
_FIRST, _LAST = 15000, 32000
_ATTEMPTS = 100

_TRY_TO_BIND = """
import socket, sys
with socket.socket() as tcp:
    tcp.bind(("", int(sys.argv[1])))
"""


@contextmanager
def reserved_port(command_prefix: Sequence[str] = ()) -> Iterator[int]:
    """Yields a TCP port that nobody else who uses this function is given meanwhile.

    Binding to port 0 and closing the socket would leave a gap in which the system may give the port away again, which
    does happen when many tests run at once. Here a UDP socket of the same number is held as a mutex: it does not
    disturb the TCP port, and the system drops it with the process.

    Args:
        command_prefix: How to run a command on the (emulated) host where the port will be used; empty for here.

    Raises:
        OSError: No port could be had.
    """
    for _ in range(_ATTEMPTS):
        port = random.SystemRandom().randrange(_FIRST, _LAST)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mutex:
            try:
                mutex.bind(("127.0.0.1", port))
            except OSError:
                continue
            if _can_be_bound(port, command_prefix):
                yield port
                return
    raise OSError(f"no free TCP port found between {_FIRST} and {_LAST}")


def _can_be_bound(port: int, command_prefix: Sequence[str]) -> bool:
    if command_prefix:
        command = [*command_prefix, sys.executable, "-I", "-S", "-c", _TRY_TO_BIND, str(port)]
        return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=30).returncode == 0
    with socket.socket() as tcp:
        try:
            tcp.bind(("", port))
        except OSError:
            return False
    return True
