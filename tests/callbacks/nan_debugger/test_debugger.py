"""The callback in a Trainer of one process: what it finds, and what it does about it."""

import copy
import json
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from debugger_modules import Faulty, batches, debugger, trainer

from danon_lightning.callbacks import NaNDebugger, NonFiniteError, NumericLimits
from danon_lightning.callbacks.health import ReportsFindings


def fails(module, data, *, options=None, **debugger_options):
    """The report of the error that training ends with."""
    watching = debugger(**debugger_options)
    with pytest.raises(NonFiniteError) as raised:
        trainer(watching, **(options or {})).fit(module, data)
    (report,) = watching.reports
    assert str(raised.value) == report.text() and raised.value.cause == report.cause
    return report


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(
    ("fault", "cause", "op", "module"),
    [
        ("forward", "forward", "aten.log.default", "log_layer"),
        ("backward", "backward", "aten.div.Tensor", ""),
        ("detached", "forward", "aten.full.default", ""),
    ],
)
def test_the_operation_and_the_module_are_named(fault, cause, op, module, manual):
    report = fails(Faulty(fault, manual=manual), batches())
    assert (report.step, report.cause, report.finding.batch_idx) == (2, cause, 2)
    assert (report.origin.op, report.origin.module, report.origin.exact) == (op, module, True)
    assert "debugger_modules.py" in report.text() and report.advice


def test_the_sample_of_a_bad_batch_is_named():
    def spoil(index, batch):
        if index == 3:
            batch["x"][2, 1] = float("nan")

    report = fails(Faulty(), batches(change=spoil))
    assert (report.step, report.cause, report.origin.sample) == (3, "input", 2)
    assert "x" in report.origin.leaf and "sample 2" in report.text()
    assert report.finding.bad_inputs and "1 NaN" in report.finding.bad_inputs[0]


def test_infinities_in_a_batch_that_are_meant_raise_no_alarm():
    class Masked(Faulty):
        def training_step(self, batch, batch_idx):
            weights = torch.softmax(batch["mask"], -1)
            return super().training_step(batch, batch_idx) + weights.square().sum() * 0

    def mask(index, batch):
        batch["mask"] = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))

    watching = debugger(check_inputs_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="NaNDebugger")
        trainer(watching).fit(Masked(), batches(change=mask))
    assert not watching.reports and watching.findings()[0].severity == "note"


def test_a_nan_in_a_batch_that_does_no_harm_is_mentioned_where_that_is_asked_for(tmp_path):
    def spoil(index, batch):
        batch["unused"] = torch.full((4,), float("nan") if index == 1 else 0.0)

    watching = debugger(check_inputs_every_n_steps=1, log_path=tmp_path / "events.jsonl")
    with pytest.warns(UserWarning, match="batch 1: batch\\['unused'\\] has 4 NaN"):
        trainer(watching).fit(Faulty(), batches(change=spoil))
    (event,) = events(tmp_path / "events.jsonl")
    assert (event["event"], event["batch_idx"]) == ("input_not_finite", 1)


def test_a_weight_that_was_spoilt_by_other_code():
    class Spoilt(Faulty):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                self.last.weight.data[0, 3] = float("nan")

    report = fails(Spoilt(), batches())
    assert (report.cause, report.origin.parameter) == ("weight", "last.weight")


def test_weights_that_come_spoilt():
    module = Faulty()
    module.first.weight.data[0, 0] = float("inf")
    with pytest.warns(UserWarning, match="before the first step: first.weight"):
        report = fails(module, batches())
    assert (report.step, report.cause, report.origin.parameter) == (0, "weight", "first.weight")


def test_a_weight_that_the_optimizer_has_spoilt():
    class Unused(Faulty):
        def __init__(self):
            super().__init__()
            self.idle = nn.Parameter(torch.ones(3))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (self.idle * 0).sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01, eps=0.0)  # 0 / 0

    report = fails(Unused(), batches())
    assert (report.step, report.cause, report.origin.parameter) == (1, "optimizer", "idle")
    assert "eps" in report.text()


def test_a_step_of_the_optimizer_that_was_too_large():
    class Steep(Faulty):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 100

    report = fails(Steep(lr=3e38), batches())
    assert (report.step, report.cause) == (1, "optimizer") and "ower the learning rate" in report.text()


