"""Every number, against what plain torch makes of the same steps."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from monitored import (
    BATCH,
    Network,
    Vector,
    by_layer,
    fit,
    gradients_of,
    hooks_of,
    loader,
    trainer_with,
    whole,
)

from danon_lightning.callbacks import GradientMonitor

CLIP = 0.5


def expected_steps(accumulate=1):
    """The same training by hand."""
    module = Network()
    (optimizer,) = [module.configure_optimizers()]
    batches = list(loader())
    steps = []
    for start in range(0, len(batches), accumulate):
        pieces = [gradients_of(module, module.loss(batch)) for batch in batches[start : start + accumulate]]
        module.zero_grad()
        for batch in batches[start : start + accumulate]:
            (module.loss(batch) / accumulate).backward()
        before = by_layer({name: p.grad for name, p in module.named_parameters()})
        weights = by_layer(dict(module.named_parameters()))
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        after = by_layer({name: p.grad for name, p in module.named_parameters()})
        optimizer.step()
        moved = by_layer(dict(module.named_parameters()))
        update = {name: moved[name] - weights[name] for name in moved}
        steps.append((pieces, before, after, weights, update))
    return steps


def test_norms_updates_and_zeros():
    steps = fit(GradientMonitor(2, top_k=None), gradient_clip_val=CLIP)
    assert list(steps) == [1, 3, 5, 7]
    for step, logged in steps.items():
        _, before, after, weights, update = expected_steps()[step]
        expected = {
            "grad/total/norm": whole(before).norm(),
            "grad/total/clipped_norm": whole(after).norm(),
            "grad/total/update_ratio": whole(update).norm() / whole(weights).norm(),
            "grad/total/zeros": (whole(before) == 0).float().mean(),
            "grad/total/nonfinite": 0.0,
        }
        for layer in before:
            expected |= {
                f"grad/norm/{layer}": before[layer].norm(),
                f"grad/clipped_norm/{layer}": after[layer].norm(),
                f"grad/update_ratio/{layer}": update[layer].norm() / weights[layer].norm(),
                f"grad/zeros/{layer}": (before[layer] == 0).float().mean(),
            }
        assert logged == pytest.approx({tag: float(value) for tag, value in expected.items()}, rel=1e-4)
        assert logged["grad/total/clipped_norm"] == pytest.approx(CLIP, rel=1e-4)
        assert 0 < logged["grad/zeros/second.1"] < 1


def test_micro_batches_are_compared_with_one_another():
    steps = fit(GradientMonitor(1, noise_decay=0.0), accumulate_grad_batches=4, gradient_clip_val=CLIP)
    assert list(steps) == [0, 1]
    for step, (pieces, *_) in enumerate(expected_steps(accumulate=4)):
        g = torch.stack([whole(piece) for piece in pieces]).double()
        products = g @ g.T
        squares = products.diagonal().mean()
        mean_product = (products.sum() - products.trace()) / 12
        assert steps[step]["grad/cosine/between_micro_batches"] == pytest.approx(
            float(mean_product / squares), rel=1e-4
        )
        mean = g.mean(0)
        assert steps[step]["grad/total/norm"] == pytest.approx(float(mean.norm()), rel=1e-4)
        # tr(Σ) of a micro-batch is the sample variance of the four, added up over all elements.
        batches = float(g.var(0).sum() / 4 / mean_product)
        if batches > 0:
            assert steps[step]["grad/noise/scale_to_batch"] == pytest.approx(batches, rel=1e-3)
            assert steps[step]["grad/noise/scale"] == pytest.approx(batches * 4 * BATCH, rel=1e-3)


def test_an_incomplete_accumulation_tells_nothing_of_noise():
    """The last two of eight batches make a step of their own."""
    steps = fit(GradientMonitor(1), accumulate_grad_batches=3)
    assert ["grad/cosine/between_micro_batches" in step for step in steps.values()] == [True, True, False]


def test_the_noise_scale_is_the_one_that_was_put_in():
    """Within 5 %: each sample's gradient is G + ε, so tr(Σ) / |G|² is known."""
    size, batch, truth = 2000, 8, 20.0
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(size, generator=generator)
    deviation = float((truth * signal.square().sum() / size).sqrt())
    data = signal + deviation * torch.randn(1600, size, generator=generator)
    data = DataLoader(TensorDataset(data), batch)
    monitor = GradientMonitor(1, noise_decay=0.99)
    steps = fit(monitor, Vector(size), data, accumulate_grad_batches=2)
    assert steps[99]["grad/noise/scale"] == pytest.approx(truth, rel=0.05)
    assert steps[99]["grad/noise/scale_to_batch"] == pytest.approx(truth / 16, rel=0.05)


def test_a_single_gradient_is_not_compared(caplog):
    with caplog.at_level("INFO"):
        steps = fit(GradientMonitor(4), max_epochs=2)
    assert not any("noise" in tag or "cosine" in tag for step in steps.values() for tag in step)
    assert caplog.text.count("no gradient noise scale") == 1


