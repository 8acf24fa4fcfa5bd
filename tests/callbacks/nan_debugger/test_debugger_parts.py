"""What the callback is made of, part by part."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from debugger_modules import Faulty, batches, debugger, trainer

from danon_lightning.callbacks import NonFiniteError, NumericLimits
from danon_lightning.callbacks.nan_debugger import check
from danon_lightning.callbacks.nan_debugger.agreement import gather, has_equal_gradients
from danon_lightning.callbacks.nan_debugger.batches import StepBatches, bad_leaves
from danon_lightning.callbacks.nan_debugger.buffers import BufferCopies
from danon_lightning.callbacks.nan_debugger.bundle import read_bundle
from danon_lightning.callbacks.nan_debugger.check import not_finite, read
from danon_lightning.callbacks.nan_debugger.guesses import blame_of_optimizer, from_gradients
from danon_lightning.callbacks.nan_debugger.higher_precision import HigherPrecision
from danon_lightning.callbacks.nan_debugger.history import History
from danon_lightning.callbacks.nan_debugger.origin import Origin, TensorStatistics
from danon_lightning.callbacks.nan_debugger.policies import ScalerWatch
from danon_lightning.callbacks.nan_debugger.recommendations import Circumstances, recommend
from danon_lightning.callbacks.nan_debugger.report import RankFinding, conclude
from danon_lightning.strategies import DanonHybridStrategy

# ---- the check


def test_a_reading_has_the_norms_of_all_kinds_of_tensors():
    sparse = torch.sparse_coo_tensor([[0, 2]], [[3.0], [4.0]], (4, 1))
    gradients = {
        "single": torch.tensor([3.0, 4.0]),
        "double": torch.tensor([[6.0, 8.0]], dtype=torch.float64),
        "half": torch.full((4,), 6e4, dtype=torch.float16),  # its norm is none in half precision
        "bfloat16": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
        "sparse": sparse,
        "complex": torch.tensor([3 + 4j]),
        "empty": torch.empty(0),
    }
    weights = [("w", torch.tensor([1.0, -7.0])), ("none", torch.empty(0))]
    inputs = [("x", torch.tensor([float("-inf"), 1.0]))]
    found = read(list(gradients.items()), [torch.tensor(2.0), torch.tensor([4.0, 8.0])], weights=weights, inputs=inputs)
    assert found.names == tuple(gradients)
    np.testing.assert_allclose(found.norms, [5.0, 10.0, 1.2e5, np.nan, 5.0, 5.0, 0.0])
    assert found.losses == (2.0, 12.0) and found.weights == {"w": 7.0, "none": 0.0} and found.inputs["x"] == np.inf
    assert not found.gradients_finite and found.losses_finite
    assert not_finite(gradients.items()) == ["bfloat16"]
    assert read([], []).total_norm == 0.0 and read([], []).gradients_finite


class Reads(TorchDispatchMode):
    """Counts what takes values to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))


def test_a_healthy_step_reads_from_the_device_once(monkeypatch):
    taken = []
    one = check._read
    monkeypatch.setattr(check, "_read", lambda tensors: taken.append(len(tensors)) or one(tensors))

    module, watching = Faulty(), debugger(check_weights_every_n_steps=2, check_inputs_every_n_steps=2)
    reads = Reads()
    hook = watching.on_before_optimizer_step

    def counted(*args):
        with reads:
            hook(*args)

    watching.on_before_optimizer_step = counted
    trainer(watching, accumulate_grad_batches=2).fit(module, batches(8))
    assert len(taken) == 1 + 4  # the weights, before the first step; and one a step, with two losses each
    assert taken[1:] == [6 + 2 + 6 + 4, 6 + 2, 6 + 2 + 6 + 4, 6 + 2]
    assert reads.count == 0


def test_a_norm_that_overflows_is_no_nan():
    class Huge(Faulty):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (1e25 * self.last.weight).sum()

    watching = debugger(limits=NumericLimits(explosion=None, explosion_factor=None))
    trainer(watching, max_steps=1).fit(Huge(lr=1e-30), batches(2))
    assert not watching.bad_steps and len(watching.history.steps) == 1


# ---- history and limits


