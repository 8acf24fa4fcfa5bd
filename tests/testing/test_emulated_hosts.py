import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from danon_lightning.testing import EmulatedHosts, emulated_hosts, launch_ranks

# The second rank sends, then the first; each receiver prints how long the bytes after the first block took.
_TRANSFER = """
import os, socket, sys, time
rank, amount = int(os.environ["RANK"]), int(sys.argv[1])
place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

def receive():
    left, started = amount, None
    while left:
        left -= len(connection.recv(min(left, 65536)))
        started = started or time.monotonic()
    print(time.monotonic() - started)

if rank == 0:
    with socket.create_server(place) as server:
        connection = server.accept()[0]
    receive()
    connection.sendall(bytes(amount))
    connection.recv(1)
else:
    while True:
        try:
            connection = socket.create_connection(place)
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    connection.sendall(bytes(amount))
    receive()
"""


def _namespaces():
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def _own_namespaces():
    return [line for line in _namespaces().splitlines() if line.startswith(f"danon-{os.getpid()}-")]


def _measured_mbit(hosts, amount):
    """Returns the rate in both directions between the first two hosts."""
    results = launch_ranks([sys.executable, "-I", "-S", "-c", _TRANSFER, str(amount)], nodes=2, hosts=hosts, timeout=30)
    assert all(result.ok for result in results), "\n".join(map(str, results))
    return [amount * 8 / 1e6 / float(result.stdout) for result in results]


def _eventually(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(("count", "rate"), [(0, None), (101, None), (2, 0), (2, -1.0), (2, float("nan"))])
def test_arguments_are_checked(count, rate):
    with pytest.raises(ValueError, match="got"):
        EmulatedHosts(count, rate)


@pytest.mark.hosts
def test_rates_are_kept_and_can_be_changed(emulated_hosts):
    hosts = emulated_hosts(2, rate_mbit=80)
    assert _measured_mbit(hosts, 4_000_000) == pytest.approx([80, 80], rel=0.15)
    hosts.set_rate(40)
    assert _measured_mbit(hosts, 2_000_000) == pytest.approx([40, 40], rel=0.15)
    hosts.set_rate(None)
    assert min(_measured_mbit(hosts, 4_000_000)) > 200
    # One slow link slows both directions of what passes over it.
    hosts.set_rate(40, host=1)
    assert _measured_mbit(hosts, 2_000_000) == pytest.approx([40, 40], rel=0.15)
    # Removing what is not there is no error.
    hosts.set_rate(None)
    hosts.set_rate(None)
    with pytest.raises(ValueError, match="positive"):
        hosts.set_rate(0)
    with pytest.raises(ValueError, match="2 hosts"):
        hosts.set_rate(1, host=2)


@pytest.mark.hosts
def test_shaped_links_are_controlled_as_is_usual_on_linux(emulated_hosts):
    available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text()
    if "cubic" not in available:
        pytest.skip(f"this kernel has no CUBIC: {available.strip()}")
    hosts = emulated_hosts(2, rate_mbit=80)

    def routes():
        return subprocess.run([*hosts.command_prefix(1), "ip", "route"], capture_output=True, text=True).stdout

    assert "congctl cubic" in routes()
    hosts.set_rate(None)
    assert "10.77.0.0/24 dev eth0" in routes()
    assert "congctl" not in routes()


@pytest.mark.hosts
def test_byte_counters_and_names(emulated_hosts):
    hosts = emulated_hosts(3)
    assert [hosts.address(host) for host in range(3)] == ["10.77.0.101", "10.77.0.102", "10.77.0.103"]
    assert (hosts.count, hosts.bytes_sent(0), hosts.bytes_received(2)) == (3, 0, 0)
    _measured_mbit(hosts, 1_000_000)
    for host in range(2):
        assert 1_000_000 < hosts.bytes_sent(host) < 1_100_000
        assert 1_000_000 < hosts.bytes_received(host) < 1_100_000
    # The third host only sees the first question of who has an address.
    assert hosts.bytes_received(2) < 1000
    shown = subprocess.run([*hosts.command_prefix(1), "ls", "/sys/class/net"], capture_output=True, text=True)
    assert shown.stdout.split() == [hosts.interface, "lo"]


@pytest.mark.hosts
def test_two_instances_do_not_meet(emulated_hosts):
    first, second = emulated_hosts(2), emulated_hosts(2)
    assert first.address(0) == second.address(0)
    _measured_mbit(first, 100_000)
    assert first.bytes_sent(0) > 100_000 and second.bytes_sent(0) == 0


@pytest.mark.hosts
def test_nothing_remains():
    hosts = EmulatedHosts(2)
    with hosts:
        assert len(_own_namespaces()) == 3
        with pytest.raises(RuntimeError, match="in use"):
            hosts.__enter__()
        command = ["sh", "-c", "echo here; exec sleep 600"]
        left = subprocess.Popen([*hosts.command_prefix(0), *command], stdout=subprocess.PIPE)
        assert left.stdout.readline() == b"here\n"
    left.stdout.close()
    assert left.wait(5) == -signal.SIGKILL
    assert not _own_namespaces()
    # They can be used again.
    with pytest.raises(KeyError), hosts:
        assert len(_own_namespaces()) == 3
        raise KeyError
    assert not _own_namespaces()


@pytest.mark.hosts
def test_a_failure_half_way_removes_what_there_is(monkeypatch):
    run = emulated_hosts._run

    def fail_at_the_second_host(*command):
        if command[:3] == ("ip", "netns", "add") and command[3].endswith("-1"):
            raise RuntimeError("enough")
        return run(*command)

    monkeypatch.setattr(emulated_hosts, "_run", fail_at_the_second_host)
    with pytest.raises(RuntimeError, match="enough"), EmulatedHosts(2):
        pass
    assert not _own_namespaces()


@pytest.mark.hosts
def test_nothing_remains_of_processes_that_die(quick_start):
    script = quick_start + (
        "import time; from danon_lightning.testing import EmulatedHosts\n"
        "with EmulatedHosts(1) as hosts: print(hosts.command_prefix(0)[-1], flush=True); time.sleep(600)"
    )
    signals = [signal.SIGTERM, signal.SIGKILL]
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in signals]
    namespaces = [process.stdout.readline().strip() for process in processes]
    assert all(namespace.startswith("danon-") and namespace in _namespaces() for namespace in namespaces)
    for process, how in zip(processes, signals, strict=True):
        process.send_signal(how)
        process.communicate()
    assert _eventually(lambda: not any(namespace in _namespaces() for namespace in namespaces))


