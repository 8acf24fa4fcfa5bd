"""The exponential that is as fast for masked logits as for others."""

import pytest
import torch

from danon_lightning.attention.exponential import exp_or_zero_
from danon_lightning.attention.merging import MASKED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_exponential_or_zero(dtype):
    x = torch.cat(
        [torch.linspace(-86, 80, 1001, dtype=dtype), torch.tensor([MASKED, -1e3, -104.0, -88.0], dtype=dtype)]
    )
    expected = x.exp()
    expected[-4:] = 0.0
    found = exp_or_zero_(x.clone())
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)
    assert torch.count_nonzero(found[-4:]) == 0
    minus_infinity = torch.tensor([float("-inf")], dtype=dtype)
    assert exp_or_zero_(minus_infinity).item() == 0.0


def test_it_overwrites_its_argument_and_leaves_autograd_its_own():
    x = torch.randn(5)
    assert exp_or_zero_(x).data_ptr() == x.data_ptr()
    leaf = torch.tensor([0.3, MASKED], requires_grad=True)
    [grad] = torch.autograd.grad(exp_or_zero_(leaf * 1.0).sum(), [leaf])
    torch.testing.assert_close(grad, leaf.detach().exp())