def test_what_depends_on_random_numbers_happens_again():
    """The step fails in every second draw; whatever is drawn later, the replay must draw the same."""
    for seed in range(4):
        torch.manual_seed(seed)
        watching = debugger()
        with pytest.raises(NonFiniteError):
            trainer(watching, max_epochs=20).fit(Faulty("dropout", at=range(6)), batches())
        assert watching.reports[0].origin.op == "aten.log.default"
        assert watching.reports[0].finding.reproduced


def test_the_batch_among_accumulated_ones_is_named():
    report = fails(Faulty("forward", at=(4,)), batches(8), options={"accumulate_grad_batches": 3})
    finding = report.finding
    assert (report.step, finding.batch_number, finding.batches, finding.batch_idx) == (1, 1, 3, 4)
    assert "the 2. of 3 that are accumulated" in report.text()
    assert [loss == loss for loss in finding.losses] == [True, False, True]


def test_a_step_that_cannot_be_run_again():
    class OneWay(Faulty):
        def training_step(self, batch, batch_idx):
            if self.trainer.callbacks[0]._busy:
                raise RuntimeError("the stream has ended")
            return super().training_step(batch, batch_idx)

    report = fails(OneWay("backward"), batches())
    assert (report.cause, report.origin.module, report.origin.exact) == ("backward", "first", False)
    assert "stream has ended" in report.text() and "best guess" in report.text()


def test_a_step_that_writes_to_its_batch_is_told_of():
    class Writes(Faulty):
        def training_step(self, batch, batch_idx):
            batch["x"].add_(1.0)
            batch.pop("y2", None)
            return super().training_step(batch, batch_idx)

    assert "writes to the tensors of its batch" in fails(Writes("forward"), batches()).text()


