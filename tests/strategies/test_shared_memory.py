"""Ranks of one machine that hand bytes over in memory."""

import os
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed.constants import default_pg_timeout

from danon_lightning.strategies.communication import shared_memory
from danon_lightning.strategies.communication.levels import GroupLevel
from danon_lightning.strategies.communication.shared_memory import SharedMemoryLevel, mapping_bytes
from danon_lightning.strategies.communication.stats import CommunicationStats
from danon_lightning.testing import launch_ranks, run_distributed

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # each rank imports this file anew, and its neighbour with it
from plain_module import SHAPES, emulated_mesh, exchange, give, given_gradients, same_on_all_ranks  # noqa: E402

ROW_BYTES = 1000


def levels_of(size, timeout=20.0):
    """All ranks of a level in this process, to be used in a thread each."""
    sockets = [[None] * size for _ in range(size)]
    for one in range(size):
        for other in range(one + 1, size):
            sockets[one][other], sockets[other][one] = socket.socketpair()
    for connection in [c for row in sockets for c in row if c is not None]:
        connection.settimeout(timeout)
    memory = torch.zeros(mapping_bytes(size, ROW_BYTES), dtype=torch.uint8)
    ranks = [10 + index for index in range(size)]
    return [
        SharedMemoryLevel(ranks, index, sockets[index], memory, ROW_BYTES, CommunicationStats())
        for index in range(size)
    ]


def on_each(levels, function):
    """What the function returns, by rank; an error of any of them is raised."""
    with ThreadPoolExecutor(len(levels)) as threads:
        return list(threads.map(function, levels))


def say(sender, receiver, number, size):
    return torch.full((size,), (37 * sender + 11 * receiver + number) % 251, dtype=torch.uint8)


def hand_over(level, number, gathers):
    """One operation, with rows of uneven size; some are empty."""
    sizes = [(number * 97 + 61 * peer) % ROW_BYTES if (number + peer) % 4 else 0 for peer in range(level.size)]
    box = level.all_gather(sizes) if gathers else level.all_to_all(sizes)
    for peer in range(level.size):
        if peer == level.index or not gathers:
            box.outgoing[peer].copy_(say(level.index, 0 if gathers else peer, number, sizes[peer]))
    box.post()

    def finish():
        box.wait()
        for peer in range(level.size):
            size = sizes[peer] if gathers else sizes[level.index]
            expected = say(peer, 0 if gathers else level.index, number, size)
            assert torch.equal(box.incoming[peer], expected), (number, peer)
        box.release()

    return finish


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_rank_receives_what_the_others_have_sent_it(size):
    """Also with several operations under way, and with more of them than there are places in memory."""

    def exchange_much(level):
        waiting = []
        for number in range(200):
            waiting.append(hand_over(level, number, gathers=number % 3 == 0))
            while len(waiting) > number % 5:
                waiting.pop(0)()
        for finish in waiting:
            finish()
        return level.stats

    levels = levels_of(size)
    for stats in on_each(levels, exchange_much):
        assert stats.inter_node_bytes == 0
        assert (stats.intra_node_bytes > 0) == (size > 1)


def test_a_rank_may_leave_as_soon_as_it_has_all_it_needs():
    """It does not wait until the others have said that they have read, and they are not to mind."""
    first, second = levels_of(2)

    def exchange_once(level, before_release):
        box = level.all_gather([8, 8])
        box.outgoing[level.index].fill_(level.index)
        box.post()
        box.wait()
        before_release()
        assert [int(row[0]) for row in box.incoming] == [0, 1]
        box.release()

    gone = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(exchange_once, second, gone.wait)
        exchange_once(first, lambda: None)
        first.close()
        gone.set()
        slow.result()


def test_a_rank_that_has_ended_is_named():
    levels = levels_of(3)
    levels[1].close()
    for level in (levels[0], levels[2]):
        with pytest.raises(ConnectionError, match="rank 11, on this node, has"):
            box = level.all_gather([8, 8, 8])
            box.post()
            box.wait()


def test_a_rank_that_does_not_come_is_named():
    first, _ = levels_of(2, timeout=0.2)
    box = first.all_to_all([8, 8])
    box.post()
    with pytest.raises(TimeoutError, match="rank 11, on this node, did not come to this point in time"):
        box.wait()


def test_too_many_operations_under_way_are_an_error_and_do_not_overwrite_one_another():
    first, _ = levels_of(2)
    with pytest.raises(RuntimeError, match="more than 64 messages are under way"):
        for _ in range(65):
            first.all_gather([8, 8])


