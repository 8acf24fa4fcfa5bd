"""Which gradients are said to be odd though they are finite."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from debugger_modules import FEATURES, Faulty, batches, debugger, trainer

from danon_lightning.callbacks import NonFiniteError, NumericLimits
from danon_lightning.callbacks.nan_debugger.check import Reading
from danon_lightning.callbacks.nan_debugger.history import History
from danon_lightning.callbacks.nan_debugger.thresholds import Oddity, Watch, describe


def watch(limits, rows, names=("p",)):
    """What is said of steps, a row of norms each: ``[(step, kind, parameters), ...]``."""
    history, said = History(50), []
    watching = Watch(limits, history)
    for step, row in enumerate(rows):
        reading = Reading(names, np.array(row, float))
        for kind, odd in watching.look(step, reading).items():
            said.append((step, kind, [one.parameter for one in odd]))
        history.add(step, names, reading.norms, reading.total_norm, 0.0, 0.0)
    return said


def fit(layers, lr, steps=80):
    """Train a regression with these layers; the debugger, and its warnings."""

    class Model(Faulty):
        def __init__(self):
            super().__init__(lr=lr)
            self.layers = layers

        def loss_of(self, batch, batch_idx):
            return (self.layers(batch["x"]) - batch["y"]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.layers.parameters(), lr=self.lr)

    watching = debugger()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer(watching).fit(Model(), batches(steps))
        except NonFiniteError:
            pass
    return watching, [str(one.message) for one in caught if "NaNDebugger: step" in str(one.message)]


def test_an_explosion_is_a_multiple_of_the_median_once_in_a_window():
    limits = NumericLimits(explosion=None, explosion_factor=10.0, vanishing=None, window=20)
    rows = [[50.0 if step in (5, 60, 62, 63, 90) else 1.0] for step in range(120)]
    assert watch(limits, rows) == [(60, "explosion", ["p"]), (90, "explosion", ["p"])]  # nothing is usual at step 5


def test_an_explosion_matters_to_the_whole_model():
    limits = NumericLimits(vanishing=None)
    rows = [[1e-7, 1.0] for _ in range(40)] + [[3e-5, 1.0], [0.5, 1.0], [2.0, 1.0], [2.0, 300.0]]
    assert watch(limits, rows, ("late", "other")) == [(42, "explosion", ["late"])]
    assert watch(NumericLimits(vanishing=None, explosion_share=0), rows, ("late", "other"))[0][0] == 40
    assert watch(limits, rows[40:], ("late", "other")) == []  # too early for anything to be usual


def test_what_grows_or_is_no_fainter_than_all_else_does_not_vanish():
    limits, names = NumericLimits(vanishing_steps=10), ("p", "other")
    gone = [(9, "vanishing", ["p"])]
    assert watch(limits, [[0.0, 1.0]] * 30, names) == gone
    assert watch(limits, [[1e-12 * (1 + step % 2 / 4), 1.0] for step in range(30)], names) == gone
    assert watch(limits, [[1e-25 * 1.5**step, 1.0] for step in range(80)], names) == []
    assert watch(limits, [[0.0, 1.0]] * 5 + [[1e-11, 1.0]] * 9, names) == []  # began at zero
    assert watch(limits, [[1e-13, 1e-12]] * 30, names) == []  # a loss that is small as a whole


def test_all_that_is_odd_in_one_way_is_one_sentence():
    odd = [Oddity("explosion", f"p{i}", 10.0**i, 0.5) for i in range(6)]
    assert describe(odd) == (
        "the gradient explodes in 6 parameters, norms: p5 1e+05 (usually 0.5), p4 1e+04 (usually 0.5), "
        "p3 1e+03 (usually 0.5) and 3 more"
    )
    assert describe([Oddity("vanishing", p, v, np.nan) for p, v in (("a", 1e-12), ("b", 0.0))]).endswith("b 0, a 1e-12")


def test_a_layer_that_begins_at_zero_is_not_odd():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

        def forward(self, x):
            return x + self.outer(torch.tanh(self.inner(x)))

    torch.manual_seed(0)
    watching, said = fit(nn.Sequential(Residual(), nn.Linear(FEATURES, 1)), lr=1e-3)
    norms = watching.history.norms()[:, watching.history.names.index("layers.0.inner.weight")]
    assert norms[0] == 0 and norms[-1] > 10 * norms[1] > 0
    assert said == [] and [one.severity for one in watching.findings()] == ["note"]


def test_a_learning_rate_that_is_far_too_high_makes_gradients_explode():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 1))
    watching, said = fit(layers, lr=1.0)
    assert "the gradient explodes in" in said[0] and "lower the learning rate (1)" in said[0]
    assert len(said) == 1  # not one a parameter
    [found] = [one for one in watching.findings() if one.severity == "warning"]
    assert found.subject == "gradients" and "learning rate" in found.advice


@pytest.mark.parametrize("depth", [4, 24])
def test_gradients_vanish_in_a_deep_stack_of_sigmoids(depth):
    torch.manual_seed(0)
    stack = [layer for _ in range(depth) for layer in (nn.Linear(FEATURES, FEATURES), nn.Sigmoid())]
    watching, said = fit(nn.Sequential(*stack, nn.Linear(FEATURES, 1)), lr=0.01, steps=30)
    if depth == 4:
        assert said == []
        return
    [found] = [one for one in watching.findings() if one.severity == "warning"]
    assert "the gradient vanishes in" in said[0] and len(said) == 1
    assert "layers.0.weight" in found.text and "saturated activation" in found.advice
