"""Means over unevenly many elements."""

import pytest
import torch
from torch.nn import functional as F

from danon_lightning.strategies.pipeline.errors import UnsupportedStepError
from danon_lightning.strategies.pipeline.loss_weights import CountedLosses, RescaledLosses, loss_factors

WEIGHT = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)


def labels(x):
    return torch.where(x[:, 0] > 0.3, -100, (100 * x[:, 1].abs()).long() % 5)


LOSSES = {
    "cross-entropy": lambda x: F.cross_entropy(x, labels(x)),
    "of another shape": lambda x: F.cross_entropy(x.T[None], labels(x)[None]),
    "with weights": lambda x: F.cross_entropy(x, labels(x), weight=WEIGHT),
    "smoothed": lambda x: F.cross_entropy(x, labels(x), label_smoothing=0.2),
    "smoothed with weights": lambda x: F.cross_entropy(x, labels(x), weight=WEIGHT, label_smoothing=0.2),
    "probabilities": lambda x: F.cross_entropy(x, x.detach().softmax(-1)),
    "a module": lambda x: torch.nn.CrossEntropyLoss(ignore_index=2)(x, (labels(x) + 100) % 5),
    "nll": lambda x: F.nll_loss(x.log_softmax(-1), labels(x), WEIGHT),
    "squares of some": lambda x: F.mse_loss(x[labels(x) > 0], x[labels(x) > 0].detach() + 1),
    "binary of some": lambda x: F.binary_cross_entropy_with_logits(x[labels(x) > 1], (x[labels(x) > 1] > 0).double()),
    "summed": lambda x: F.cross_entropy(x, labels(x), reduction="sum") / 24,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("sizes", [(24,), (10, 14), (1, 2, 21), (1,) * 24], ids=str)
def test_losses_of_micro_batches_add_up_to_that_of_the_batch(loss, sizes):
    x = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x), x)
    parts, shares = x.split(sizes), [size / 24 for size in sizes]
    if loss is LOSSES["summed"]:
        shares = [1.0] * len(sizes)

    divisors = []
    for part in parts:
        with CountedLosses() as counted:
            loss(part)
        divisors.append(counted.divisors)
    total = 0.0
    for part, share, factors in zip(parts, shares, loss_factors(divisors, shares), strict=True):
        with RescaledLosses(factors):
            total = total + share * loss(part)
    (gradient,) = torch.autograd.grad(total, x)

    assert abs(float(total.detach() - loss(x).detach())) <= 1e-14
    assert (gradient - expected).abs().max() <= 1e-15


def test_an_unknown_divisor_leaves_the_loss_alone():
    assert loss_factors([[None, 3.0], [2.0, 1.0]], [0.5, 0.5]) == [[1.0, 1.5], [1.0, 0.5]]


def test_micro_batches_with_different_numbers_of_losses_are_refused():
    with pytest.raises(UnsupportedStepError, match=r"different numbers of losses \(\[1, 2\]\)"):
        loss_factors([[1.0], [1.0, 2.0]], [0.5, 0.5])
    x = torch.zeros(2, 3)
    with RescaledLosses([]), pytest.raises(UnsupportedStepError, match="more losses than the 0 of its dry run"):
        F.cross_entropy(x, torch.zeros(2, dtype=torch.long))
