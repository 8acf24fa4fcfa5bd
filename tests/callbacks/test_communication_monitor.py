"""What ranks send each other, and what it costs."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "strategies"))
sys.path.insert(0, str(Path(__file__).parents[1] / "strategies" / "pipeline"))
import lightning_modules  # noqa: E402
from fake_time import FakeTime, Kept, Manual, Timed, fit  # noqa: E402
from plain_module import PlainModule, loader  # noqa: E402

from danon_lightning.callbacks import CommunicationMonitor, PerformanceMonitor
from danon_lightning.callbacks.communication_monitor import gradient_norm
from danon_lightning.callbacks.communication_monitor.bubble import bubble_of
from danon_lightning.callbacks.communication_monitor.gradient_norm import global_norm, squared_norms
from danon_lightning.callbacks.communication_monitor.summary import (
    METRICS,
    RankWindow,
    RunTotals,
    over_ranks,
    values_to_log,
)
from danon_lightning.callbacks.health import ReportsFindings
from danon_lightning.callbacks.performance_monitor.pipeline_share import split_training_step, take_out
from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.strategies.pipeline.timeline import Pass
from danon_lightning.testing import run_distributed

NAMES = {
    "communication_time", "computation_time", "synchronization_overhead", "bandwidth_utilization",
    "load_balance_score", "gradient_norm", "parameter_staleness",
}  # fmt: skip


def of_rank(**known):
    unknown = dict.fromkeys(RankWindow.__dataclass_fields__, math.nan)
    return RankWindow(**{**unknown, "steps": 10, "step_seconds": 20.0, "staleness": 0.0, **known}).row()


def test_numbers_of_several_ranks_are_put_together():
    """Two nodes of two ranks; all but the last compute for as long, and wait for that."""
    rows = [
        of_rank(
            compute_seconds=15.0 if rank == 3 else 7.0, exposed_seconds=1.0 if rank == 3 else 9.0, hidden_seconds=3.0,
            inter_node_bytes=5e8, intra_node_bytes=1e9, dense_bytes=4e9, skipped_steps=2, residual_norm=1.0 + rank,
            compression_ratio=4.0, staleness=float(rank == 1),
        )
        for rank in range(4)
    ]  # fmt: skip
    window = over_ranks(rows, 2)
    assert window.load_balance == pytest.approx(9 / 15) and window.slowest == 3
    assert window.inter_node_bytes == pytest.approx(1e8)  # of two ranks, in ten steps
    assert window.intra_node_bytes == pytest.approx(2e8)
    assert (window.exposed_seconds, window.hidden_seconds) == (pytest.approx(0.7), pytest.approx(0.3))
    assert window.exposed_share == pytest.approx(0.35)
    assert window.bandwidth == pytest.approx(8e8)
    assert (window.staleness, window.residual_norm, window.skipped_steps) == (1, 2.5, 2)

    values = values_to_log(window, 0.8, 3.0, nodes=2)
    assert values["communication/inter_node_bytes_over_dense"] == pytest.approx(0.25)
    assert values["communication/bandwidth_mbit_per_second"] == pytest.approx(800)
    assert "communication/pipeline_bubble" not in values

    totals = RunTotals()
    totals.add(window, 10)
    skipped, exposed, uneven, note = totals.findings(ranks=4)
    assert skipped.text.startswith("2 of 10 steps were skipped")
    assert "35% of the time" in exposed.text and "topk" in exposed.advice
    assert "0.60" in uneven.text and "rank 3" in uneven.text
    assert "100 MB a step left each node, at 800 Mbit/s" in note.text


def test_what_is_not_known_is_left_out():
    window = over_ranks([of_rank(), of_rank()], 1)
    values = values_to_log(window, math.nan, 2.0, 1)
    assert values == {"communication/parameter_staleness": 0.0, "communication/gradient_norm": 2.0}
    totals = RunTotals()
    totals.add(window, 10)
    (note,) = totals.findings(ranks=2)
    assert "does not tell" in note.text
    assert totals.findings(ranks=1) == []


def one_forward_one_backward(ranks, micro_batches, *, transfer=0.0, slow=1.0):
    """The passes of a 1f1b schedule: 1 s forward, 2 s backward, the last stage slower by a factor."""
    orders = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        order = [("forward", index) for index in range(ahead)]
        for index in range(micro_batches - ahead):
            order += [("forward", ahead + index), ("backward", index)]
        orders.append(order + [("backward", index) for index in range(micro_batches - ahead, micro_batches)])
    ended, done, free, passes = {}, [0] * ranks, [0.0] * ranks, [[] for _ in range(ranks)]
    while any(done[rank] < 2 * micro_batches for rank in range(ranks)):
        for rank in range(ranks):
            if done[rank] == 2 * micro_batches:
                continue
            kind, index = orders[rank][done[rank]]
            needs = [("forward", rank - 1, index)] if kind == "forward" else [("backward", rank + 1, index)]
            needs = [key for key in needs if 0 <= key[1] < ranks]
            if all(key in ended for key in needs):
                start = max([free[rank], *(ended[key] + transfer for key in needs)])
                length = (1.0 if kind == "forward" else 2.0) * (slow if rank == ranks - 1 else 1.0)
                free[rank] = ended[kind, rank, index] = start + length
                passes[rank] += [Pass(rank, "waiting", index, start - 0.1, start)] if start else []
                passes[rank].append(Pass(rank, kind, index, start, start + length))
                done[rank] += 1
    return passes


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (3, 3)])
def test_the_bubble_of_even_stages_is_the_ideal_one(ranks, micro_batches):
    bubble = bubble_of(one_forward_one_backward(ranks, micro_batches))
    formula = (ranks - 1) / (micro_batches + ranks - 1)
    assert bubble.measured == pytest.approx(formula)
    assert bubble.ideal == pytest.approx(formula)


def test_transfers_and_uneven_stages_enlarge_the_measured_bubble_only():
    formula = 3 / 11
    for options in ({"transfer": 0.5}, {"slow": 2.0}):
        bubble = bubble_of(one_forward_one_backward(4, 8, **options))
        assert bubble.ideal == pytest.approx(formula)
        assert bubble.measured > formula + 0.05
    totals = RunTotals()
    totals.add(over_ranks([of_rank(bubble=0.5, ideal_bubble=0.2)] * 2, 1), 1)
    assert "idle 50% of the time, the schedule makes 20% inevitable" in totals.findings(ranks=2)[0].text


def test_gradients_of_weights_fill_gaps():
    """Split backward passes: the second rank's weights follow at the end."""
    first = [
        Pass(0, "forward", 0, 0, 1), Pass(0, "backward", 0, 3, 4), Pass(0, "weights", 0, 4, 5),
    ]  # fmt: skip
    second = [Pass(1, "forward", 0, 1, 2), Pass(1, "backward", 0, 2, 3), Pass(1, "weights", 0, 3, 4)]
    bubble = bubble_of([first, second])
    assert (bubble.measured, bubble.ideal) == (pytest.approx(0.4), pytest.approx(0.4))
    assert bubble_of([[], []]) is None
    backwards = [Pass(0, "backward", 0, 0, 1), Pass(0, "forward", 0, 1, 2)]
    assert math.isnan(bubble_of([backwards]).ideal)


