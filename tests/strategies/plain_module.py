"""Ordinary models, as users write them for Lightning and for torch's DDP: they know nothing of this project.

With them what tests of the exchange need on each rank.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset


class PlainModule(pl.LightningModule):
    """Regression on fixed random data, large enough that its gradients are compressed."""

    def __init__(self, dtype: str = "float32", optimizer: str = "adamw"):
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(20, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 96), nn.Linear(96, 1))
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
        self.to(getattr(torch, dtype))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.layers(x) - y).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", (self.layers(x) - y).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        if self.hparams.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05)
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(batch_size: int, dtype: str = "float32", *, rank: int = 0, ranks: int = 1) -> DataLoader:
    """This rank's share of samples that are the same, and in the same order, however many ranks there are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 20, generator=generator, dtype=torch.float64)
    y = x.square().mean(dim=1, keepdim=True)
    data = TensorDataset(x.to(getattr(torch, dtype)), y.to(getattr(torch, dtype)))
    return DataLoader(data, batch_size=batch_size, sampler=range(rank, len(data), ranks))


def trainer_with(strategy, *, folder=None, ranks=1, nodes=1, **options) -> pl.Trainer:
    """A Trainer that is quiet and leaves no files."""
    defaults = {"logger": False, "enable_checkpointing": False}
    return pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=ranks,
        num_nodes=nodes,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # Lightning's would shuffle
        **{**defaults, **options},
    )


# Odd sizes; those of at least 4096 elements in two or more dimensions are compressed.
SHAPES = {
    "first": (96, 130), "norm": (300,), "table": (61, 83), "bias": (83,), "little": (7, 9), "deep": (4, 33, 40),
    "last": (201, 67),
}  # fmt: skip
BUCKET_CAP_MB = 0.001  # five buckets, one of which has nothing to compress


class Given(nn.Module):
    """A model whose gradients are what the batch says, by name of the parameter."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape, dtype=dtype)))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((parameter * batch[name]).sum() for name, parameter in self.named_parameters())


def given_gradients(
    step: int, rank: int, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Known to all ranks without asking: a part that stays, and noise of each step and rank."""
    generator = torch.Generator().manual_seed(1_000_003 * step + rank)
    lasting = torch.Generator().manual_seed(7)
    return {
        name: (torch.randn(shape, generator=generator) + 0.5 * torch.randn(shape, generator=lasting)).to(dtype)
        for name, shape in shapes.items()
    }


def give(ddp: DDP, batch: dict[str, torch.Tensor], loss_scale: float = 1.0) -> dict[str, torch.Tensor]:
    """One backward pass; returns what it has left in ``.grad``."""
    ddp.zero_grad()
    (ddp(batch) * loss_scale).backward()
    return {name: parameter.grad.clone() for name, parameter in ddp.module.named_parameters()}


@contextmanager
def emulated_mesh(nodes: int, ranks: int, folder: str) -> Iterator["object | None"]:
    """Rearranges the processes of a launch as nodes × ranks, for they are slow to start.

    Yields the mesh; None on a process that is left over and has nothing to do meanwhile. Every process must come here
    in the same order.
    """
    from danon_lightning.strategies import Mesh

    launched = int(os.environ["RANK"])
    if dist.is_initialized():
        _leave_process_group()
    os.environ["DANON_TEST_MESHES"] = number = str(int(os.environ.get("DANON_TEST_MESHES", "0")) + 1)
    mesh = Mesh(nodes, ranks, launched) if launched < nodes * ranks else None
    if mesh is not None:
        os.environ["GROUP_RANK"] = str(mesh.node)
        store = Path(folder) / f"store-{nodes}-{ranks}-{number}"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=launched, world_size=mesh.world_size)
    yield mesh
    if mesh is not None:
        _leave_process_group()


def _leave_process_group():
    # A group's threads take the GIL to let go of the last tensors they handled. If DDP is the group's last owner, it
    # waits for these threads when it is freed, and holds the GIL meanwhile: so they get it here.
    time.sleep(0.05)
    dist.destroy_process_group()


@contextmanager
def exchange(
    mesh, compression=None, *, model=None, bucket_cap_mb=BUCKET_CAP_MB, view=True, ddp_options=None, **options
):
    """Yields a model on torch's DDP, whose gradients go through a communicator, and that."""
    from danon_lightning.strategies import GradientCommunicator

    model = model if model is not None else Given()
    ddp = DDP(model, bucket_cap_mb=bucket_cap_mb, gradient_as_bucket_view=view, **(ddp_options or {}))
    communicator = GradientCommunicator(ddp, mesh, compression=compression, **options)
    ddp.register_comm_hook(communicator, communicator.hook)
    yield ddp, communicator
    communicator.close()


def same_on_all_ranks(tensors: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    mine = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors.values()])
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return all(torch.equal(row, mine) for row in rows)


def one_of_each():
    """Every way to compress, with blocks and densities that suit ``SHAPES``."""
    from danon_lightning import strategies

    return {
        "fp16": "fp16",
        "int8": strategies.Int8Compressor(64),
        "int8 stochastic": strategies.Int8Compressor(stochastic=True),
        "int4": "int4",
        "sign": strategies.SignCompressor(256),
        "topk": strategies.TopKCompressor(0.05),
        "topk warm-up": strategies.TopKCompressor(0.02, warmup_steps=3, warmup_density=0.08),
        "randomk": strategies.RandomKCompressor(0.1),
        "powersgd": strategies.PowerSGDCompressor(2),
    }


KILLED = """
import os, signal, sys, time
sys.path.insert(0, {here!r})
import torch.distributed as dist
from danon_lightning.strategies import Mesh
from plain_module import exchange, give, given_gradients

compression, nodes, victim = {compression!r}, {nodes}, {victim}
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = Mesh.from_world(dist.get_world_size(), nodes, rank)
with exchange(mesh, compression) as (ddp, communicator):
    give(ddp, given_gradients(0, rank))
    level = {level}
    gather, operations = level.all_gather, []
    def dies(*args):
        operations.append(None)
        if rank == victim and len(operations) == 3:  # the peers have sent it something, and wait for the rest
            print("killed at", time.time(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return gather(*args)
    level.all_gather = dies
    try:
        give(ddp, given_gradients(1, rank))
    except BaseException:
        print("noticed at", time.time(), flush=True)
        raise communicator.error
"""


def killed_job(*, nodes, ranks, compression, victim, hosts=None):
    """Kills a rank in mid-exchange. Returns the others; each has ended by itself with an error, in seconds."""
    from danon_lightning.testing import launch_ranks

    level = "communicator._exchange.inner" if compression is None else "communicator._exchange.outer"
    script = KILLED.format(
        here=str(Path(__file__).parent), compression=compression, nodes=nodes, victim=victim, level=level
    )
    results = launch_ranks(
        [sys.executable, "-c", script], nodes=nodes, ranks_per_node=ranks, hosts=hosts, failure_grace=30
    )
    report = "\n".join(map(str, results))
    assert results[victim].returncode == -9, report
    killed = float(results[victim].stdout.split("killed at")[1])
    survivors = [result for result in results if result.rank != victim]
    for result in survivors:
        assert result.returncode == 1, report
        assert float(result.stdout.split("noticed at")[1]) - killed < 10, report
        assert f"rank {result.rank}: the gradient exchange has failed" in result.stderr, report
    return survivors
