"""Where each rank stands: nodes × local ranks, and replicas × ranks of a pipeline."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """The layout of a job's ranks, as seen from one of them.

    Ranks are numbered node by node: rank = node · ranks_per_node + local rank. The ranks of a pipeline, which hold one
    replica of the model between them, follow one another: rank = replica · pipeline_parallel_size + pipeline rank. So
    pipelines are inside nodes as far as possible. Or the ranks that hold the same part of the model follow one another:
    rank = pipeline rank · data_parallel_size + replica. So these are inside nodes, and pipelines across them.

    Args:
        num_nodes: Number of nodes (hosts), at least 1.
        ranks_per_node: Number of ranks (processes, one a device) on each node, at least 1.
        rank: Global rank of this process.
        pipeline_parallel_size: Number of ranks that share a replica.
        pipelines_across_nodes: Whether pipelines are across nodes.

    Raises:
        ValueError: If a size is not positive, ``rank`` lies outside the mesh, or the ranks cannot be shared out evenly
            among replicas.
    """

    num_nodes: int
    ranks_per_node: int
    rank: int
    pipeline_parallel_size: int = 1
    pipelines_across_nodes: bool = False

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.num_nodes < 1 or self.ranks_per_node < 1:
            raise ValueError(
                f"a mesh needs at least one node with one rank, got num_nodes={self.num_nodes} and "
                f"ranks_per_node={self.ranks_per_node}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank={self.rank} lies outside a mesh of {self.num_nodes} node(s) × {self.ranks_per_node} rank(s)"
            )
        size = self.pipeline_parallel_size
        if size < 1 or self.world_size % size:
            raise ValueError(
                f"pipeline_parallel_size={size} must divide the number of ranks, {self.world_size}: each replica of "
                "the model takes that many"
            )
        together = self.data_parallel_size if self.pipelines_across_nodes else size
        if self.ranks_per_node % together and together % self.ranks_per_node:
            what = "ranks that hold the same layers" if self.pipelines_across_nodes else "pipeline_parallel_size"
            raise ValueError(
                f"{what}={together} must divide the number of ranks on a node, {self.ranks_per_node}, or be a multiple "
                "of it: they shall take whole nodes, or a node whole groups of them"
            )

    @classmethod
    def from_world(
        cls,
        world_size: int,
        num_nodes: int,
        rank: int,
        pipeline_parallel_size: int = 1,
        pipelines_across_nodes: bool = False,
    ) -> "Mesh":
        """Lay ``world_size`` ranks out over ``num_nodes`` nodes.

        Raises:
            ValueError: If the ranks cannot be shared out evenly; the message says which number to change.
        """
        if num_nodes < 1 or world_size % num_nodes:
            raise ValueError(
                f"world size {world_size} does not divide over num_nodes={num_nodes}: start the same number of ranks "
                f"on every node (a world size of {_nearest_multiple(world_size, num_nodes)}), or change num_nodes"
            )
        return cls(num_nodes, world_size // num_nodes, rank, pipeline_parallel_size, pipelines_across_nodes)

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return self.num_nodes * self.ranks_per_node

    @property
    def node(self) -> int:
        """Index of this rank's node."""
        return self.rank // self.ranks_per_node

    @property
    def local_rank(self) -> int:
        """Index of this rank on its node."""
        return self.rank % self.ranks_per_node

    @property
    def data_parallel_size(self) -> int:
        """Number of model replicas."""
        return self.world_size // self.pipeline_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Which replica this rank belongs to: what a sampler shares the data out by."""
        if self.pipelines_across_nodes:
            return self.rank % self.data_parallel_size
        return self.rank // self.pipeline_parallel_size

    @property
    def pipeline_rank(self) -> int:
        """Which of the ranks that share its replica this one is."""
        if self.pipelines_across_nodes:
            return self.rank // self.data_parallel_size
        return self.rank % self.pipeline_parallel_size

    def rank_at(self, replica: int, pipeline_rank: int) -> int:
        """The global rank that holds a part of a replica."""
        if self.pipelines_across_nodes:
            return pipeline_rank * self.data_parallel_size + replica
        return replica * self.pipeline_parallel_size + pipeline_rank

    def ranks_of_replica(self, replica: int) -> list[int]:
        """Global ranks that share one replica, in the order of the pipeline."""
        return [self.rank_at(replica, rank) for rank in range(self.pipeline_parallel_size)]

    def ranks_across_replicas(self, pipeline_rank: int) -> list[int]:
        """Global ranks that hold the same part of the model, one a replica, in order."""
        return [self.rank_at(replica, pipeline_rank) for replica in range(self.data_parallel_size)]

    def node_of(self, rank: int) -> int:
        """Index of the node that ``rank`` runs on."""
        return rank // self.ranks_per_node

    def ranks_of_node(self, node: int) -> list[int]:
        """Global ranks of one node, in order."""
        return [node * self.ranks_per_node + local for local in range(self.ranks_per_node)]

    @property
    def replicas_per_node(self) -> int:
        """Ranks of a node that hold the same part of the model: 1 also where a replica takes several nodes."""
        if self.pipelines_across_nodes:
            return min(self.ranks_per_node, self.data_parallel_size)
        return max(1, self.ranks_per_node // self.pipeline_parallel_size)

    def groups_of_replicas(self) -> list[list[int]]:
        """The ranks that average their gradients: those that hold the same part of the model, for each part."""
        return [self.ranks_across_replicas(rank) for rank in range(self.pipeline_parallel_size)]

    def groups_inside_nodes(self) -> list[list[int]]:
        """The same, where all of a group are on one node."""
        size = self.replicas_per_node
        return [group[at : at + size] for group in self.groups_of_replicas() for at in range(0, len(group), size)]

    def groups_across_nodes(self) -> list[list[int]]:
        """The same, with one rank of each node (or of each replica that takes several)."""
        size = self.replicas_per_node
        return [group[at::size] for group in self.groups_of_replicas() for at in range(size)]

    def __str__(self) -> str:
        """For tables: ``2 nodes × 4 ranks``."""
        nodes = "node" if self.num_nodes == 1 else "nodes"
        ranks = "rank" if self.ranks_per_node == 1 else "ranks"
        return f"{self.num_nodes} {nodes} × {self.ranks_per_node} {ranks}"


def _nearest_multiple(value: int, of: int) -> int:
    return max(1, round(value / max(1, of))) * max(1, of)