def test_a_training_step_of_a_pipeline_is_shared_out():
    own = [
        Pass(0, "forward", 0, 0.0, 1.0), Pass(0, "waiting", 0, 1.0, 2.0), Pass(0, "communication", 0, 2.0, 2.5),
        Pass(0, "backward", 0, 2.5, 4.0), Pass(0, "weights", 0, 4.0, 4.5),
    ]  # fmt: skip
    seconds = {"forward": 50.0, "backward": 3.0, "optimizer": 7.0, "other": 1.0}
    found = split_training_step(seconds, {"forward": 5.0}, own)
    assert found == pytest.approx(
        {"forward": 10, "pipeline_wait": 10, "communication": 5, "backward": 23, "optimizer": 7, "other": 6}
    )
    assert split_training_step(seconds, {}, own) == seconds
    # Clocks that differ a little make no time.
    tight = split_training_step(seconds, {"forward": 4.4}, own)
    assert sum(tight.values()) == pytest.approx(61) and tight["other"] == 1

    assert take_out(seconds, "communication", "backward", 2.0)["communication"] == 2
    assert sum(take_out(seconds, "communication", "backward", 9.0).values()) == pytest.approx(61)


def test_norms_of_gradients(monkeypatch):
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4).double())]
    parameters[0].grad, parameters[2].grad = torch.full((3,), 2.0), torch.full((4,), 3.0).double()
    squares = squared_norms(parameters)
    assert squares.tolist() == pytest.approx([12, -1, 36])
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), world_size=1)
    assert global_norm(trainer, squares) == pytest.approx(48**0.5)
    parameters[0].grad[1] = math.nan
    assert math.isnan(global_norm(trainer, squared_norms(parameters)))
    assert math.isnan(global_norm(trainer, squared_norms([nn.Parameter(torch.zeros(3))])))

    # Two pipelines of two ranks; the second parameter is held by both of them.
    held = torch.tensor([[4.0, 9.0, -1.0], [4.0, 9.0, -1.0], [-1.0, 9.0, 16.0], [-1.0, 9.0, 16.0]])
    mesh = SimpleNamespace(pipeline_parallel_size=2, ranks_of_replica=lambda replica: [replica, 2 + replica])
    monkeypatch.setattr(gradient_norm, "gather_tensors", lambda squares: list(held))
    staged = SimpleNamespace(mesh=mesh, root_device=torch.device("cpu"))
    assert global_norm(SimpleNamespace(strategy=staged, world_size=4), held[0]) == pytest.approx(29**0.5)