def test_tokens_may_come_in_pieces():
    first, second = levels_of(2)
    (sending,) = [connection for connection in second._sockets if connection is not None]
    box = first.all_gather([8, 8])
    second.all_gather([8, 8]).outgoing[1].fill_(7)
    token = shared_memory._TOKEN.pack(shared_memory._FILLED, 1, 0)

    def dribble():
        for byte in token:
            sending.sendall(bytes([byte]))
            time.sleep(0.01)

    thread = threading.Thread(target=dribble)
    thread.start()
    box.wait()
    thread.join()
    assert (box.incoming[1] == 7).all()


# ---- in processes


def level_of(communicator):
    return type(communicator._exchange.inner)


def check_use_and_fallback(folder):
    """With memory that cannot be shared, for whatever reason, everything is the same over gloo."""
    results = {}
    for reason in (None, "no mapping", "no memory file", "no descriptor", "no socket", "long path"):
        for nodes, ranks in [(1, 2), (2, 2)]:
            with emulated_mesh(nodes, ranks, folder) as mesh:
                if mesh is None:
                    continue
                start = time.monotonic()
                with pytest.MonkeyPatch.context() as patch:
                    break_it(patch, reason, mesh, folder)
                    with exchange(mesh, "int8" if nodes > 1 else None) as (ddp, communicator):
                        patch.undo()
                        expected = SharedMemoryLevel if reason is None else GroupLevel
                        assert level_of(communicator) is expected, f"{reason}: {level_of(communicator)}"
                        assert time.monotonic() - start < 20, f"{reason}: found out after a long wait only"
                        if reason is None:  # a rank that hangs is waited for as long as over gloo
                            waits = {c.gettimeout() for c in communicator._exchange.inner._sockets if c is not None}
                            assert waits == {default_pg_timeout.total_seconds()}
                        delivered = [give(ddp, given_gradients(step, mesh.rank)) for step in range(2)]
                        stats = communicator.stats()
                        key = nodes, "bytes"
                        bytes_sent = stats["intra_node_bytes"], stats["inter_node_bytes"]
                        assert bytes_sent == results.setdefault(key, bytes_sent), reason
                        for step, gradients in enumerate(delivered):
                            assert same_on_all_ranks(gradients)
                            before = results.setdefault((nodes, step), gradients)
                            assert all(torch.equal(gradients[name], before[name]) for name in SHAPES), reason


def break_it(patch, reason, mesh, folder):
    def refuse(*args, **options):
        raise OSError(f"{reason} here")

    if reason == "no mapping" and mesh.local_rank == 1:
        patch.setattr(shared_memory.mmap, "mmap", refuse)
    if reason == "no memory file" and mesh.local_rank == 0:
        patch.setattr(os, "memfd_create", refuse)
    if reason == "no descriptor" and mesh.local_rank == 1:
        patch.setattr(socket, "recv_fds", refuse)
    if reason == "no socket" and mesh.local_rank == 1:  # as where the first rank's folder is not to be seen
        patch.setattr(socket.socket, "bind", refuse)
    if reason == "long path":
        long = Path(folder, "x" * 100)
        long.mkdir(exist_ok=True)
        patch.setattr(tempfile, "tempdir", str(long))


@pytest.mark.slow
def test_ranks_that_cannot_share_memory_use_gloo_with_equal_results(tmp_path):
    run_distributed(check_use_and_fallback, 4, str(tmp_path), timeout=250)


LEFT = """
import os, signal, sys, time
sys.path.insert(0, {here!r})
import torch.distributed as dist
from danon_lightning.strategies import Mesh
from plain_module import exchange, give, given_gradients

dist.init_process_group("gloo")
rank = dist.get_rank()
with exchange(Mesh(1, 2, rank)) as (ddp, communicator):
    for step in range(2):
        give(ddp, given_gradients(step, rank))
    assert type(communicator._exchange.inner).__name__ == "SharedMemoryLevel"
    dist.barrier()
    if {kill}:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kill", [False, True])
def test_nothing_is_left_behind(tmp_path, kill):
    folder = tmp_path / "temporary"
    folder.mkdir()
    before = set(os.listdir("/dev/shm"))
    results = launch_ranks(
        [sys.executable, "-c", LEFT.format(here=str(HERE), kill=kill)], ranks_per_node=2, env={"TMPDIR": str(folder)}
    )
    assert [result.returncode for result in results] == [-9 if kill else 0] * 2, "\n".join(map(str, results))
    assert list(folder.glob("danon-*")) == []
    assert set(os.listdir("/dev/shm")) - before == set()
