"""Activations kept in their usual range."""

import io

import pytest
import torch

from danon_lightning.attention.components import StabilityEnhancer


def tokens(seed: int, *scales: float, length: int = 50, width: int = 8) -> torch.Tensor:
    """A batch of one row a scale."""
    x = torch.randn(len(scales), length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor(scales, dtype=torch.float64)[:, None, None]


def build(**settings) -> StabilityEnhancer:
    return StabilityEnhancer(8, **{"warmup_steps": 5, "history_size": 20, **settings}).double()


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(dim=-1).sqrt()


def warmed(steps: int = 10, **settings) -> StabilityEnhancer:
    module = build(**settings)
    for step in range(steps):
        module(tokens(step, 1.0, 1.1))
    return module


@pytest.mark.parametrize("adaptive", [False, True])
def test_it_equals_its_definition(adaptive):
    module = build(use_adaptive_threshold=adaptive, stability_threshold=0.3, calibration_factor=0.25, history_size=4)
    rms_history, s_history, violations, seen = [], [], 0, 0
    for step in range(12):
        x = tokens(step, 1.0, 1.2, 5.0 if step > 8 else 0.8)
        found = rms(x)
        recent = rms_history[-4:]
        usual = torch.stack(recent).mean() if recent else found.mean()
        deviation = (found - usual).abs() / usual
        threshold = torch.tensor(0.3)
        if adaptive and recent:
            # Steps have as many tokens each, so the pooled statistics are those over all tokens.
            pooled = torch.cat(s_history[-4:])
            threshold = pooled.mean() + 3 * pooled.std(correction=0)
        violation = (deviation > threshold) & (step >= 5)
        factor = torch.where(violation, 0.75 + 0.25 * usual / found, 1.0)
        torch.testing.assert_close(module(x), x * factor.unsqueeze(-1), rtol=0, atol=1e-9)
        rms_history.append(found.mean())
        s_history.append(deviation.flatten())
        violations += violation.sum().item()
        seen += found.numel() * (step >= 5)
    metrics = module.get_stability_metrics()
    assert violations > 0
    assert metrics["violation_count"] == violations
    assert metrics["adaptation_rate"] == pytest.approx(violations / seen)
    assert metrics["current_stability"] == pytest.approx(deviation.mean().item())
    assert metrics["historical_mean"] == pytest.approx(torch.stack(rms_history[-4:]).mean().item())
    assert metrics["calibration_strength"] == pytest.approx((factor - 1).abs().mean().item())
    pooled = torch.cat(s_history[-4:])
    expected = (pooled.mean() + 3 * pooled.std(correction=0)).item() if adaptive else 0.3
    assert metrics["threshold"] == pytest.approx(expected)


def test_an_outlier_is_drawn_back_and_the_rest_stays():
    module, x = warmed(calibration_factor=0.4).eval(), tokens(99, 1.0, 1.0)
    x[0, 7] *= 30
    y = module(x)
    usual = module.get_stability_metrics()["historical_mean"]
    assert rms(y[0, 7]).item() == pytest.approx(0.6 * rms(x[0, 7]).item() + 0.4 * usual)
    kept = torch.ones(2, 50, dtype=torch.bool)
    kept[0, 7] = False
    torch.testing.assert_close(y[kept], x[kept], rtol=0, atol=0)
    torch.testing.assert_close(warmed(calibration_factor=0.0).eval()(x), x, rtol=0, atol=0)


def test_settings_do_what_they_say():
    x = tokens(99, 1.5)
    counts = {}
    for threshold in (0.1, 0.8):
        module = warmed(use_adaptive_threshold=False, stability_threshold=threshold)
        before = module.get_stability_metrics()["violation_count"]
        module(x)
        counts[threshold] = module.get_stability_metrics()["violation_count"] - before
    assert counts[0.1] > counts[0.8] + 10
    # Warm-up: nothing changes before, something after.
    module = build(warmup_steps=3, use_adaptive_threshold=False)
    changed = [not torch.equal(module(tokens(step, 1.0)), tokens(step, 1.0)) for step in range(6)]
    assert changed == [False] * 3 + [True] * 3
    # History: how soon a new scale is the usual one.
    means = []
    for history_size in (2, 100):
        module = warmed(history_size=history_size)
        for step in range(3):
            module(tokens(step, 9.0))
        means.append(module.get_stability_metrics()["historical_mean"])
    assert means[0] > 8 and means[1] < 4


def test_it_changes_in_training_mode_only():
    module = warmed()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.eval()
    y = module(tokens(5, 1.0, 9.0))
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    # In evaluation a row does not depend on the others, nor a token on later ones.
    torch.testing.assert_close(module(tokens(5, 1.0, 9.0)[1:]), y[1:], rtol=0, atol=0)
    torch.testing.assert_close(module(tokens(5, 1.0, 9.0)[:, :7]), y[:, :7], rtol=0, atol=0)
    module.train()(tokens(5, 1.0, 9.0))
    assert not torch.equal(module.history, before["history"])


def test_padding_and_what_is_not_finite_count_nowhere():
    plain, padded = warmed(), warmed()
    x, mask = tokens(50, 1.0, 9.0), torch.ones(2, 50, dtype=torch.bool)
    mask[1] = False
    torch.testing.assert_close(padded(x, mask)[1], x[1], rtol=0, atol=0)
    plain(x[:1])
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffer, padded.get_buffer(name), rtol=0, atol=1e-12)
    expected = warmed()(x[:1])
    for bad in (torch.nan, torch.inf, 0.0):
        worse, other = x.clone(), warmed()
        worse[1] = bad
        torch.testing.assert_close(other(worse)[:1], expected, rtol=0, atol=0)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(buffer, other.get_buffer(name), rtol=0, atol=1e-12)
    steps = int(padded.num_steps)
    padded(x, torch.zeros_like(mask))
    assert int(padded.num_steps) == steps and padded.history.isfinite().all()