def test_the_history_is_a_ring():
    history, rows = History(4), {}
    for step in range(11):
        names = ("a", "b") if step < 5 else ("b", "c")
        norms = np.array([step + 0.5, np.inf if step == 8 else step + 0.25])
        history.add(step, names, norms, float(norms.sum()), step * 1.0, 0.1)
        rows[step] = dict(zip(names, norms, strict=True))
        assert history.steps == list(range(max(0, step - 3), step + 1))
        found = history.norms()
        for row, kept in zip(found, history.steps, strict=True):
            for name, column in zip(history.names, row, strict=True):
                expected = rows[kept].get(name, np.nan)
                assert column == expected or (np.isnan(column) and not np.isfinite(expected))
    assert np.isnan(history.total_norms[1]) and history.losses == [7.0, 8.0, 9.0, 10.0]


# ---- batches, buffers, optimizer


def test_what_is_bad_in_a_batch_is_named_with_its_samples():
    x = torch.zeros(4, 2)
    x[1, 0] = x[3, 1] = float("nan")
    batch = {"x": x, "mask": [torch.tensor([0.0, float("-inf")])], "label": torch.tensor([1, 2])}
    assert [str(leaf) for leaf in bad_leaves(batch)] == [
        "batch['x'] has 2 NaN values in sample 1, 3",
        "batch['mask'][0] has 1 infinite values in sample 1",
    ]
    kept = StepBatches(most=2)
    for index in range(3):
        kept.add(batch, index, None)
    batch.pop("label")
    assert [one.batch_idx for one in kept] == [1, 2] and kept.count == 3
    assert all("label" in one.batch and not one.is_changed for one in kept)
    x.add_(1)
    assert all(one.is_changed for one in kept)


def test_buffers_are_put_back():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    module.register_buffer("mask", torch.zeros(70000))
    copies, x = BufferCopies(), torch.randn(8, 3)
    module(x)
    copies.take(module)
    good = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module(x * float("nan"))
    module.mask.add_(1)
    with copies.as_before(module):
        torch.testing.assert_close(dict(module.named_buffers()), good, rtol=0, atol=0)
    assert module[0].running_mean.isnan().all() and module.mask.sum() == 70000
    assert set(copies.put_back(module)) == {"0.running_mean", "0.running_var", "0.num_batches_tracked", "mask"}
    torch.testing.assert_close(dict(module.named_buffers()), good, rtol=0, atol=0)
    assert copies.put_back(module) == []


@pytest.mark.parametrize(
    ("optimizer", "options", "says"),
    [
        (torch.optim.SGD, {"lr": float("inf")}, "its lr is inf"),
        (torch.optim.SGD, {"lr": 1e38}, "its step was as large as"),
        (torch.optim.SGD, {"lr": 0.1}, ""),
        (torch.optim.Adam, {"lr": 0.1, "eps": 0.0}, "eps=0"),
        (torch.optim.SGD, {"lr": 1.0, "momentum": 0.9}, "its momentum_buffer is not finite"),
    ],
)
def test_the_optimizer_is_blamed_only_where_something_speaks_for_it(optimizer, options, says):
    parameter = nn.Parameter(torch.ones(3))
    made = optimizer([parameter], **options)
    parameter.grad = torch.full((3,), float("inf")) if "momentum" in options else torch.zeros(3)
    made.step()
    parameter.data[0] = float("nan")
    blame = blame_of_optimizer([made], [parameter], last_norm=100.0)
    assert (says in blame) if says else (blame == "")


def test_the_module_nearest_to_the_loss_is_guessed_from_gradients():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 1))
    found = from_gradients(module, ["0.weight", "0.bias", "2.weight"], [1.0])
    assert (found.cause, found.module, found.module_type, found.exact) == ("backward", "2", "Linear", False)
    assert from_gradients(module, [], [float("nan")]).cause == "forward"


# ---- higher precision


