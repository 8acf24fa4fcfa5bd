import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from danon_lightning.testing import launch_ranks, reserved_port, torchrun

# Without site packages and user settings a Python process starts in a few hundredths of a second.
_PYTHON = [sys.executable, "-I", "-S"]

_ALL_REDUCE = """
import os
import sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
tensor = torch.tensor(float(dist.get_rank()))
dist.all_reduce(tensor)
# In one piece: torchrun's workers are unbuffered, and the parts of a print mix with those of other ranks.
sys.stdout.write(f"sum {tensor.item()} of {dist.get_world_size()} in node {os.environ['GROUP_RANK']}\\n")
dist.destroy_process_group()
"""

# A child in a session of its own, as torchrun starts its workers, and a grandchild whose parent has gone.
_FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        with open(sys.argv[1] + f".{os.getpid()}", "w"):
            pass
        time.sleep(600)
    os._exit(0)
os.wait()
for pid in (os.getpid(), child.pid):
    with open(sys.argv[1] + f".{pid}", "w"):
        pass
"""


def _script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(text)
    return str(path)


def _report(results):
    return "\n".join(map(str, results))


def _running(tmp_path):
    """Returns which of the family are still there."""
    return [path.suffix for path in tmp_path.glob("family.*") if os.path.exists(f"/proc/{path.suffix[1:]}")]


def _wait_for_family(tmp_path, members):
    end = time.monotonic() + 10
    while len(list(tmp_path.glob("family.*"))) < members:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_every_rank_knows_its_place():
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR"]
    show = f"import os, sys; print(*map(os.environ.get, {names + ['OMP_NUM_THREADS', 'EXTRA']}), sys.argv[1:])"
    results = launch_ranks(
        lambda rank: [*_PYTHON, "-c", show, f"argument-{rank}"], nodes=2, ranks_per_node=2, env={"EXTRA": "x"}
    )
    assert all(result.ok and not result.timed_out for result in results), _report(results)
    assert [(result.rank, result.node) for result in results] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert [result.stdout for result in results] == [
        f"{rank} 4 {rank % 2} 2 {rank // 2} {rank // 2} 127.0.0.1 1 x ['argument-{rank}']\n" for rank in range(4)
    ]


def test_a_failing_rank_is_reported_and_ends_the_others(tmp_path):
    fail = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit('rank one fails'); time.sleep(600)"
    results = launch_ranks([*_PYTHON, "-c", fail], ranks_per_node=2, failure_grace=0.1, log_directory=tmp_path / "logs")
    assert [result.returncode for result in results] == [None, 1]
    assert not any(result.ok or result.timed_out for result in results)
    assert max(result.seconds for result in results) < 10
    assert (tmp_path / "logs" / "rank-1.err").read_text() == results[1].stderr == "rank one fails\n"
    report = _report(results)
    assert "rank 0: stopped because another one had failed" in report
    assert "rank 1: exit code 1" in report and "--- stderr of rank 1\nrank one fails" in report


def test_others_may_go_on_after_a_failure():
    code = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(3); time.sleep(0.5)"
    results = launch_ranks([*_PYTHON, "-c", code], ranks_per_node=2, failure_grace=None)
    assert [result.returncode for result in results] == [0, 3]


def test_a_signal_is_reported():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    (result,) = launch_ranks([*_PYTHON, "-c", code])
    assert result.returncode == -signal.SIGKILL and "ended by signal 9" in str(result)


def test_a_command_that_does_not_exist():
    (result,) = launch_ranks(["/does/not/exist"])
    assert result.returncode == 127 and "cannot start /does/not/exist" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="finding adopted processes needs Linux")
@pytest.mark.parametrize("stays", [True, False], ids=["time-out", "leaves children"])
def test_no_process_is_left(tmp_path, stays):
    code = _FAMILY + ("time.sleep(600)" if stays else "")
    (result,) = launch_ranks([*_PYTHON, "-c", code, str(tmp_path / "family")], timeout=1.0 if stays else 30.0)
    assert result.timed_out == stays and result.returncode == (None if stays else 0)
    assert len(list(tmp_path.glob("family.*"))) == 3
    assert not _running(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="dying with the parent needs Linux")
def test_no_process_outlives_a_launcher_that_is_killed(tmp_path, quick_start):
    launcher = quick_start + "from danon_lightning.testing import launch_ranks; launch_ranks(sys.argv[1:])"
    rank = [*_PYTHON, "-c", _FAMILY + "time.sleep(600)", str(tmp_path / "family")]
    # Killed, it cannot remove its temporary folder.
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", launcher, *rank], env=env) as process:
        _wait_for_family(tmp_path, 3)
        assert len(_running(tmp_path)) == 3
        process.kill()
    end = time.monotonic() + 10
    while _running(tmp_path) and time.monotonic() < end:
        time.sleep(0.02)
    assert not _running(tmp_path)


def test_impossible_shapes():
    with pytest.raises(ValueError, match="at least one node"):
        launch_ranks(["true"], ranks_per_node=0)
    with pytest.raises(ValueError, match="at least one node"):
        torchrun(["script.py"], nodes=0, ranks_per_node=1)


def test_a_reserved_port_is_free_and_given_out_once(monkeypatch):
    with reserved_port() as first, reserved_port() as second:
        assert first != second
        with socket.create_server(("127.0.0.1", first)):
            pass
    # Only one port is left to choose from, and it is taken.
    monkeypatch.setattr("danon_lightning.testing.ports._FIRST", first)
    monkeypatch.setattr("danon_lightning.testing.ports._LAST", first + 1)
    with reserved_port():
        with pytest.raises(OSError, match="no free TCP port"), reserved_port():
            pass
    with socket.create_server(("", first)), pytest.raises(OSError, match="no free TCP port"), reserved_port():
        pass


@pytest.mark.hosts
def test_all_reduce_between_emulated_hosts(emulated_hosts, tmp_path):
    hosts = emulated_hosts(2)
    command = [sys.executable, _script(tmp_path, _ALL_REDUCE)]
    results = launch_ranks(command, nodes=2, ranks_per_node=2, hosts=hosts, timeout=60)
    assert all(result.ok for result in results), _report(results)
    assert [result.stdout for result in results] == [f"sum 6.0 of 4 in node {rank // 2}\n" for rank in range(4)]
    assert hosts.bytes_sent(1) > 0
    with pytest.raises(ValueError, match="3 nodes need as many hosts"):
        launch_ranks(command, nodes=3, hosts=hosts)


@pytest.mark.hosts
def test_torchrun_between_emulated_hosts(emulated_hosts, tmp_path):
    hosts = emulated_hosts(2)
    results = torchrun([_script(tmp_path, _ALL_REDUCE)], nodes=2, ranks_per_node=2, hosts=hosts, timeout=60)
    assert all(result.ok for result in results), _report(results)
    for node, result in enumerate(results):
        assert result.node == node
        assert result.stdout.splitlines() == [f"sum 6.0 of 4 in node {node}"] * 2


def test_torchrun_agents_share_this_machine_and_restart_their_ranks(tmp_path):
    text = """