def test_the_state_survives_a_file():
    module, file = warmed(), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = build()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.get_stability_metrics() == module.get_stability_metrics()
    torch.testing.assert_close(other(tokens(7, 4.0)), module(tokens(7, 4.0)), rtol=0, atol=0)


def test_gradients_are_those_of_the_definition():
    module = warmed().eval()
    x = tokens(3, 1.0, 7.0, length=3).requires_grad_()
    assert not torch.equal(module(x)[1], x[1])
    assert torch.autograd.gradcheck(module, (x,))
    zeros = torch.zeros(1, 2, 8, dtype=torch.float64, requires_grad=True)
    module(zeros).sum().backward()
    assert torch.equal(zeros.grad, torch.ones_like(zeros))


def test_it_compiles_without_breaks():
    plain, module = build(), build()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for step in range(8):
        x = tokens(step, 1.0, 3.0 if step > 5 else 1.0)
        torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=1e-12)
    assert plain.get_stability_metrics()["violation_count"] > 0
    assert module.get_stability_metrics() == pytest.approx(plain.get_stability_metrics())


def test_bf16_runs_and_stays_close():
    module = warmed().float().eval()
    x = tokens(3, 1.0, 9.0).float()
    expected = module(x)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x.bfloat16()).float(), expected, rtol=0.02, atol=0.02)
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_it_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        later = StabilityEnhancer(8)
    later.to_empty(device="cpu")
    later.reset_parameters()
    expected = StabilityEnhancer(8).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in later.state_dict().items())
    metrics = later.get_stability_metrics()
    assert metrics.pop("threshold") == pytest.approx(0.1)
    assert set(metrics.values()) == {0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 must be an integer of at least 1"),
        ({"history_size": 0}, "history_size=0 must be an integer of at least 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be an integer of at least 0"),
        ({"stability_threshold": 0.0}, "stability_threshold=0.0 must be positive"),
        ({"calibration_factor": 1.5}, r"calibration_factor=1.5 must lie in \[0, 1\]"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        StabilityEnhancer(**{"hidden_size": 8, **settings})


def test_invalid_inputs_are_named():
    module, x = build(), tokens(0, 1.0)
    with pytest.raises(ValueError, match=r"x has shape \[1, 50, 7\]; it must be \[batch, tokens, 8\]"):
        module(x[..., :7])
    with pytest.raises(ValueError, match="x has dtype torch.int64"):
        module(x.long())
    with pytest.raises(ValueError, match=r"mask has shape \[1, 49\] and dtype torch.bool"):
        module(x, torch.ones(1, 49, dtype=torch.bool))
