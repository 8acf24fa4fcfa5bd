import pytest

from danon_lightning.strategies import Mesh


def test_ranks_are_numbered_node_by_node():
    mesh = Mesh(num_nodes=3, ranks_per_node=2, rank=3)
    assert (mesh.world_size, mesh.node, mesh.local_rank) == (6, 1, 1)
    assert (mesh.data_parallel_size, mesh.data_parallel_rank) == (6, 3)
    assert mesh.ranks_of_node(1) == [2, 3]
    assert mesh.groups_across_nodes() == [[0, 2, 4], [1, 3, 5]]
    assert mesh.groups_inside_nodes() == [[0, 1], [2, 3], [4, 5]]
    assert [mesh.node_of(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert str(mesh) == "3 nodes × 2 ranks"


@pytest.mark.parametrize("rank", range(6))
def test_every_rank_lies_in_one_node_and_one_row_across_nodes(rank):
    mesh = Mesh.from_world(6, 2, rank)
    [inside] = [group for group in mesh.groups_inside_nodes() if rank in group]
    [across] = [group for group in mesh.groups_across_nodes() if rank in group]
    assert inside == mesh.ranks_of_node(mesh.node)
    assert set(inside) & set(across) == {rank}


@pytest.mark.parametrize(("nodes", "ranks", "size"), [(1, 4, 2), (2, 4, 2), (2, 2, 4), (4, 2, 4), (2, 3, 3), (3, 1, 1)])
def test_replicas_are_grouped_by_the_part_that_they_hold(nodes, ranks, size):
    mesh = Mesh(nodes, ranks, 0, size)
    for groups in (mesh.groups_of_replicas(), mesh.groups_inside_nodes(), mesh.groups_across_nodes()):
        assert sorted(sum(groups, [])) == list(range(mesh.world_size))
        assert all(len({rank % size for rank in group}) == 1 for group in groups)
    assert all(len({mesh.node_of(rank) for rank in group}) == 1 for group in mesh.groups_inside_nodes())
    for group in mesh.groups_across_nodes():
        assert len({mesh.node_of(rank) for rank in group}) == len(group)


@pytest.mark.parametrize(("nodes", "ranks", "size"), [(1, 4, 2), (2, 4, 2), (2, 2, 4), (4, 2, 4), (4, 2, 2), (2, 2, 2)])
def test_pipelines_may_be_across_nodes(nodes, ranks, size):
    meshes = [Mesh(nodes, ranks, rank, size, pipelines_across_nodes=True) for rank in range(nodes * ranks)]
    for mesh in meshes:
        assert mesh.rank_at(mesh.data_parallel_rank, mesh.pipeline_rank) == mesh.rank
        assert mesh.rank in mesh.ranks_of_replica(mesh.data_parallel_rank)
        assert mesh.rank in mesh.ranks_across_replicas(mesh.pipeline_rank)
    mesh = meshes[0]
    for groups in (mesh.groups_of_replicas(), mesh.groups_inside_nodes(), mesh.groups_across_nodes()):
        assert sorted(sum(groups, [])) == list(range(mesh.world_size))
        assert all(len({meshes[rank].pipeline_rank for rank in group}) == 1 for group in groups)
    assert all(len({mesh.node_of(rank) for rank in group}) == 1 for group in mesh.groups_inside_nodes())
    for group in mesh.groups_across_nodes():
        assert len({mesh.node_of(rank) for rank in group}) == len(group)
    if nodes == size:
        assert all(len({mesh.node_of(rank) for rank in group}) == 1 for group in mesh.groups_of_replicas())


def test_pipelines_fit_into_nodes_or_take_whole_ones():
    with pytest.raises(
        ValueError, match="ranks that hold the same layers=3 must divide the number of ranks on a node, 2"
    ):
        Mesh(3, 2, 0, 2, pipelines_across_nodes=True)
    with pytest.raises(ValueError, match="must divide the number of ranks on a node, 3, or be a multiple of it"):
        Mesh(2, 3, 0, 2)
    with pytest.raises(ValueError, match="pipeline_parallel_size=3 must divide the number of ranks, 4"):
        Mesh(2, 2, 0, 3)


def test_uneven_nodes_are_refused_with_the_number_to_change():
    with pytest.raises(ValueError, match=r"world size 5 does not divide over num_nodes=2.*change num_nodes"):
        Mesh.from_world(5, 2, 0)


@pytest.mark.parametrize(("nodes", "ranks", "rank"), [(0, 1, 0), (1, 0, 0), (1, 2, 2), (1, 2, -1)])
def test_impossible_meshes_are_refused(nodes, ranks, rank):
    with pytest.raises(ValueError):
        Mesh(nodes, ranks, rank)
