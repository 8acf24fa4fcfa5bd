"""Who exchanges with whom, and whether the ranks are where the mesh says."""

import os
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from danon_lightning.strategies import GradientCommunicator, Mesh
from danon_lightning.strategies.communication.layout import (
    check_hierarchical,
    check_placement,
    node_identity,
    uses_two_levels,
)
from danon_lightning.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbour with it
from plain_module import Given, exchange, give, given_gradients, same_on_all_ranks  # noqa: E402


@pytest.mark.parametrize(
    ("nodes", "ranks", "identities"),
    [
        (2, 2, [0, 0, 1, 1]),
        (2, 2, [7, 7, 7, 7]),  # one machine that plays two; or nodes that do not know their numbers
        (3, 1, [2, 0, 1]),
        (1, 3, [5, 5, 5]),
        (2, 3, [1, 1, 1, 0, 0, 0]),
    ],
)
def test_ranks_numbered_node_by_node_are_accepted(nodes, ranks, identities):
    check_placement(Mesh(nodes, ranks, 0), identities)


@pytest.mark.parametrize(
    ("nodes", "ranks", "identities", "pair"),
    [
        (2, 2, [0, 1, 0, 1], "0 and 1"),
        (2, 2, [0, 0, 0, 1], "2 and 3"),
        (2, 3, [0, 0, 1, 1, 0, 1], "0 and 2"),
        (1, 4, [0, 0, 1, 1], "0 and 2"),  # the job says that there is one node only
    ],
)
def test_interleaved_ranks_are_refused_with_the_remedy(nodes, ranks, identities, pair):
    with pytest.raises(ValueError, match=rf"ranks {pair} are taken to be on the same node.*--distribution=block"):
        check_placement(Mesh(nodes, ranks, 0), identities)


@pytest.mark.parametrize("ranks_first", [0, 3])
def test_every_rank_finds_the_same_fault(ranks_first):
    with pytest.raises(ValueError, match="ranks 0 and 1 are taken to be on the same node"):
        check_placement(Mesh(2, 2, ranks_first), [0, 1, 0, 1])


def test_nodes_are_told_apart_by_what_launchers_say_and_else_by_their_name(monkeypatch):
    names = ("GROUP_RANK", "SLURM_NODEID", "NODE_RANK")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.gethostname", lambda: "node-a")
    by_name = node_identity()
    assert by_name == node_identity()
    monkeypatch.setattr("socket.gethostname", lambda: "node-b")
    assert node_identity() != by_name
    assert 0 <= by_name < 2**63
    for number, name in reversed(list(enumerate(names, 3))):  # each goes before those set so far
        monkeypatch.setenv(name, str(number))
        assert node_identity() == number
    monkeypatch.setenv("GROUP_RANK", "")
    assert node_identity() == 4


@pytest.mark.parametrize(
    ("nodes", "ranks", "hierarchical", "two"),
    [
        (2, 2, "auto", True),
        (2, 2, True, True),
        (2, 2, False, False),
        (1, 4, "auto", False),
        (4, 1, "auto", False),
        (1, 4, False, False),
    ],
)
def test_two_levels_are_used_where_there_are_several_nodes_with_several_ranks(nodes, ranks, hierarchical, two):
    assert uses_two_levels(Mesh(nodes, ranks, 0), hierarchical) is two


def test_two_levels_need_two_levels():
    for nodes, ranks, mesh in [(1, 2, "1 node × 2 ranks"), (2, 1, "2 nodes × 1 rank")]:
        with pytest.raises(ValueError, match=f"hierarchical=True needs several nodes.*{mesh}.*use hierarchical='auto'"):
            uses_two_levels(Mesh(nodes, ranks, 0), True)
    for value in ("no", None, 2):
        with pytest.raises(ValueError, match=f"hierarchical={value!r} must be True, False or 'auto'"):
            check_hierarchical(value)


def refuse_a_misplaced_job():
    rank = dist.get_rank()
    mesh = Mesh(2, 2, rank)
    os.environ["GROUP_RANK"] = str(rank % 2)  # as mpirun --map-by node places them
    with pytest.raises(ValueError, match="ranks 0 and 1 are taken to be on the same node.*placed in turns"):
        GradientCommunicator(Given(), mesh)
    with pytest.raises(ValueError, match="hierarchical=True needs several nodes.*1 node × 4 ranks"):
        os.environ["GROUP_RANK"] = "0"
        GradientCommunicator(Given(), Mesh(1, 4, rank), hierarchical=True)
    for identity in ("0", str(rank // 2)):
        os.environ["GROUP_RANK"] = identity
        with exchange(mesh) as (ddp, communicator):
            assert same_on_all_ranks(give(ddp, given_gradients(0, rank)))
            stats = communicator.stats()
            assert stats["inter_node_bytes"] > 0 < stats["intra_node_bytes"]
    return True


def test_a_misplaced_job_is_refused_on_every_rank_and_a_sound_one_runs():
    assert run_distributed(refuse_a_misplaced_job, 4) == [True] * 4