@pytest.mark.hosts
def test_leftovers_of_dead_processes_are_removed():
    # This process exists, but started at another time: its number has been given away again.
    leftover = f"danon-{os.getpid()}-1-1-0"
    subprocess.run(["ip", "netns", "add", leftover], check=True)
    with EmulatedHosts(1):
        assert leftover not in _namespaces()
        assert len(_own_namespaces()) == 2


def test_the_reason_names_what_is_missing(monkeypatch):
    reason = emulated_hosts._unavailable_reason.__wrapped__
    monkeypatch.setattr(sys, "platform", "darwin")
    assert reason() == "network namespaces exist only on Linux, and this is darwin"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert reason() == "creating network namespaces needs root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    assert reason() == "the command 'ip' (package iproute2) is not installed"
    monkeypatch.setattr(emulated_hosts.shutil, "which", lambda program: program)

    def refuse(*command):
        raise RuntimeError("Operation not permitted")

    monkeypatch.setattr(emulated_hosts, "_remove_leftovers", lambda: None)
    monkeypatch.setattr(emulated_hosts, "_run", refuse)
    assert reason() == "this system does not permit it: Operation not permitted"


def test_shaping_uses_a_large_enough_bucket(monkeypatch):
    commands = []
    monkeypatch.setattr(emulated_hosts, "_run", lambda *command: commands.append(command) or json.dumps([]))
    emulated_hosts._shape("namespace", "eth0", 0.5)
    emulated_hosts._shape("namespace", "eth0", 10_000)
    assert [command[command.index("tbf") :] for command in commands] == [
        ("tbf", "rate", "500000bit", "burst", "131072b", "latency", "50ms"),
        ("tbf", "rate", "10000000000bit", "burst", "2500000b", "latency", "50ms"),
    ]