@pytest.mark.parametrize("kind", [Timed, Manual])
def test_a_single_process_communicates_nothing(kind):
    time = FakeTime()
    callback = CommunicationMonitor(2, warm_up_steps=0, _clock=time.clock())
    assert isinstance(callback, ReportsFindings)
    assert all(math.isnan(value) for value in callback.get_performance_metrics().values())
    module = kind(time)
    logged = fit(module, [callback]).of("communication/")
    assert sorted(logged) == [1, 3]
    metrics = callback.get_performance_metrics()
    assert set(metrics) == NAMES == set(METRICS)
    assert metrics["computation_time"] == 12
    assert metrics["load_balance_score"] == 1
    assert metrics["communication_time"] == metrics["synchronization_overhead"] == metrics["parameter_staleness"] == 0
    assert metrics["gradient_norm"] == pytest.approx(float(module.weight.grad.norm()))
    assert math.isnan(metrics["bandwidth_utilization"])
    assert callback.findings() == []


class Stale(pl.strategies.SingleDeviceStrategy):
    """Tells what a distributed strategy would."""

    def __init__(self, time):
        super().__init__("cpu")
        self.time, self.count = time, 0

    def parameter_staleness(self):
        return 1.0

    def communication_stats(self):
        steps = self.lightning_module.trainer.global_step
        return {
            "steps": steps, "skipped_steps": steps // 4, "intra_node_bytes": 1000 * steps, "inter_node_bytes": 0,
            "dense_bytes": 4000 * steps, "compression_ratio": 4.0, "exposed_seconds": 3.0 * steps,
            "hidden_seconds": 1.0 * steps, "residual_norm": 0.5,
        }  # fmt: skip


