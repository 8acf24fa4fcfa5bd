import math

import pytest
import torch

from danon_lightning.models import BitsPerByte
from danon_lightning.testing import run_distributed


def test_it_is_the_mean_over_bytes_not_over_batches():
    metric = BitsPerByte()
    metric.update(torch.tensor(math.log(2)), 10)  # one bit a byte
    metric.update(torch.tensor(3 * math.log(2)), 30)
    assert metric.compute().item() == pytest.approx((10 * 1 + 30 * 3) / 40)


def test_a_uniform_guess_costs_eight_bits():
    metric = BitsPerByte()
    metric.update(torch.nn.functional.cross_entropy(torch.zeros(5, 256), torch.arange(5)), 5)
    assert metric.compute().item() == pytest.approx(8)


def two_ranks():
    import torch.distributed as dist

    metric = BitsPerByte()
    if dist.get_rank() == 0:
        metric.update(torch.tensor(math.log(2)), 10)
    else:
        metric.update(torch.tensor(3 * math.log(2)), 30)
    return metric.compute().item()


def test_ranks_are_added_up():
    assert run_distributed(two_ranks, 2) == [pytest.approx(2.5)] * 2
