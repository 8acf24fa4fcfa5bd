"""The estimators, apart from any training."""

import pytest
import torch

from danon_lightning.callbacks.gradient_monitor.noise import NoiseScale, Pieces


def draw(generator, signal, deviation, samples, number):
    """The gradients of `number` pieces with as many samples each."""
    return signal + deviation / samples**0.5 * torch.randn(number, len(signal), generator=generator)


def pieces_of(gradients, samples=0.0):
    mean = gradients.mean(0)
    return Pieces(float(gradients.square().sum(1).mean()), float(mean.square().sum()), len(gradients), True, samples)


@pytest.mark.parametrize(("truth", "samples", "number"), [(5.0, 1, 2), (200.0, 16, 2), (50.0, 4, 16)])
def test_within_five_percent_of_the_truth(truth, samples, number):
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(1000, generator=generator)
    deviation = (truth * float(signal.square().sum()) / 1000) ** 0.5
    noise = NoiseScale(0.998)
    for _ in range(1500):
        noise.update(pieces_of(draw(generator, signal, deviation, samples, number), samples))
    assert noise.in_samples == pytest.approx(truth, rel=0.05)
    assert noise.in_batches == pytest.approx(truth / samples / number, rel=0.05)


def test_products_of_pairs_are_exact():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 7, generator=generator, dtype=torch.float64) + 0.3
    products = gradients @ gradients.T
    pairs = (products.sum() - products.trace()) / 20
    pieces = pieces_of(gradients)
    assert pieces.mean_product == pytest.approx(float(pairs))
    assert pieces.cosine == pytest.approx(float(pairs / products.diagonal().mean()))
    assert pieces.variance == pytest.approx(float(gradients.var(0).sum()))


def test_alike_and_opposite():
    one = torch.ones(3)
    assert pieces_of(torch.stack([one, one])).cosine == pytest.approx(1)
    assert pieces_of(torch.stack([one, -one])).cosine == pytest.approx(-1)
    assert pieces_of(torch.zeros(2, 3)).cosine != pieces_of(torch.zeros(2, 3)).cosine  # undefined


def test_sizes_are_counted_in_samples_if_they_are_known():
    noise = NoiseScale(0.9)
    assert noise.in_batches is None and noise.in_samples is None
    noise.update(Pieces(3.0, 2.0, 2, True))
    assert noise.in_batches == pytest.approx(1.0) and noise.in_samples is None
    noise = NoiseScale(0.9)
    noise.update(Pieces(3.0, 2.0, 2, True, samples=4.0))
    assert noise.in_batches == pytest.approx(1.0) and noise.in_samples == pytest.approx(8.0)


def test_values_that_are_not_finite_and_negative_signals():
    noise = NoiseScale(0.5)
    noise.update(Pieces(float("nan"), 1.0, 2, True))
    noise.update(Pieces(float("inf"), 1.0, 2, True))
    assert noise.updates == 0
    noise.update(Pieces(3.0, 1.0, 2, True))  # the pieces point away from one another
    assert noise.updates == 1 and noise.in_batches is None


def test_averages_are_not_drawn_to_zero_and_go_on():
    noise = NoiseScale(0.9)
    for _ in range(3):
        noise.update(Pieces(3.0, 2.0, 2, True, 4.0))
    assert (noise.variance, noise.square, noise.batch) == pytest.approx((8.0, 1.0, 8.0))
    other = NoiseScale(0.9)
    other.load_state_dict(noise.state_dict())
    assert other.in_samples == noise.in_samples is not None
    for one in (noise, other):
        one.update(Pieces(4.0, 2.0, 2, True, 4.0))
    assert other.state_dict() == noise.state_dict()
    assert other.in_samples == noise.in_samples