def test_what_a_strategy_tells_is_taken_out_of_the_backward_pass():
    time = FakeTime()
    callback = CommunicationMonitor(2, warm_up_steps=1, link_bandwidth=4000.0, _clock=time.clock())
    performance = PerformanceMonitor(2, warm_up_steps=1, _clock=time.clock())
    kept = fit(Timed(time), [callback, performance], strategy=Stale(time), max_epochs=2)
    first, *_, last = kept.of("communication/").values()
    for values in (first, last):
        assert values["exposed_seconds"] == 3 and values["hidden_seconds"] == 1
        assert values["computation_seconds"] == 4 + 8 - 3
        assert values["synchronization_overhead"] == pytest.approx(3 / 31)
        assert (values["intra_node_bytes"], values["dense_bytes"]) == (1000, 4000)
        assert values["bandwidth_utilization"] == pytest.approx(8000 / 4 / 4000)
        assert values["parameter_staleness"] == 1
    assert [values["skipped_steps"] for values in kept.of("communication/").values()] == [0, 1, 0, 1]
    steps = list(kept.of("performance/").values())
    assert all((s["seconds/communication"], s["seconds/backward"], s["step_seconds"]) == (3, 5, 31) for s in steps)


class FullDisk(Kept):
    def log_metrics(self, metrics, step=None):
        raise OSError("no space left on device")


def test_a_full_disk_is_two_warnings():
    """One of each monitor; the numbers are there all the same."""
    time = FakeTime()
    callbacks = [
        monitor(1, warm_up_steps=0, _clock=time.clock()) for monitor in (CommunicationMonitor, PerformanceMonitor)
    ]
    with pytest.warns(UserWarning, match="no space left") as warned:
        fit(Timed(time), callbacks, logger=FullDisk())
    assert sum("no space left" in str(warning.message) for warning in warned) == 2
    assert callbacks[0].get_performance_metrics()["computation_time"] == 12
    assert "over 4 steps" in callbacks[1].findings()[-1].text


def test_the_best_window_is_the_reference_and_is_kept():
    callback = CommunicationMonitor()
    rows = {
        seconds: over_ranks([of_rank(exposed_seconds=seconds, hidden_seconds=0.0, intra_node_bytes=1e9,
                                     inter_node_bytes=0.0)] * 2, 1)
        for seconds in (2.0, 1.0)
    }  # fmt: skip
    assert callback._utilization(rows[2.0]) == 1
    assert callback._utilization(rows[1.0]) == 1
    other = CommunicationMonitor()
    other.load_state_dict(callback.state_dict())
    assert other._utilization(rows[2.0]) == pytest.approx(0.5)


def test_bad_arguments_are_refused():
    for options, message in [
        ({"every_n_steps": 0}, "every_n_steps=0 must be at least 1"),
        ({"warm_up_steps": -1}, "warm_up_steps=-1 must not be negative"),
        ({"pipeline_every_n_logs": 0}, "pipeline_every_n_logs=0 must be at least 1"),
        ({"link_bandwidth": 0.0}, "link_bandwidth=0.0 must be a positive number of bits/s"),
    ]:
        with pytest.raises(ValueError, match=message):
            CommunicationMonitor(**options)


class Statistics(pl.Callback):
    """What the strategy has told at the end of each step, and the norm of the gradients."""

    def __init__(self):
        self.stats, self.norms = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in pl_module.parameters()])))

    def on_train_batch_end(self, trainer, *args):
        if hasattr(trainer.strategy, "communication_stats"):
            self.stats.append(trainer.strategy.communication_stats())


def train_by(strategy):
    callbacks = CommunicationMonitor(4, warm_up_steps=2), PerformanceMonitor(4, warm_up_steps=2)
    statistics, kept = Statistics(), Kept()
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=2, max_epochs=2, logger=kept, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        callbacks=[statistics, *callbacks],
    )  # fmt: skip
    trainer.fit(PlainModule(), loader(4, rank=trainer.global_rank, ranks=2))
    findings = [*callbacks[0].findings(), *callbacks[1].findings()]
    return callbacks[0].get_performance_metrics(), kept.metrics, statistics.stats, statistics.norms, findings


def train_twice():
    return train_by(DanonHybridStrategy(compression="int8")), train_by("ddp")


