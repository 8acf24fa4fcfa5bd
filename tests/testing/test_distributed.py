import importlib.util
import os
import signal
import sys
import time
from dataclasses import dataclass
from types import ModuleType

import pytest

# The ranks load this module. What it imports only where it is needed does not delay them.


@dataclass
class Scale:
    factor: float


def run_distributed(*args, **kwargs):
    from danon_lightning.testing import run_distributed

    return run_distributed(*args, **kwargs)


def _average(scale, extra):
    import torch
    import torch.distributed as dist

    tensor = torch.full((2,), scale.factor * dist.get_rank())
    dist.all_reduce(tensor)
    print("averaged")
    return Scale(tensor[0].item()), tensor + extra, os.environ["OMP_NUM_THREADS"]


def _place():
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK"]
    return [int(os.environ[name]) for name in names], os.environ.get("DANON_EXTRA")


def _second_rank_raises():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise KeyError("the second rank has had enough")
    dist.barrier()


def _second_rank_is_killed():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _leaves_early():
    os._exit(0)


def _second_rank_never_comes():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def _returns_something_unpicklable():
    return lambda: None


def _counts_bytes():
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(250_000))
    return int(os.environ["LOCAL_RANK"]), int(os.environ["GROUP_RANK"])


def test_returns_what_each_rank_returned(capsys):
    import torch

    results = run_distributed(_average, 2, Scale(3.0), torch.tensor([0.0, 1.0]))
    assert [result[0] for result in results] == [Scale(3.0), Scale(3.0)]
    assert all(result[1].tolist() == [3.0, 4.0] and result[2] == "1" for result in results)
    assert capsys.readouterr().out.splitlines() == ["[rank 0] averaged", "[rank 1] averaged"]


def test_nodes_are_simulated(monkeypatch):
    # What an outer torchrun has set must not reach the ranks.
    monkeypatch.setenv("RANK", "7")
    results = run_distributed(_place, 2, ranks_per_node=1, env={"DANON_EXTRA": "x"})
    assert results == [([rank, 2, 0, 1, rank, rank], "x") for rank in range(2)]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (_second_rank_raises, "KeyError: 'the second rank has had enough'"),
        (_second_rank_is_killed, "rank 1 died by signal 9"),
    ],
)
def test_the_failing_rank_is_reported_soon(function, text, way):
    from danon_lightning.testing import RankFailedError

    started = time.monotonic()
    with pytest.raises(RankFailedError, match=text) as caught:
        run_distributed(function, 2)
    assert caught.value.rank == 1
    assert ("Traceback" in caught.value.rank_traceback) == (function is _second_rank_raises)
    assert time.monotonic() - started < 30


def test_leaving_without_a_result_is_a_failure():
    with pytest.raises(RuntimeError, match="rank 0 ended early with exit code 0"):
        run_distributed(_leaves_early, 1)


def test_an_unpicklable_result_is_a_failure():
    with pytest.raises(RuntimeError, match="pickle"):
        run_distributed(_returns_something_unpicklable, 1)


def test_a_time_out_tells_where_the_ranks_are(way):
    # The shorter one suffices unless the machine is so busy that the ranks are still importing torch.
    for timeout in (4, 30):
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=f"not all ranks returned within {timeout} s") as caught:
            run_distributed(_second_rank_never_comes, 2, timeout=timeout)
        assert time.monotonic() - started < timeout + 5
        message = str(caught.value)
        assert "rank 0 was at" in message and "rank 1 was at" in message
        if message.count("in _second_rank_never_comes") == 2:
            return
    pytest.fail(message)


def test_a_module_that_cannot_be_imported_by_name(tmp_path, monkeypatch):
    # As in pytest's import mode "importlib", and with two test modules of the same name.
    path = tmp_path / "test_distributed.py"
    path.write_text("class Value:\n    pass\n\ndef identity(value):\n    return value, __name__\n")
    spec = importlib.util.spec_from_file_location("somewhere.test_distributed", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "somewhere", ModuleType("somewhere"))
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    ((value, name),) = run_distributed(module.identity, 1, module.Value())
    assert type(value) is module.Value and name == spec.name


def test_functions_and_classes_of_a_script(tmp_path, monkeypatch):
    path = tmp_path / "script.py"
    path.write_text(
        "class Value:\n    pass\n\ndef identity(value):\n    return value\n\n"
        "if __name__ == '__main__':\n    started = True\n"
    )
    # This is what `python script.py` does before it calls run_distributed.
    spec = importlib.util.spec_from_file_location("__main__", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.setitem(sys.modules, "__mp_main__", module)
    spec.loader.exec_module(module)
    assert module.started
    (value,) = run_distributed(module.identity, 1, module.Value())
    assert type(value) is module.Value


def test_only_functions_at_module_level():
    def inner():
        pass

    with pytest.raises(ValueError, match="inner.* is not at module level"):
        run_distributed(inner, 1)


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(0, None), (3, 2), (2, 3), (2, 0)])
def test_impossible_divisions(world_size, ranks_per_node):
    with pytest.raises(ValueError, match="nodes"):
        run_distributed(_place, world_size, ranks_per_node=ranks_per_node)


@pytest.mark.hosts
def test_runs_on_emulated_hosts(emulated_hosts):
    hosts = emulated_hosts(2)
    assert run_distributed(_counts_bytes, 2, hosts=hosts) == [(0, 0), (0, 1)]
    # A million bytes cross in each direction.
    assert all(1_000_000 < hosts.bytes_sent(host) < 1_300_000 for host in range(2))