@pytest.mark.parametrize(
    ("autocast", "dtype", "expected"),
    [(True, "float32", "float32"), (False, "bfloat16", "float32"), (False, "float32", "float64")],
)
def test_a_module_computes_in_a_higher_precision(autocast, dtype, expected):
    class Notes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            self.seen = (x @ self.linear.weight).dtype
            return self.linear(x)

    dtype, expected = getattr(torch, dtype), getattr(torch, expected)
    root = nn.Sequential(Notes(), nn.Linear(4, 1)).to(dtype)
    raised, calls = HigherPrecision(2), []
    root[0].register_forward_hook(lambda *args: calls.append(1))
    names = list(root.state_dict())
    assert raised.add(root, "0") == 2
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = root(torch.randn(3, 4, dtype=dtype))
    out.sum().backward()
    assert root[0].seen is expected and root[0].linear.weight.grad.dtype is dtype
    assert calls == [1] and list(root.state_dict()) == names and root[0].linear.weight.dtype is dtype
    assert raised.count_down() == [] and raised.count_down() == ["0"] and "forward" not in vars(root[0])
    assert raised.add(root, "0") == 4  # again: twice as long
    raised.release()
    assert "forward" not in vars(root[0]) and raised.left == {"0": 4}
    raised.restore(root)
    assert "forward" in vars(root[0])


def test_the_scaler_is_watched():
    watch = ScalerWatch(3, 2.0)
    assert [watch.look(False, True, scale) for scale in (64.0, 32.0)] == ["", ""]
    assert watch.look(True, True, 16.0) == ""  # a step: the search begins anew
    assert [bool(watch.look(False, True, scale)) for scale in (16.0, 8.0, 4.0)] == [False, False, True]
    assert "below 2" in watch.look(False, True, 1.0)
    assert "no loss scale can cure" in watch.look(True, False, 64.0)


# ---- conclusions


def finding(rank, **options):
    return RankFinding(rank, **{"limit": 65504.0, "limit_type": "float16", **options})


def test_the_rank_with_the_best_evidence_is_believed():
    exact, guess = Origin("forward", op="aten.log.default"), Origin("backward", exact=False)
    report = conclude(
        3, 0, [finding(0), finding(1, reproduced=True, origin=guess), finding(2, reproduced=True, origin=exact)]
    )
    assert (report.cause, report.finding.rank, report.ranks) == ("forward", 2, (1, 2))
    again = RankFinding.from_dict(json.loads(json.dumps(report.finding.to_dict())))
    assert again == report.finding


def test_what_no_rank_can_show_is_a_reduction_or_transient_or_unknown():
    bad = ("w",)
    large = [finding(rank, largest={"w": 4e4, "v": 9e9}, bad_gradients=bad) for rank in range(2)]
    report = conclude(3, 0, large)
    assert (report.cause, report.origin.parameter, report.ranks) == ("reduction", "w", ())
    assert conclude(3, 0, [finding(rank, largest={"w": 1e4}) for rank in range(2)]).cause == "transient"
    unknown = conclude(3, 0, [finding(0, largest={"w": 1e4}), finding(1, replayed=False)])
    assert unknown.cause == "unknown" and "could not be run again" in unknown.headline()


def test_alone_one_hears_only_oneself():
    value = {"a": float("nan"), "b": [1, 2.5], "c": {"d": None}}
    assert gather(value, torch.device("cpu")) == [{"a": "nan", "b": [1, 2.5], "c": {"d": None}}]


def test_gradients_are_taken_for_equal_only_where_they_surely_are():
    automatic = SimpleNamespace(automatic_optimization=True)
    alone = SimpleNamespace(world_size=1, strategy=object())
    assert has_equal_gradients(alone, automatic)
    periodic = SimpleNamespace(world_size=2, strategy=DanonHybridStrategy(sync_mode="periodic"))
    assert not has_equal_gradients(periodic, automatic)
    assert not has_equal_gradients(SimpleNamespace(world_size=2, strategy=object()), automatic)


HALF = TensorStatistics((4, 4), "float16", -6e4, 6e4, 1e4, 0, 0, 16)
FULL = TensorStatistics((4, 4), "float32", -0.03, 0.5, 0.1, 0, 0, 16)
HIDDEN = TensorStatistics((4, 4), "float32", -1.0, 1.0, 1.0, 0, 4, 16)
ALL = TensorStatistics((4, 4), "float16", None, None, None, 0, 16, 16)


def forward(op, *inputs, **options):
    return Origin("forward", op=f"aten.{op}.default", phase="forward", inputs=inputs, location="m.py:3 in f", **options)


