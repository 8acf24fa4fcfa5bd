import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The ranks load this module. What it imports only where it is needed does not delay those that are not forked.

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux ranks are forked")


def run_distributed(*args, **kwargs):
    from danon_lightning.testing import run_distributed

    return run_distributed(*args, **kwargs)


@pytest.fixture
def forking():
    from danon_lightning.testing import forking

    return forking


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def server_of_this_rank():
    return parent_of(os.getppid())


def what_a_rank_sees():
    """Returns what is the same in each process that is started in the same way, and what is drawn by chance."""
    imported = "lightning.pytorch" in sys.modules
    import gc
    import random
    import resource
    import tempfile

    import numpy
    import torch
    from lightning.pytorch.utilities import rank_zero_only
    from torchmetrics.utilities.prints import rank_zero_only as rank_zero_only_of_metrics

    print("to stdout")
    print("to stderr", file=sys.stderr)
    same = {
        "environment": {name: value for name, value in os.environ.items() if name != "MASTER_PORT"},
        "arguments": sys.argv,
        "main program": sys.modules["__main__"].__file__,
        "folder": os.getcwd(),
        "import path": sys.path,
        "flags": str(sys.flags),
        "streams": [(s.encoding, s.errors, s.line_buffering, s.isatty()) for s in (sys.stdin, sys.stdout, sys.stderr)],
        "input": os.readlink("/proc/self/fd/0"),
        "files": len(os.listdir("/proc/self/fd")),
        "signal handlers": {number: str(signal.getsignal(number)) for number in signal.valid_signals()},
        "blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "leads its process group": os.getpgid(0) == os.getpid(),
        "session": os.getsid(0) == os.getppid(),
        "limits": [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")],
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), len(os.listdir("/proc/self/task"))),
        "ranks": (rank_zero_only.rank, rank_zero_only_of_metrics.rank),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "temporary files": tempfile.gettempdir(),
        "can use CUDA": not torch.cuda._is_in_bad_fork(),
    }
    return imported, same, (random.random(), numpy.random.rand(), torch.initial_seed(), torch.rand(1).item())


def number_of_threads():
    import torch

    return torch.get_num_threads(), server_of_this_rank()


def ends_with_a_code_of_its_own():
    import atexit

    atexit.register(os._exit, 7)


def kills_the_server():
    os.kill(server_of_this_rank(), signal.SIGKILL)


def test_a_forked_rank_sees_what_a_new_process_sees(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    env = {"DANON_EXTRA": "x", "PL_GLOBAL_SEED": "4"}
    forked = run_distributed(what_a_rank_sees, 2, env=env)
    printed = capsys.readouterr()
    monkeypatch.setattr("danon_lightning.testing.distributed.fork_server", lambda env: None)
    fresh = run_distributed(what_a_rank_sees, 2, env=env)
    assert capsys.readouterr() == printed and "[rank 1] to stdout" in printed.out

    assert all(imported for imported, *_ in forked) and not any(imported for imported, *_ in fresh)
    for (_, found, _), (_, expected, _) in zip(forked, fresh, strict=True):
        assert {name for name in expected if found[name] != expected[name]} == set()
    assert forked[1][1]["ranks"] == (1, 1) and forked[1][1]["folder"] == str(tmp_path)
    # Nobody draws what another one has drawn.
    for drawn in zip(*(rank[2] for rank in (*forked, *fresh)), strict=True):
        assert len(set(drawn)) == 4


def test_the_end_of_the_interpreter_counts(way):
    with pytest.raises(RuntimeError, match="rank 0 ended early with exit code 7"):
        run_distributed(ends_with_a_code_of_its_own, 1)


def test_variables_that_imports_read_have_a_server_of_their_own(forking):
    ((threads, server),) = run_distributed(number_of_threads, 1)
    ((more_threads, other_server),) = run_distributed(number_of_threads, 1, env={"OMP_NUM_THREADS": "2"})
    assert (threads, more_threads) == (1, 2) and server != other_server
    assert run_distributed(number_of_threads, 1) == [(threads, server)]

    # A fork of this process, such as a worker of a DataLoader, keeps no server alive.
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writes)
        os.read(reads, 1)
        os._exit(len(forking._servers))
    [found] = [candidate for candidate in forking._servers.values() if candidate._process.pid == other_server]
    found.stop()
    os.close(reads)
    os.close(writes)
    assert found._process.returncode == 0 and not found.alive
    assert os.waitpid(child, 0)[1] == 0