# ---- policies


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("fault", ["forward", "backward"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_leaves_no_trace(fault, accumulate):
    """Weights, Adam's state and running means are as if the batches of the step had not been there."""
    data = list(batches(8))
    bad = 3
    first = bad - bad % accumulate
    without = [batch for index, batch in enumerate(data) if not first <= index < first + accumulate]
    options = {"accumulate_grad_batches": accumulate}
    disturbed, undisturbed = Faulty(fault, at=(bad,), optimizer="adam"), Faulty(optimizer="adam")
    watching = debugger("skip")
    one, two = trainer(watching, **options), trainer(**options)
    one.fit(disturbed, torch.utils.data.DataLoader(data, batch_size=None))
    two.fit(undisturbed, torch.utils.data.DataLoader(without, batch_size=None))
    torch.testing.assert_close(state_of(disturbed), state_of(undisturbed), rtol=0, atol=0)
    states = [made.optimizers[0].state_dict()["state"] for made in (one, two)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert watching.bad_steps == [first // accumulate] and "skip this step" in watching.printed()


def test_too_many_skipped_steps_end_the_training():
    watching = debugger("skip", max_consecutive_skips=3, max_reports=2)
    with pytest.raises(NonFiniteError, match="4 steps in a row(.|\n)*log_layer"):
        trainer(watching).fit(Faulty("forward", at=range(1, 6)), batches())
    assert watching.bad_steps == [1, 2, 3, 4] and len(watching.reports) == 2


def test_reports_alone_change_nothing(tmp_path):
    watching = debugger("report", max_reports=1, log_path=tmp_path / "log" / "events.jsonl")
    plain, watched = Faulty("forward"), Faulty("forward")
    trainer().fit(plain, batches())
    trainer(watching).fit(watched, batches())
    torch.testing.assert_close(state_of(plain), state_of(watched), rtol=0, atol=0, equal_nan=True)
    assert watching.bad_steps == [2, 3, 4, 5] and len(watching.reports) == 1
    assert "log_layer" in watching.printed() and watching.printed().count("Step ") == 1
    logged = events(tmp_path / "log" / "events.jsonl")
    assert [event["step"] for event in logged if event["event"] == "not_finite"] == [2, 3, 4, 5]
    assert logged[0]["origin"]["module"] == "log_layer"


class Overflow(nn.Module):
    """exp(100) / exp(99): overflows in single precision, but not in double."""

    def forward(self, x, shift):
        return (x + shift).exp() / (x + shift - 1).exp()


class Overflows(Faulty):
    def __init__(self, at):
        super().__init__()
        self.ratio, self.shifted = Overflow(), at
        self.forwards = []

    def training_step(self, batch, batch_idx):
        shift = 100.0 if self.global_step in self.shifted else 0.0
        ratio = self.ratio(batch["y"], shift)
        self.forwards.append("forward" in vars(self.ratio))
        return super().training_step(batch, batch_idx) + (ratio * self.last.bias).mean()


def test_a_fallback_computes_the_module_in_a_higher_precision_for_a_while():
    module = Overflows(at=(1, 2, 3, 9))
    watching = debugger("fallback", fallback_steps=3)
    trainer(watching, max_epochs=2).fit(module, batches(8))
    assert watching.bad_steps == [1, 9]  # steps 2 and 3 overflow no longer
    assert 0 < sum(module.forwards) <= 3 + 6 < len(module.forwards)
    assert "ratio runs in a higher precision for 3 steps" in watching.printed()
    assert "ratio runs in a higher precision for 6 steps" in watching.printed()  # it has failed again
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    assert "forward" not in vars(module.ratio)


def test_a_fallback_survives_a_checkpoint(tmp_path):
    watching = debugger("fallback", fallback_steps=10)
    first = trainer(watching, max_steps=4)
    first.fit(Overflows(at=(1,)), batches(8))
    first.save_checkpoint(tmp_path / "one.ckpt")
    assert watching._response.raised.left == {"ratio": 8}

    again, module = debugger("fallback", fallback_steps=10), Overflows(at=(4, 5))
    trainer(again, max_steps=8, max_epochs=3).fit(
        module, batches(8), ckpt_path=tmp_path / "one.ckpt", weights_only=True
    )
    assert again.bad_steps == [1] and not again.reports
    assert again._response.raised.left == {"ratio": 8 - 4} and module.forwards == [True] * 4
    assert "forward" not in vars(module.ratio)


def test_nothing_is_left_behind_after_an_error():
    class Breaks(Overflows):
        def on_train_batch_end(self, *args):
            if self.global_step == 3:
                raise ValueError("stop")

    module, watching = Breaks(at=(1,)), debugger("fallback")
    modules = {name: dict(vars(one)) for name, one in module.named_modules()}
    hooks = {
        name: {key: len(value) for key, value in kept.items() if key.endswith("hooks")}
        for name, kept in modules.items()
    }
    with pytest.raises(ValueError, match="stop"):
        trainer(watching).fit(module, batches())
    assert watching.bad_steps == [1] and "forward" not in vars(module.ratio) and not len(watching._batches)
    for name, one in module.named_modules():
        assert {key: len(value) for key, value in vars(one).items() if key.endswith("hooks")} == hooks[name]
    assert not any(parameter._backward_hooks for parameter in module.parameters())


# ---- gradient scaling


class Scaled(MixedPrecision):
    """Mixed precision with all its scaling, but in float32."""

    def __init__(self, scale=2.0**16):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000))

    def forward_context(self):
        return nullcontext()


class HalfGradients(Faulty):
    """Gradients pass through float16, where they overflow if they are multiplied by too much."""

    def __init__(self, factor, **options):
        super().__init__(**options)
        self.factor = factor

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self.last.bias.half() * self.factor).float().sum()


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_the_search_for_a_loss_scale_raises_no_alarm(policy):
    watching = debugger(policy)
    module, plain = HalfGradients(1000.0, lr=1e-4), HalfGradients(1000.0, lr=1e-4)
    trainer(watching, plugins=[Scaled()], max_epochs=3).fit(module, batches())
    trainer(plugins=[Scaled()], max_epochs=3).fit(plain, batches())
    assert watching.bad_steps == [] and not watching.printed()
    assert watching._scaler_watch.in_a_row == 0
    torch.testing.assert_close(state_of(module), state_of(plain), rtol=0, atol=0)


def test_a_search_that_does_not_end_names_the_operation():
    report = fails(HalfGradients(6e4), batches(8), options={"plugins": [Scaled()]}, max_scaler_skips=5)
    assert report.step == 4 and "5 steps in a row" in report.why
    assert report.origin.phase == "backward" and "loss scale" in report.text()


def test_a_scale_that_is_too_small():
    options = {"plugins": [Scaled()]}
    report = fails(HalfGradients(6e4), batches(8), options=options, min_loss_scale=2.0**14)
    assert report.step == 3 and "below 16384" in report.why


def test_a_loss_that_is_not_finite_is_no_matter_of_scale():
    report = fails(Faulty("forward"), batches(), options={"plugins": [Scaled(4.0)]})
    assert (report.step, report.cause, report.origin.module) == (2, "forward", "log_layer")


# ---- what is odd, and what is written


def events(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_exploding_vanishing_and_large_weights_are_mentioned_once_in_a_while(tmp_path):
    class Odd(Faulty):
        def __init__(self):
            super().__init__()
            self.faint, self.big = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 500.0))

        def training_step(self, batch, batch_idx):
            factor = 1e4 if 30 <= self.global_step < 40 else 1.0
            return super().training_step(batch, batch_idx) * factor + self.faint.sum() * 1e-13 + self.big.sum()

    limits = NumericLimits(weight=100.0, vanishing_steps=10)
    watching = debugger(log_path=tmp_path / "e.jsonl", check_weights_every_n_steps=5, limits=limits)
    with pytest.warns(UserWarning, match="explodes"):
        trainer(watching, gradient_clip_val=1.0).fit(Odd(), batches(45))
    found = {(event["event"], event["parameter"]): event["step"] for event in events(tmp_path / "e.jsonl")}
    assert found["vanishing", "faint"] == 9 and found["weight", "big"] == 0
    assert found["explosion", "last.weight"] == 30 and ("explosion", "faint") not in found
    assert len(found) == len(events(tmp_path / "e.jsonl"))  # each once
    texts = [finding.text for finding in watching.findings()]
    assert [text.split(" in ")[0] for text in texts] == [
        "weights exceed 100",
        "the gradient vanishes",
        "the gradient explodes",
    ]
    assert "in 6 parameters" in texts[2] and "and 3 more" in texts[2]
    assert isinstance(watching, ReportsFindings)