def derivative(op, **options):
    return Origin("backward", op="aten.div.Tensor", forward_op=f"aten.{op}.default", phase="backward", **options)


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (forward("log", FULL), "At m.py:3 in f, write torch.log(x.clamp_min(1e-6))"),
        (forward("log", FULL), "the smallest argument was -0.03"),
        (forward("log", HALF), "clamp_min(1e-4)"),
        (forward("log", HALF), "float16 makes 0 of less than"),
        (forward("log", FULL, sample=17), "sample 17 of the batch"),
        (forward("log_", FULL), "clamp_min"),
        (forward("_softmax", HIDDEN), "mask leave one key"),
        (forward("_scaled_dot_product_flash_attention_for_cpu"), "mask leave one key"),
        (forward("div", FULL, FULL), "the divisors lie in [-0.03, 0.5]"),
        (forward("div", FULL), "a plain number"),
        (forward("exp", FULL), "subtracting the maximum"),
        (forward("native_layer_norm", FULL), "larger eps"),
        (forward("nll_loss_forward", FULL), "ignore_index"),
        (forward("mm", HALF, output=ALL), "float16 ends at 65504"),
        (forward("mm", HALF, output=ALL), "bf16-mixed"),
        (forward("mm", FULL), "was as large as 0.5"),
        (forward("add_", FULL), "Look at m.py:3 in f, which writes non-finite values itself"),
        (forward("add", HIDDEN), "inf - inf"),
        (forward("lift_fresh"), "which writes non-finite values itself"),
        (forward("std", FULL), "correction=0"),
        (forward("unheard_of", FULL), "Look at m.py:3 in f: unheard_of gives"),
        (derivative("sqrt"), "at 0 is infinite"),
        (derivative("log"), "it has to be inside"),
        (derivative("linalg_vector_norm"), "F.normalize"),
        (derivative("binary_cross_entropy"), "with_logits"),
        (derivative("_linalg_svd"), "singular values"),
        (Origin("backward", op="aten.div.Tensor", forward_op="Own", phase="backward"), "gradcheck(Own.apply"),
        (Origin("backward", exact=False), "set_detect_anomaly"),
        (Origin("input", leaf="batch['x']", sample=3), "sample 3 of batch['x']"),
        (Origin("optimizer", parameter="w"), "Adam"),
        (Origin("weight", parameter="w"), "The optimizer step before has spoilt w"),
        (Origin("weight", parameter="w"), "Load a checkpoint from before"),
        (Origin("weight", parameter="norm.running_var"), "reset_running_stats"),
        (Origin("reduction", parameter="w"), "Average before summing"),
        (Origin("transient"), "memory"),
    ],
)
def test_advice_follows_from_what_was_found(origin, words):
    advice = recommend(conclude(5, 0, [finding(0, reproduced=True, origin=origin)]), Circumstances())
    assert words in " ".join(advice) and len(advice) <= 3


def test_gradients_that_grow_call_for_a_lower_learning_rate():
    report = conclude(0, 0, [finding(0, reproduced=True, origin=Origin("forward", op="aten.mm.default"))])
    advice = " ".join(recommend(report, Circumstances(grew=40.0, learning_rate=0.5)))
    assert "40-fold" in advice and "(0.5)" in advice and "gradient_clip_val" in advice
    assert "gradient_clip_val" not in " ".join(recommend(report, Circumstances(grew=40.0, clips=True)))


# ---- bundles


def test_a_bundle_is_written_and_named(tmp_path):
    watching = debugger(bundle_dir=tmp_path / "bundles", include_data=True)
    with pytest.raises(NonFiniteError, match="danon-replay .*step2-rank0"):
        trainer(watching).fit(Faulty("forward"), batches())
    bundle = read_bundle(watching.reports[0].finding.bundle)
    assert bundle.origin == watching.reports[0].origin and bundle.batch is not None
    assert bundle.weights["norm.running_mean"].isfinite().all()  # as they were before the step


def test_a_bundle_that_cannot_be_written_is_a_note(tmp_path):
    (tmp_path / "file").touch()
    watching = debugger("skip", bundle_dir=tmp_path / "file" / "bundles")
    trainer(watching).fit(Faulty("forward"), batches())
    assert "There is no bundle" in watching.printed() and watching.bad_steps == [2]
