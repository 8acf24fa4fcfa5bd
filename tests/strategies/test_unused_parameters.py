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
    """Twelve steps, with a checkpoint in the middle. The first step from there uses one network alone."""
    rank = dist.get_rank()
    for compression in compressions:
        torch.manual_seed(0)
        pair = Pair()
        delivered = [torch.zeros_like(net.weight) for net in pair.nets]
        due = [torch.zeros_like(net.weight) for net in pair.nets]
        saved = [None]
        for leg in (range(6), range(6, 12)):
            ddp = DistributedDataParallel(pair, find_unused_parameters=True)
            communicator = GradientCommunicator(ddp, Mesh(1, 2, rank), compression=compression, error_feedback=True)
            ddp.register_comm_hook(communicator, communicator.hook)
            if saved[0] is not None:
                communicator.load_state_dict(saved[0])
            for step in leg:
                turn = step % 3 % 2
                x = torch.randn(8, 80, generator=torch.Generator().manual_seed(100 * step + rank))
                (gradient,) = torch.autograd.grad(pair(x, turn), pair.nets[turn].weight)
                dist.all_reduce(gradient)
                due[turn] += gradient / 2
                pair.zero_grad()
                ddp(x, turn).backward()
                assert pair.nets[1 - turn].weight.grad is None
                delivered[turn] += pair.nets[turn].weight.grad
            saved = [communicator.state_dict()]
            dist.broadcast_object_list(saved)
            communicator.close()
        for index, owed in enumerate(saved[0]["mean"]["residual"][f"nets.{index}.weight"] for index in range(2)):
            error = (delivered[index] + owed.view_as(due[index]) - due[index]).norm() / due[index].norm()
            assert error < 1e-5, f"{compression}, network {index}: {error}"
            assert owed.norm() > 0


@pytest.mark.parametrize("compressions", [["int4", "sign", "topk", "randomk", "powersgd"]])
def test_what_an_unused_parameter_is_owed_is_kept_until_it_is_used(compressions):
    run_distributed(train_in_turns, 2, compressions)
