"""What is compared: plain DistributedDataParallel, torch's own hooks, and the exchanges of this package."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from danon_lightning.benchmark.communication import formulas
from danon_lightning.benchmark.communication.workload import MATRICES, Workload
from danon_lightning.strategies import GradientCommunicator, Mesh

ALONE, FLAT, DENSE = "alone", "flat", "dense"


class Exchange(Protocol):
    """What a variant of this package leaves behind on a model: it counts bytes and has to be closed."""

    def stats(self) -> dict[str, Any]:
        """Counts since the start, ``inter_node_bytes`` among them."""
        ...

    def close(self) -> None:
        """End it."""
        ...


# Called on each rank, with the number of nodes, before the first step.
Attach = Callable[[DistributedDataParallel, int], Exchange | None]


@dataclass(frozen=True)
class Variant:
    """One way to exchange gradients.

    Attributes:
        name: What it goes by on the command line and in results.
        description: A few words of help.
        attach: Sets it up on a model: a function at module level (or a partial of one), as it travels to the ranks.
        formula: Bytes that should leave a node in one exchange.
        ours: Whether it is of this package.
        isolated: Whether it is known to hang, and so runs in processes of its own after all others.
    """

    name: str
    description: str
    attach: Attach
    formula: Callable[[Workload], float]
    ours: bool = False
    isolated: bool = False


def _keep(state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def attach_nothing(ddp: DistributedDataParallel, nodes: int) -> None:
    """Leave the gradients of each rank as they are."""
    ddp.register_comm_hook(None, _keep)


def attach_default(ddp: DistributedDataParallel, nodes: int) -> None:
    """Leave the model as it is."""


def attach_torch_fp16(ddp: DistributedDataParallel, nodes: int) -> None:
    """Register torch's hook that sends half precision."""
    ddp.register_comm_hook(None, fp16_compress_hook)


def attach_torch_powersgd(ddp: DistributedDataParallel, nodes: int) -> None:
    """Register torch's low-rank hook, which begins in its third step."""
    state = PowerSGDState(None, matrix_approximation_rank=formulas.POWERSGD_RANK, start_powerSGD_iter=2)
    ddp.register_comm_hook(state, powerSGD_hook)


def attach_communicator(compression: str | None, ddp: DistributedDataParallel, nodes: int) -> Exchange:
    """Register a gradient communicator of this package."""
    mesh = Mesh.from_world(dist.get_world_size(), nodes, dist.get_rank())
    communicator = GradientCommunicator(ddp, mesh, compression=compression)
    ddp.register_comm_hook(communicator, communicator.hook)
    return communicator


def _flat(bytes_per_element: float) -> Callable[[Workload], float]:
    return lambda w: formulas.flat_ring(w.elements, w.nodes, w.ranks_per_node, bytes_per_element)


def _hierarchical(bytes_per_element: float) -> Callable[[Workload], float]:
    return lambda w: formulas.hierarchical(w.elements, w.nodes, bytes_per_element)


def _factors(workload: Workload) -> int:
    return formulas.low_rank_numel(workload.side, workload.side, MATRICES, formulas.POWERSGD_RANK)


def _ours(name: str, description: str, formula: Callable[[Workload], float]) -> Variant:
    return Variant(name, description, partial(attach_communicator, None if name == DENSE else name), formula, ours=True)


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in [
        Variant(ALONE, "no exchange at all: what of a step is not communication", attach_nothing, lambda w: 0.0),
        Variant(FLAT, "DistributedDataParallel as it is: float32, all ranks alike", attach_default, _flat(4)),
        Variant("torch-fp16", "with torch's fp16_compress_hook", attach_torch_fp16, _flat(2)),
        _ours(DENSE, "this package, float32, hierarchical like all that follow", _hierarchical(4)),
        _ours("fp16", "half precision", _hierarchical(2)),
        _ours("bf16", "bfloat16", _hierarchical(2)),
        _ours("int8", "eight bits and a scale a block", _hierarchical(1 + 4 / formulas.INT8_BLOCK)),
        _ours("int4", "four bits and a scale a block", _hierarchical(1 / 2 + 4 / formulas.INT4_BLOCK)),
        _ours("sign", "one bit and a scale a block", _hierarchical(1 / 8 + 4 / formulas.SIGN_BLOCK)),
        _ours(
            "topk",
            "the largest 1 %, with indices",
            lambda w: formulas.gathered_sparse(w.elements, w.nodes, formulas.DENSITY),
        ),
        _ours("randomk", "a random 1 %, without indices", _hierarchical(4 * formulas.DENSITY)),
        _ours(
            "powersgd",
            "low-rank factors of rank 4",
            lambda w: formulas.hierarchical(_factors(w), w.nodes, 4),
        ),
        Variant(
            "torch-powersgd",
            "with torch's powerSGD_hook of rank 4, in processes of its own: it may hang",
            attach_torch_powersgd,
            lambda w: formulas.flat_ring(_factors(w), w.nodes, w.ranks_per_node, 4),
            isolated=True,
        ),
    ]
}