def test_a_full_disk_is_one_warning(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    watching = debugger("skip", log_path="/dev/full", plot_path="/dev/full")
    with pytest.warns(UserWarning, match="could not write") as caught:
        trainer(watching).fit(Faulty("forward", at=(1, 3)), batches())
    assert len([one for one in caught if "could not write" in str(one.message)]) == 1
    assert watching.bad_steps == [1, 3] and "log_layer" in watching.printed()


def test_the_norms_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plots" / "norms.png"
    trainer(debugger("skip", plot_path=path)).fit(Faulty("forward"), batches())
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_validation_that_is_not_finite_is_a_warning():
    watching = debugger()

    class Late(Faulty):
        def validation_step(self, batch, batch_idx):
            loss = super().validation_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 1 else loss

    with pytest.warns(UserWarning, match="validation after step 3 .* the loss of some batch"):
        trainer(watching, num_sanity_val_steps=0).fit(Late(), batches(3), batches(2))
    assert not watching.reports


def test_optimizers_that_call_the_step_several_times():
    class Newton(Faulty):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    report = fails(Newton("forward"), batches())
    assert report.origin.module == "log_layer" and report.finding.batches == 1


def test_it_can_be_used_again_and_costs_no_random_numbers():
    watching = debugger()
    modules = [Faulty(), Faulty()]
    torch.manual_seed(1)
    trainer(watching).fit(modules[0], batches())
    first = torch.rand(1)
    torch.manual_seed(1)
    trainer().fit(modules[1], batches())
    assert torch.equal(first, torch.rand(1))
    torch.testing.assert_close(state_of(modules[0]), state_of(modules[1]), rtol=0, atol=0)
    trainer(watching).fit(copy.deepcopy(modules[0]), batches())
    assert not watching.reports


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"policy": "ignore"}, "policy='ignore' must be one of 'raise', 'skip', 'fallback', 'report'"),
        ({"max_consecutive_skips": -1}, "max_consecutive_skips=-1"),
        ({"fallback_steps": 0}, "fallback_steps=0"),
        ({"max_scaler_skips": 0}, "max_scaler_skips=0"),
        ({"min_loss_scale": 0}, "min_loss_scale=0"),
        ({"history_size": 1}, "history_size=1"),
        ({"check_inputs_every_n_steps": -2}, "check_inputs_every_n_steps=-2"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        NaNDebugger(**options)
    for name in (
        "explosion",
        "explosion_factor",
        "vanishing",
        "weight",
        "vanishing_share",
        "vanishing_steps",
        "window",
    ):
        with pytest.raises(ValueError, match=name):
            NumericLimits(**{name: 0})