def test_what_is_not_finite_is_counted_by_layer():
    class Partly(Network):
        def on_after_backward(self):
            self.first.weight.grad[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])

    steps = fit(GradientMonitor(1, top_k=0), Partly(), limit_train_batches=1)
    numbers = {layer: len(values) for layer, values in by_layer(dict(Network().named_parameters())).items()}
    assert steps[0]["grad/nonfinite/first"] == pytest.approx(3 / numbers["first"])
    assert steps[0]["grad/total/nonfinite"] == pytest.approx(3 / sum(numbers.values()))
    assert not any(tag.startswith("grad/nonfinite/last") for tag in steps[0])


def test_loss_scale_and_skipped_steps():
    """Gradients are those of the unscaled loss; what a scaler skips has no update."""

    class Overflows(Network):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx in (4, 5) else loss

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000))
    monitor = GradientMonitor(1)
    steps = fit(monitor, Overflows(), plugins=[plugin], accumulate_grad_batches=2)
    assert [step["grad/scaler/scale"] for step in steps.values()] == [1024.0, 1024.0, 1024.0, 512.0]
    assert [step["grad/scaler/skipped_steps"] for step in steps.values()] == [0, 0, 1, 1]
    assert ["grad/total/update_ratio" in step for step in steps.values()] == [True, True, False, True]
    assert monitor.noise.updates == 3
    _, before, *_ = expected_steps(accumulate=2)[0]
    assert steps[0]["grad/total/norm"] == pytest.approx(float(whole(before).norm()), rel=0.02)  # float16 inside
    pieces = expected_steps(accumulate=2)[0][0]
    g = torch.stack([whole(piece) for piece in pieces])
    cosine = float(2 * (g[0] @ g[1]) / g.square().sum())
    assert steps[0]["grad/cosine/between_micro_batches"] == pytest.approx(cosine, rel=0.02)


def test_halves_are_added_up_in_float32():
    module = Vector(100_000).to(torch.bfloat16)
    data = TensorDataset(torch.ones(1, 100_000, dtype=torch.bfloat16))
    steps = fit(GradientMonitor(1, update_ratio=False), module, DataLoader(data))
    assert steps[0]["grad/total/norm"] == pytest.approx(100_000**0.5, rel=1e-5)
    assert "grad/total/update_ratio" not in steps[0]


class Sparse(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True)

    def training_step(self, batch, batch_idx):
        return self.table(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_sparse_gradients():
    """Row 3 is looked up twice: 4 · 1² + 4 · 2². Two of ten rows have a gradient."""
    steps = fit(GradientMonitor(1), Sparse(), DataLoader(torch.tensor([[1, 3, 3]])))
    assert steps[0]["grad/total/norm"] == pytest.approx(20**0.5)
    assert steps[0]["grad/total/zeros"] == pytest.approx(0.8)


class Adversaries(pl.LightningModule):
    """Two optimizers, by hand; the first clips."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.expected = []

    def training_step(self, batch, batch_idx):
        for layer, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(layer(batch).square().sum())
            self.expected.append(float(nn.utils.get_total_norm([p.grad for p in layer.parameters()])))
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.one, self.two)]


def test_manual_optimization_with_two_optimizers():
    module = Adversaries()
    monitor = GradientMonitor(2)
    trainer = trainer_with(monitor)
    trainer.fit(module, DataLoader(torch.ones(12, 4), 3))
    steps = trainer.logger.steps
    assert list(steps) == [1, 3]
    for step, values in steps.items():
        one, two = module.expected[2 * step : 2 * step + 2]
        assert (values["grad/norm/one"], values["grad/norm/two"]) == pytest.approx((one, two))
        assert values["grad/total/norm"] == pytest.approx((one**2 + two**2) ** 0.5)
        assert values["grad/update_ratio/two"] > 0
    assert not hooks_of(trainer, module)


def test_a_closure_may_be_called_several_times():
    """Weights are compared with those before the first call."""

    class Closure(Network):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

    module = Closure()
    start = whole(by_layer(dict(module.named_parameters())))
    steps = fit(GradientMonitor(1), module, limit_train_batches=1)
    end = whole(by_layer(dict(module.named_parameters())))
    assert steps[0]["grad/total/update_ratio"] == pytest.approx(float((end - start).norm() / start.norm()), rel=1e-4)


def test_training_is_the_same_with_and_without():
    def weights(*callbacks):
        module = Network()
        trainer_with(*callbacks, accumulate_grad_batches=2, gradient_clip_val=CLIP, max_epochs=2).fit(module, loader())
        return whole(by_layer(dict(module.named_parameters())))

    assert torch.equal(weights(), weights(GradientMonitor(1, histogram_every_n_steps=1)))


def test_compiled_modules():
    class Compiled(Network):
        def configure_model(self):
            self.second = torch.compile(self.second, backend="aot_eager")

    steps = fit(GradientMonitor(1, top_k=None), Compiled(), accumulate_grad_batches=2)
    plain = fit(GradientMonitor(1, top_k=None), Network(), accumulate_grad_batches=2)
    assert steps[1] == pytest.approx(plain[1], rel=1e-4)