def test_ranks_outlive_the_server_and_the_next_ones_have_a_new_one():
    ((_, server),) = run_distributed(number_of_threads, 1)
    assert run_distributed(kills_the_server, 2) == [None, None]
    ((_, next_server),) = run_distributed(number_of_threads, 1)
    assert next_server != server


@pytest.mark.parametrize("code", ["import sys; sys.exit('no imports today')", "import time; time.sleep(600)"])
def test_without_a_server_ranks_are_new_processes(code, tmp_path, monkeypatch, forking):
    (tmp_path / "server.py").write_text(code)
    monkeypatch.setattr(forking, "_SERVER", tmp_path / "server.py")
    monkeypatch.setattr(forking, "_IMPORT_SECONDS", 0.5)
    monkeypatch.setattr(forking, "_servers", {})
    monkeypatch.setattr(forking, "_given_up", False)
    reason = "no imports today" if "exit" in code else "timed out"
    with pytest.warns(RuntimeWarning, match=f"ranks start slowly.*{reason}") as caught:
        assert [forking.fork_server(os.environ) for _ in range(2)] == [None, None]
    assert len(caught) == 1


def test_a_server_that_cannot_fork_is_given_up(monkeypatch, forking):
    def fail(*args, **kwargs):
        raise OSError("it could not fork")

    monkeypatch.setattr(forking.ForkServer, "start", fail)
    monkeypatch.setattr(forking, "_given_up", False)
    with pytest.warns(RuntimeWarning, match="it could not fork") as caught:
        assert len(run_distributed(server_of_this_rank, 2)) == 2
    assert len(caught) == 1 and forking.fork_server(os.environ) is None


def test_a_server_with_threads_is_not_forked():
    (folder,) = importlib.util.find_spec("danon_lightning").submodule_search_locations
    code = f"""
import sys, threading, time
sys.path.insert(0, {folder + "/testing"!r})
import fork_server
print(fork_server._threads())
threading.Thread(target=time.sleep, args=[600], daemon=True).start()
print(len(fork_server._threads()))
"""
    found = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n1\n"


def test_no_process_outlives_a_parent_that_is_killed(tmp_path, quick_start):
    # The rank, its supervisor and the server; a child in a session of its own, and a grandchild whose parent has gone.
    script = tmp_path / "script.py"
    script.write_text(f"""{quick_start}
import os, subprocess, time

def family(folder):
    def note(pid):
        open(f"{{folder}}/family.{{pid}}", "w").close()
    supervisor = os.getppid()
    with open(f"/proc/{{supervisor}}/stat") as file:
        note(file.read().rpartition(")")[2].split()[1])
    note(supervisor)
    note(os.getpid())
    note(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            note(os.getpid())
            time.sleep(600)
        os._exit(0)
    time.sleep(600)

if __name__ == "__main__":
    from danon_lightning.testing import run_distributed
    run_distributed(family, 1, sys.argv[1])
""")
    # Killed, it cannot remove its temporary folder.
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=env) as process:
        end = time.monotonic() + 120
        while len(list(tmp_path.glob("family.*"))) < 5:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        members = [path.suffix[1:] for path in tmp_path.glob("family.*")]
        assert all(os.path.exists(f"/proc/{pid}") for pid in members)
        process.kill()
    end = time.monotonic() + 10
    while (left := [pid for pid in members if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < end:
        time.sleep(0.02)
    assert not left
