"""Which traffic crosses the network: that of pipelines or that of replicas."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from danon_lightning.strategies.communication.compressors import Compressor, LinearCompressor
from danon_lightning.strategies.communication.messages import travels_dense
from danon_lightning.strategies.mesh import Mesh
from danon_lightning.strategies.pipeline.schedules import Schedule

# A step by which densities that are lowered in the course of training have come to their end.
_SETTLED = 1_000_000


@dataclass(frozen=True)
class Traffic:
    """What all nodes together send to other nodes in a training step, in bytes.

    Attributes:
        gradients: From replica to replica.
        activations: From stage to stage, and their gradients back.
    """

    gradients: float
    activations: float

    @property
    def total(self) -> float:
        """Both."""
        return self.gradients + self.activations

    def __str__(self) -> str:
        """Such as ``12.5 MB of gradients and 0 MB of activations``."""
        return f"{self.gradients / 1e6:.3g} MB of gradients and {self.activations / 1e6:.3g} MB of activations"


def traffic_between_nodes(
    mesh: Mesh, schedule: Schedule, gradients: Sequence[float], activations: Sequence[float], *, hierarchical: bool
) -> Traffic:
    """What a placement of the ranks costs.

    Args:
        mesh: The placement.
        schedule: Which rank of a pipeline has which stage.
        gradients: Bytes of the gradients that each rank of a pipeline exchanges, coded if they are.
        activations: Bytes that enter each stage but the first in a step of one replica.
        hierarchical: Whether gradients are summed inside nodes first, so that each node sends and receives them once.
    """
    replicas = mesh.data_parallel_size
    of_gradients = 0.0
    for pipeline_rank, size in enumerate(gradients):
        nodes = [mesh.node_of(rank) for rank in mesh.ranks_across_replicas(pipeline_rank)]
        if hierarchical:
            of_gradients += 2 * (len(set(nodes)) - 1) * size
        else:
            # Every rank sends a share to every other one, and gets one from it: sums, then means.
            apart = sum(one != other for one in nodes for other in nodes)
            of_gradients += 2 * apart * size / replicas
    of_activations = 0.0
    for replica in range(replicas):
        nodes = [mesh.node_of(rank) for rank in mesh.ranks_of_replica(replica)]
        stages = [nodes[schedule.rank_of(stage)] for stage in range(schedule.stages)]
        for (before, after), size in zip(pairwise(stages), activations, strict=True):
            of_activations += 2 * size * (before != after)
    return Traffic(of_gradients, of_activations)


def gradient_bytes(parameter: Tensor, compressor: Compressor | LinearCompressor | None, nodes: int) -> float:
    """What is exchanged of the gradient of a parameter, once training has settled.

    Args:
        parameter: Perhaps on the meta device.
        compressor: What large ones are coded with.
        nodes: How many exchange codes. Where each must get the codes of all others, and not their sum, this counts.
    """
    dense = float(parameter.numel() * parameter.element_size())
    if compressor is None or travels_dense(parameter, compressor):
        return dense
    if isinstance(compressor, LinearCompressor):
        return 4.0 * (compressor.code_numel(parameter.shape) or 0)
    if compressor.prefers_dense(_SETTLED, nodes):
        return dense
    coded = compressor.payload_bytes(parameter.numel(), _SETTLED)
    return coded * nodes / 2 if compressor.exchange == "gather" else coded
