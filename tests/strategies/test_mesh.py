import pytest

from danon_lightning.strategies import Mesh


def test_ranks_are_numbered_node_by_node():
    mesh = Mesh(num_nodes=3, ranks_per_node=2, rank=3)
    assert (mesh.world_size, mesh.node, mesh.local_rank) == (6, 1, 1)
    assert (mesh.data_parallel_size, mesh.data_parallel_rank) == (6, 3)
    assert mesh.ranks_of_node(1) == [2, 3]
    assert mesh.ranks_across_nodes(1) == [1, 3, 5]
    assert [mesh.node_of(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert str(mesh) == "3 nodes × 2 ranks"


@pytest.mark.parametrize("rank", range(6))
def test_every_rank_lies_in_one_node_and_one_row_across_nodes(rank):
    mesh = Mesh.from_world(6, 2, rank)
    assert set(mesh.ranks_of_node(mesh.node)) & set(mesh.ranks_across_nodes(mesh.local_rank)) == {rank}


def test_uneven_nodes_are_refused_with_the_number_to_change():
    with pytest.raises(ValueError, match=r"world size 5 does not divide over num_nodes=2.*change num_nodes"):
        Mesh.from_world(5, 2, 0)


@pytest.mark.parametrize(("nodes", "ranks", "rank"), [(0, 1, 0), (1, 0, 0), (1, 2, 2), (1, 2, -1)])
def test_impossible_meshes_are_refused(nodes, ranks, rank):
    with pytest.raises(ValueError):
        Mesh(nodes, ranks, rank)