import os, sys, time
mark = sys.argv[1] + os.environ["RANK"]
if not os.path.exists(mark):
    open(mark, "w").close()
    if os.environ["RANK"] == "1":
        sys.exit("rank one fails once")
    time.sleep(600)
print(*map(os.environ.get, ["RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"]))
"""
    results = torchrun(
        [_script(tmp_path, text), str(tmp_path / "mark")], nodes=2, ranks_per_node=1, max_restarts=1, timeout=60
    )
    assert all(result.ok for result in results), _report(results)
    # Without hosts the order of the agents is torchrun's.
    interface = "lo" if sys.platform == "linux" else "lo0"
    assert sorted(result.stdout for result in results) == [f"{rank} 2 127.0.0.1 {interface} 1\n" for rank in range(2)]
    assert sum("rank one fails once" in result.stderr for result in results) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="finding adopted processes needs Linux")
def test_torchrun_leaves_no_rank_when_another_agent_fails(tmp_path):
    code = "import os, sys; os.environ['RANK'] == '1' and sys.exit(3)\n" + _FAMILY + "time.sleep(600)"
    arguments = [_script(tmp_path, code), str(tmp_path / "family")]
    results = torchrun(arguments, nodes=2, ranks_per_node=1, failure_grace=1.0, timeout=60)
    # If it is the one with the store, the other fails by itself; else it is stopped.
    assert 1 in [result.returncode for result in results], _report(results)
    assert not any(result.ok or result.timed_out for result in results)
    assert len(list(tmp_path.glob("family.*"))) == 3
    assert not _running(tmp_path)