def test_two_ranks_by_any_strategy():
    (coded, plain), (coded_1, plain_1) = run_distributed(train_twice, 2, timeout=120)
    metrics, logged, stats, norms, findings = coded
    assert set(metrics) == NAMES
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics == coded_1[0]
    assert coded_1[1] == {}  # the first rank logs
    assert 0 < metrics["load_balance_score"] <= 1 and 0 < metrics["bandwidth_utilization"] <= 1
    assert metrics["gradient_norm"] == pytest.approx(norms[11])
    assert 0 < metrics["synchronization_overhead"] < 1 and metrics["parameter_staleness"] == 0
    assert "communication" in {finding.subject for finding in findings}
    values = logged[11]
    for name in ("intra_node_bytes", "dense_bytes"):
        told = [(own[11][name] - own[7][name]) / 4 for own in (stats, coded_1[2])]
        expected = sum(told) if name == "intra_node_bytes" else sum(told) / 2
        assert values[f"communication/{name}"] == pytest.approx(expected)
    assert values["communication/compression_ratio"] == pytest.approx(stats[11]["compression_ratio"])
    parts = {tag: value for tag, value in values.items() if tag.startswith("performance/seconds/")}
    assert sum(parts.values()) == pytest.approx(values["performance/step_seconds"])
    assert parts["performance/seconds/communication"] > 0
    assert values["performance/samples_per_second"] == pytest.approx(8 / values["performance/step_seconds"])

    metrics, logged, _, norms, _ = plain
    # DDP times the exchange of a single step in each window: where that is longer than all passes of these few steps,
    # nothing is known about what ranks compute.
    unknown = {name for name, value in metrics.items() if math.isnan(value)}
    assert {"bandwidth_utilization"} <= unknown <= {"bandwidth_utilization", "load_balance_score"}
    assert metrics["communication_time"] > 0
    assert "load_balance_score" in unknown or 0 < metrics["load_balance_score"] <= 1
    assert metrics["gradient_norm"] == pytest.approx(norms[11]) == pytest.approx(plain_1[3][11])
    parameters = sum(p.numel() for p in PlainModule().parameters())
    assert logged[11]["communication/dense_bytes"] == 4 * parameters
    assert "communication/intra_node_bytes" not in logged[11]


def train_in_stages():
    strategy = DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=4)
    callbacks = CommunicationMonitor(2, warm_up_steps=1), PerformanceMonitor(2, warm_up_steps=1)
    kept = Kept()
    trainer = lightning_modules.make_trainer(strategy, 2, max_steps=6, max_epochs=-1, logger=kept)
    trainer.callbacks.extend(callbacks)
    trainer.fit(lightning_modules.Tied(), lightning_modules.loader())
    return callbacks[0].get_performance_metrics(), kept.metrics


def test_a_pipeline_has_a_bubble_and_one_norm():
    (metrics, logged), (other, nothing) = run_distributed(train_in_stages, 2, timeout=120)
    assert metrics == pytest.approx(other, nan_ok=True)
    assert not any(tag.startswith(("communication/", "performance/")) for row in nothing.values() for tag in row)
    rows = [row for row in logged.values() if "performance/step_seconds" in row]
    assert len(rows) == 3
    for row in rows:
        assert 0 < row["communication/pipeline_bubble_ideal"] < 1
        assert 0 < row["communication/pipeline_bubble"] < 1
        parts = {tag: value for tag, value in row.items() if tag.startswith("performance/seconds/")}
        assert sum(parts.values()) == pytest.approx(row["performance/step_seconds"])
        for part in ("forward", "backward", "communication"):
            assert parts[f"performance/seconds/{part}"] > 0
        # Both ranks have the same batch.
        assert row["performance/samples_per_second"] == pytest.approx(8 / row["performance/step_seconds"])
        assert row["performance/tokens_per_second"] == pytest.approx(48 / row["performance/step_seconds"])
    assert 0 < metrics["load_balance_score"] <= 1 and metrics["communication_time"] > 0
    # Embedding and head share their weight, which both stages hold.
    alone = Statistics()
    trainer = lightning_modules.make_trainer(max_steps=6, max_epochs=-1)
    trainer.callbacks.append(alone)
    trainer.fit(lightning_modules.Tied(), lightning_modules.loader())
    assert metrics["gradient_norm"] == pytest.approx(alone.norms[5], rel=1e-5)
