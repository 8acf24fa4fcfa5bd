"""What is remembered of a run, how it is drawn, and what is said of it."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from danon_lightning.callbacks.gradient_monitor.findings import find
from danon_lightning.callbacks.gradient_monitor.history import History
from danon_lightning.callbacks.gradient_monitor.measurement import Measured, Row, Scalar
from danon_lightning.callbacks.gradient_monitor.noise import NoiseScale, Pieces
from danon_lightning.callbacks.gradient_monitor.placement import Placement

LAYERS = ("first", "second", "third", "last")


def measured(step, norms=(1.0, 1.0, 1.0, 1.0), *, ratio=1e-3, clip=1.0, nonfinite=(0, 0, 0, 0), stepped=True):
    """A step of layers with 100 elements and weights of norm 10 each; None is for no gradient."""
    rows = np.zeros((len(Row), len(LAYERS)))
    there = np.array([norm is not None for norm in norms])
    gradients = np.array([norm or 0.0 for norm in norms])
    rows[Row.SQUARE] = gradients**2
    rows[Row.CLIPPED] = (clip * gradients) ** 2
    rows[Row.WEIGHT], rows[Row.UPDATE] = 100.0 * there, (10 * ratio) ** 2 * there
    rows[Row.ELEMENTS] = 100.0 * there
    rows[Row.NONZERO] = 100.0 * (gradients != 0)
    rows[Row.NONFINITE] = nonfinite
    return Measured(step, Placement(LAYERS, {}), rows, np.zeros(len(Scalar)), stepped, clips=True)


def history_of(*steps):
    history = History(LAYERS)
    for step in steps:
        history.add(step)
    return history


def subjects(history, noise=None, skipped=0):
    return {finding.subject: finding for finding in find(history, noise or NoiseScale(0.9), skipped)}


def run(**options):
    return history_of(*(measured(step, **options) for step in range(20)))


def test_a_run_that_is_well():
    ((subject, finding),) = subjects(run()).items()
    assert (subject, finding.severity, finding.advice) == ("gradients", "note", "")
    assert finding.text == "norm 2 in the median, 2 at most; a step changes the weights by 0.001 of their norm"
    assert subjects(history_of(*(measured(step) for step in range(4)))) == {}


@pytest.mark.parametrize(
    ("options", "subject", "text"),
    [
        ({"norms": (1e-6, 1.0, 1.0, 1.0)}, "gradients of first", "vanishing: in 1 layer .* less than 0.0001 of that"),
        ({"norms": (0.0, 1.0, 1.0, 1.0)}, "gradients of first", "all zero in every logged step: 1 layer learns"),
        ({"ratio": 0.05}, "learning rate", "a step changes the weights by 0.05 of their norm.*; most of all first"),
        ({"ratio": 1e-6}, "learning rate", "by 1e-06 of their norm.*; least of all first, second, third and 1 more"),
        ({"clip": 0.1}, "clipping", "acted in 100% of the logged steps, and left 0.1 of the norm"),
        ({"nonfinite": (0, 3, 0, 0)}, "gradients of second", "not finite, in up to 20 of 20 logged steps"),
    ],
)
def test_what_is_odd_is_said(options, subject, text):
    import re

    found = subjects(run(**options))
    assert list(found) == [subject]
    assert re.search(text, found[subject].text) and found[subject].advice


def test_an_exploding_gradient():
    steps = [measured(step, (1e3 if step == 7 else 1.0,) * 4) for step in range(20)]
    finding = subjects(history_of(*steps))["gradient norm"]
    assert finding.text == "at step 7 it was 2e+03, 1000 times its median of 2"
    assert finding.severity == "warning"


def test_errors_come_first_and_rare_ones_are_warnings():
    steps = [measured(step, ratio=0.05, nonfinite=(0, 0, 0, int(step % 2))) for step in range(20)]
    assert [finding.severity for finding in find(history_of(*steps), NoiseScale(0.9))] == ["error", "warning"]
    steps = [measured(step, nonfinite=(0, 0, 0, int(step == 3))) for step in range(20)]
    assert subjects(history_of(*steps))["gradients of last"].severity == "warning"


def test_steps_without_gradient_and_without_update():
    """A layer that comes and goes is not dead; NaN gradients are no norms."""
    steps = [
        measured(step, (None if step % 2 else 1.0, 1.0, 1.0, float("nan") if step == 4 else 1.0)) for step in range(20)
    ]
    steps.append(measured(20, stepped=False))
    history = history_of(*steps)
    assert list(subjects(history)) == ["gradients"]
    assert history.moments[-1].clipped is None and history.moments[-1].ratio is None
    norms = history.norms()
    assert np.isnan(norms[0, 1]) and norms[3, 4] == np.inf
    assert subjects(history, skipped=1)["loss scaling"].text == "1 step was skipped for an overflow"


@pytest.mark.parametrize(("batches", "words"), [(100.0, "mostly noise"), (0.01, "mostly the same")])
def test_a_batch_that_does_not_fit_its_noise(batches, words):
    noise = NoiseScale(0.9)
    for _ in range(5):
        # |G|² = 1, tr(Σ) of a piece 2 · batches.
        noise.update(Pieces(1 + 2 * batches, 1 + batches, 2, True, samples=8.0))
    finding = subjects(run(), noise)["batch size"]
    assert words in finding.text and f"{batches:.2g} batches ({16 * batches:.3g} samples)" in finding.text


def test_memory_is_bounded_and_covers_the_run():
    history = history_of(*(measured(step) for step in range(3000)))
    steps = [moment.step for moment in history.moments]
    assert 256 <= len(steps) <= 512 and steps[0] == 0 and steps[-1] > 2980
    assert len(set(np.diff(steps))) == 1 and history.logged == 3000


def test_the_heat_map_shows_all_layers():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    from danon_lightning.callbacks.gradient_monitor.figures import heat_map, norm_plot

    steps = [measured(10 * step, (10.0**step, None if step else 1.0, 1.0, np.inf)) for step in range(3)]
    history = history_of(*steps)
    axes = heat_map(history).axes[0]
    shown, overlay = (image.get_array() for image in axes.images)
    assert shown[0].tolist() == [0.0, 1.0, 2.0]
    assert shown.mask.tolist() == [[False] * 3, [False, True, True], [False] * 3, [True] * 3]
    assert (overlay[..., 3] > 0).tolist() == [[False] * 3] * 3 + [[True] * 3]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(LAYERS)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "10", "20"]

    axes = norm_plot(run(clip=0.5), layers=2).axes[0]
    assert axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.lines] == ["all", "all, clipped", "first", "second"]
    assert axes.lines[1].get_ydata().tolist() == [1.0] * 20
    # All of it undefined is still a picture.
    norm_plot(history_of(measured(0, (float("nan"),) * 4)))
    heat_map(history_of(measured(0, (0.0,) * 4)))
