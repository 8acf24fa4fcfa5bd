"""Several hosts on one Linux machine: a network namespace each, joined by a bridge, with links of a chosen rate.

What is emulated is the network, and only that. The hosts share processors, file system, /dev/shm and the host name, so
nothing that runs on them may tell hosts apart by those.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from danon_lightning.testing import namespace_janitor

_PREFIX = "danon"
_SWITCH_INTERFACE = "bridge0"
# Every instance may use the same addresses: its network is reachable only from inside its namespaces.
_SUBNET = "10.77.0"
# Three digits each, so that addresses sort as text in the order of the hosts; torchrun numbers its nodes that way.
_FIRST_ADDRESS = 101
_MAX_HOSTS = 100
# A token bucket below one 64 KB segment makes the kernel cut segments into 1500-byte frames, in software.
_MIN_BURST_BYTES = 128 * 1024
# At high rates the bucket must also last from one timer tick to the next.
_BURST_SECONDS = 0.002
_CONGESTION_CONTROL = "cubic"
_COMMAND_TIMEOUT_SECONDS = 30.0


class EmulatedHosts:
    """A context manager that holds hosts with one network interface each, all in one subnet.

    A link with a rate is shaped in both directions by a token bucket (``tc tbf``), and TCP controls congestion on it as
    it does by default on Linux, by CUBIC. The namespaces are removed, and what runs in
    them is killed, on leaving the context and also when this process dies in any way. Needs Linux and root.

        with EmulatedHosts(2, rate_mbit=100) as hosts:
            subprocess.run([*hosts.command_prefix(0), "ping", "-c1", hosts.address(1)])
    """

    _instances = 0

    def __init__(self, count: int, rate_mbit: float | None = None) -> None:
        """Describes the hosts; they exist from entering the context.

        Args:
            count: Number of hosts, 1 to 100.
            rate_mbit: Rate of each link in each direction, in 10^6 bits/s; None for as fast as the machine can.

        Raises:
            ValueError: An argument is out of range.
        """
        if not 1 <= count <= _MAX_HOSTS:
            raise ValueError(f"count must be from 1 to {_MAX_HOSTS}, got {count}")
        _check_rate(rate_mbit)
        self._count = count
        self._initial_rate = rate_mbit
        EmulatedHosts._instances += 1
        # The start time tells this process from an earlier one that had the same number.
        tag = f"{_PREFIX}-{os.getpid()}-{_start_time(os.getpid())}-{EmulatedHosts._instances}"
        # The bridge has a namespace of its own, so that the machine's own network is never touched.
        self._switch = f"{tag}-switch"
        self._namespaces = [f"{tag}-{index}" for index in range(count)]
        self._janitor: subprocess.Popen[bytes] | None = None

    @property
    def count(self) -> int:
        """Number of hosts."""
        return self._count

    @property
    def interface(self) -> str:
        """Name of the network interface, the same on each host."""
        return "eth0"

    def address(self, host: int) -> str:
        """Returns the IPv4 address of a host."""
        self._check_host(host)
        return f"{_SUBNET}.{_FIRST_ADDRESS + host}"

    def command_prefix(self, host: int) -> list[str]:
        """Returns the words to put before a command so that it runs on a host."""
        self._check_host(host)
        # This also mounts a /sys of its own: /sys/class/net shows the host's interfaces.
        return ["ip", "netns", "exec", self._namespaces[host]]

    def set_rate(self, rate_mbit: float | None, *, host: int | None = None) -> None:
        """Changes the rate of links while they are in use.

        Args:
            rate_mbit: As when the hosts were described.
            host: The one host whose link to change; by default all.

        Raises:
            ValueError: The rate is not positive, or there is no such host.
        """
        _check_rate(rate_mbit)
        if host is not None:
            self._check_host(host)
        for index in range(self._count) if host is None else [host]:
            _shape(self._namespaces[index], self.interface, rate_mbit)
            _shape(self._switch, f"port{index}", rate_mbit)
            self._control_congestion(index, shaped=rate_mbit is not None)

    def bytes_sent(self, host: int) -> int:
        """Returns how many bytes, headers included, a host's interface has sent."""
        return self._counter(host, "tx")

    def bytes_received(self, host: int) -> int:
        """Returns how many bytes, headers included, a host's interface has received."""
        return self._counter(host, "rx")

    @staticmethod
    def unavailable_reason() -> str | None:
        """Returns why hosts cannot be emulated here, or None if they can; found out by trying, once a process."""
        return _unavailable_reason()

    def __enter__(self) -> "EmulatedHosts":
        """Creates the hosts.

        Raises:
            RuntimeError: The system did not permit it, or these hosts are in use already.
        """
        if self._janitor is not None:
            raise RuntimeError("these hosts are in use already")
        _remove_leftovers()
        # Before the first namespace: whatever happens from here on, they are removed.
        self._janitor = subprocess.Popen(
            [sys.executable, "-I", "-S", str(namespace_janitor.__file__), *self._namespaces, self._switch],
            stdin=subprocess.PIPE,
            # Ctrl+C in the terminal is not for the janitor.
            start_new_session=True,
        )
        try:
            self._create()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes the hosts and kills what runs on them."""
        self._remove()

    def _create(self) -> None:
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", _SWITCH_INTERFACE, "type", "bridge")
        # No IPv6 addresses, here and below, hence none of its chatter in the byte counters.
        _run("ip", "-n", self._switch, "link", "set", _SWITCH_INTERFACE, "addrgenmode", "none")
        _run("ip", "-n", self._switch, "link", "set", _SWITCH_INTERFACE, "up")
        for index, namespace in enumerate(self._namespaces):
            port = f"port{index}"
            _run("ip", "netns", "add", namespace)
            _run(
                *("ip", "-n", namespace, "link", "add", self.interface, "type", "veth"),
                *("peer", "name", port, "netns", self._switch),
            )
            _run("ip", "-n", namespace, "link", "set", self.interface, "addrgenmode", "none")
            _run("ip", "-n", self._switch, "link", "set", port, "addrgenmode", "none")
            _run("ip", "-n", self._switch, "link", "set", port, "master", _SWITCH_INTERFACE, "up")
            _run("ip", "-n", namespace, "addr", "add", f"{self.address(index)}/24", "dev", self.interface)
            _run("ip", "-n", namespace, "link", "set", self.interface, "up")
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        if self._initial_rate is not None:
            self.set_rate(self._initial_rate)

    def _control_congestion(self, host: int, *, shaped: bool) -> None:
        """Have a host send over a shaped link as Linux does unless told otherwise, whatever this machine has been told.

        With BBR, for one, two streams leave a shaped link idle for a twentieth of the time, and one alone does not.
        """
        # A kernel without it keeps what it has.
        with suppress(RuntimeError):
            _run(
                *("ip", "-n", self._namespaces[host], "route", "replace", f"{_SUBNET}.0/24", "dev", self.interface),
                *("src", self.address(host)),
                *(("congctl", _CONGESTION_CONTROL) if shaped else ()),
            )

    def _remove(self) -> None:
        if self._janitor is not None:
            # Its input ends, it removes them, it exits.
            self._janitor.communicate()
            self._janitor = None

    def _check_host(self, host: int) -> None:
        if not 0 <= host < self._count:
            raise ValueError(f"there are {self._count} hosts, numbered from 0; got {host}")

    def _counter(self, host: int, direction: str) -> int:
        self._check_host(host)
        output = _run("ip", "-n", self._namespaces[host], "-j", "-s", "link", "show", "dev", self.interface)
        return int(json.loads(output)[0]["stats64"][direction]["bytes"])


def _run(*command: str) -> str:
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_COMMAND_TIMEOUT_SECONDS,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {result.stdout.strip() or f'exit code {result.returncode}'}")
    return result.stdout


def _check_rate(rate_mbit: float | None) -> None:
    if rate_mbit is not None and not rate_mbit > 0:
        raise ValueError(f"rate_mbit must be positive or None, got {rate_mbit}")


def _shape(namespace: str, interface: str, rate_mbit: float | None) -> None:
    """Sets the rate at which an interface sends."""
    if rate_mbit is None:
        current = json.loads(_run("tc", "-n", namespace, "-j", "qdisc", "show", "dev", interface))
        # Without a token bucket there is nothing to remove, and trying to would be an error.
        if any(discipline["kind"] == "tbf" for discipline in current):
            _run("tc", "-n", namespace, "qdisc", "del", "dev", interface, "root")
        return
    bits = round(rate_mbit * 1e6)
    burst = max(_MIN_BURST_BYTES, round(bits / 8 * _BURST_SECONDS))
    _run(
        *("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root"),
        *("tbf", "rate", f"{bits}bit", "burst", f"{burst}b", "latency", "50ms"),
    )


def _start_time(pid: int) -> str | None:
    """Returns when a process started, in clock ticks since the machine did; None if there is no such process."""
    try:
        # The command name, in parentheses, may hold anything; the fields after it are counted.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _remove_leftovers() -> None:
    """Removes namespaces of processes that are gone; there are any only if a janitor was killed, too."""
    for name, pid, started in re.findall(rf"^({_PREFIX}-(\d+)-(\d+)-\S+)", _run("ip", "netns", "list"), re.MULTILINE):
        if _start_time(int(pid)) != started:
            namespace_janitor.remove([name])


@functools.cache
def _unavailable_reason() -> str | None:
    if sys.platform != "linux":
        return f"network namespaces exist only on Linux, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "creating network namespaces needs root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"the command '{program}' (package iproute2) is not installed"
    try:
        with EmulatedHosts(2, rate_mbit=100):
            return None
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return f"this system does not permit it: {error}"
