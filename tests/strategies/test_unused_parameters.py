"""Two networks trained in turns, as in adversarial training: what one of them is owed must wait for its turn."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from danon_lightning.strategies import GradientCommunicator, Mesh
from danon_lightning.testing import run_distributed


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList([nn.Linear(80, 90), nn.Linear(80, 70)])

    def forward(self, x, turn):
        return self.nets[turn](x).square().mean()


def train_in_turns(compressions):
    rank = dist.get_rank()
    for compression in compressions:
        torch.manual_seed(0)
        ddp = DistributedDataParallel(Pair(), find_unused_parameters=True)
        communicator = GradientCommunicator(ddp, Mesh(1, 2, rank), compression=compression, error_feedback=True)
        ddp.register_comm_hook(communicator, communicator.hook)
        nets = ddp.module.nets
        delivered = [torch.zeros_like(net.weight) for net in nets]
        due = [torch.zeros_like(net.weight) for net in nets]
        for step in range(12):
            turn = step % 3 % 2
            x = torch.randn(8, 80, generator=torch.Generator().manual_seed(100 * step + rank))
            (gradient,) = torch.autograd.grad(ddp.module(x, turn), nets[turn].weight)
            dist.all_reduce(gradient)
            due[turn] += gradient / 2
            ddp.zero_grad()
            ddp(x, turn).backward()
            assert nets[1 - turn].weight.grad is None
            delivered[turn] += nets[turn].weight.grad
        state = communicator.state_dict()
        communicator.close()
        if rank == 0:
            for index in range(2):
                owed = state["mean"]["residual"][f"nets.{index}.weight"].view_as(due[index])
                error = (delivered[index] + owed - due[index]).norm() / due[index].norm()
                assert error < 1e-5, f"{compression}, network {index}: {error}"
                assert owed.norm() > 0


@pytest.mark.parametrize("compressions", [["int4", "sign", "topk", "randomk", "powersgd"]])
def test_what_an_unused_parameter_is_owed_is_kept_until_it_is_used(compressions):
    run_distributed(train_in_turns, 2, compressions)
