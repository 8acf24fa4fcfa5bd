"""Where the time goes, by a clock that the parts of a step move on."""

import gzip
import json
import math
import mmap
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import PyTorchProfiler, SimpleProfiler

sys.path.insert(0, str(Path(__file__).parent))
from fake_time import FakeTime, Manual, Samples, Slow, Timed, fit  # noqa: E402

from danon_lightning.callbacks import PerformanceMonitor
from danon_lightning.callbacks.health import ReportsFindings
from danon_lightning.callbacks.performance_monitor.memory import MemoryMeter, limit_of
from danon_lightning.callbacks.performance_monitor.parts import PARTS, PartTimer
from danon_lightning.callbacks.performance_monitor.samples import tokens_in
from danon_lightning.callbacks.performance_monitor.summary import RankWindow, RunTotals, values_to_log
from danon_lightning.callbacks.performance_monitor.trace import traced_steps


def monitor(time, every=2, **options):
    return PerformanceMonitor(every, _clock=time.clock(), **{"warm_up_steps": 0, **options})


def seconds(logged):
    return {part: value for part, value in logged.items() if part.startswith("seconds/") and value}


# With manual optimization the first batch is fetched before training starts in neither case.
@pytest.mark.parametrize("module", [Timed, Manual])
def test_each_part_gets_its_time(module):
    time = FakeTime()
    logged = fit(module(time), [monitor(time)]).of("performance/")
    assert sorted(logged) == [1, 3]
    for values in logged.values():
        assert seconds(values) == {
            "seconds/data_wait": 2, "seconds/batch_transfer": 1, "seconds/forward": 4, "seconds/backward": 8,
            "seconds/optimizer": 16,
        }  # fmt: skip
        assert values["step_seconds"] == 31
        assert values["samples_per_second"] == pytest.approx(2 / 31)
        assert values["tokens_per_second"] == pytest.approx(12 / 31)
    assert time.seconds == 4 * 31


def test_a_step_takes_all_batches_whose_gradients_are_accumulated():
    time = FakeTime()
    logged = fit(Timed(time), [monitor(time, 1)], accumulate_grad_batches=3).of("performance/")
    first, last = logged[0], logged[1]  # Lightning steps at the end of an epoch, after one batch
    assert first["step_seconds"] == 3 * 15 + 16
    assert first["samples_per_second"] == pytest.approx(6 / 61)
    assert last["step_seconds"] == 31


def test_other_callbacks_and_pauses_are_told_apart(tmp_path):
    time = FakeTime()

    class Saved(Timed):
        def on_save_checkpoint(self, checkpoint):
            self.time.passes(500.0)

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    logged = fit(
        Saved(time), [Slow(time, 0.5), monitor(time, 4)], folder=tmp_path, limit_val_batches=1, val_check_interval=2,
        enable_checkpointing=True, max_epochs=2,
    ).of("performance/")  # fmt: skip
    assert logged[3]["seconds/callbacks"] == 0.5
    assert logged[3]["step_seconds"] == 31.5
    assert logged[3]["pause_seconds/validation"] == 1201  # after two steps; that after four follows
    assert logged[7]["pause_seconds/validation"] == 2 * 1201
    assert logged[7]["pause_seconds/checkpoint"] == 2 * 500  # one in each validation, and not counted there
    assert logged[7]["step_seconds"] == 31.5

    time = FakeTime()
    logged = fit(
        Saved(time), [saving, monitor(time, 4)], folder=tmp_path, enable_checkpointing=True, max_epochs=2
    ).of("performance/")  # fmt: skip
    assert (logged[3]["pause_seconds/checkpoint"], logged[7]["pause_seconds/checkpoint"]) == (500, 1000)
    assert logged[7]["step_seconds"] == 31


def test_the_first_steps_are_left_out():
    class SlowAtFirst(Timed):
        def training_step(self, batch, batch_idx):
            if self.global_step < 2:
                self.time.passes(10_000.0)
            return super().training_step(batch, batch_idx)

    time = FakeTime()
    callback = monitor(time, 3, warm_up_steps=2)
    logged = fit(SlowAtFirst(time), [callback], max_epochs=3).of("performance/")
    assert [values["step_seconds"] for values in logged.values()] == [31] * 4
    assert all(values["samples_per_second"] == pytest.approx(2 / 31) for values in logged.values())
    (note,) = (finding for finding in callback.findings() if finding.severity == "note")
    assert "over 10 steps" in note.text and "first 2 steps of fit are left out" in note.text

    # A window that was left out wholly.
    logged = fit(Timed(time), [monitor(time, 2, warm_up_steps=2)]).of("performance/")
    assert "step_seconds" not in logged[1] and "memory/resident_gib" in logged[1]
    assert logged[3]["step_seconds"] == 31


def test_waiting_for_data_is_found():
    time = FakeTime()
    callback = monitor(time)
    assert isinstance(callback, ReportsFindings)
    assert callback.findings() == []
    fit(Timed(time, fetching=10.0), [callback])
    warning, note = callback.findings()
    assert (warning.severity, warning.subject) == ("warning", "data loading")
    assert "waited for batches 41% of the time" in warning.text and "workers" in warning.advice
    assert "49 s a step over 4 steps" in note.text and "data wait 41%" in note.text

    quick = monitor(time)
    fit(Timed(time), [quick])
    assert [finding.severity for finding in quick.findings()] == ["note"]


def test_a_loader_that_sleeps_is_recognised_by_the_real_clock():
    class Sleepy(Samples):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    fake = FakeTime()
    loader = torch.utils.data.DataLoader(Sleepy(fake, 0.0), batch_size=2)
    module = Timed(fake)
    module.train_dataloader = lambda: loader
    values = fit(module, [PerformanceMonitor(4, warm_up_steps=0)]).of("performance/")[3]
    assert values["seconds/data_wait"] > 0.5 * values["step_seconds"]
    assert sum(values[f"seconds/{part}"] for part in PARTS if f"seconds/{part}" in values) == pytest.approx(
        values["step_seconds"]
    )


def test_any_profiler_goes_on_to_work():
    time, profiler = FakeTime(), SimpleProfiler()
    fit(Timed(time), [monitor(time), monitor(time)], profiler=profiler)
    assert len(profiler.recorded_durations["run_training_batch"]) == 4


def test_what_breaks_a_run_leaves_the_profiler_alone():
    class Broken(Timed):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise ArithmeticError
            return super().training_step(batch, batch_idx)

    time = FakeTime()
    callback = monitor(time)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False, enable_checkpointing=False
    )
    with pytest.raises(ArithmeticError):
        trainer.fit(Broken(time))
    assert not {"start", "stop"} & set(vars(trainer.profiler))


def test_a_user_tells_what_a_batch_holds():
    fake = FakeTime()
    told = monitor(fake, 4, tokens=lambda batch: 100, samples=lambda batch: 7)
    values = fit(Timed(fake), [told]).of("performance/")[3]
    assert values["tokens_per_second"] == pytest.approx(100 / 31)
    assert values["samples_per_second"] == pytest.approx(7 / 31)

    with pytest.warns(UserWarning, match=r"cannot count the tokens of a batch \(ZeroDivisionError"):
        values = fit(Timed(fake), [monitor(fake, 4, tokens=lambda batch: 1 / 0)]).of("performance/")[3]
    assert "tokens_per_second" not in values and "samples_per_second" in values


def test_tokens_are_the_first_integers_of_two_dimensions():
    ids, image = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 4, 4)
    assert tokens_in({"image": image, "text": [ids, ids]}) == 15
    assert math.isnan(tokens_in((image, torch.zeros(3, dtype=torch.long), torch.zeros(3, 5, dtype=torch.bool))))


def test_what_several_ranks_have_measured():
    """Two replicas of two pipeline ranks each."""
    rows = [
        RankWindow(10, 40.0, math.nan, 1.0, 2.0 + rank, math.nan, math.nan, 16.0).row(
            {"forward": 8.0, "data_wait": 2.0 if rank else 12.0, "validation": 5.0}
        )
        for rank in range(4)
    ]
    values = values_to_log(rows, replicas=2)
    assert values["performance/step_seconds"] == pytest.approx(1.25)
    assert values["performance/seconds/data_wait"] == pytest.approx(0.45)
    assert values["performance/samples_per_second"] == pytest.approx(80 / 12.5)
    assert "performance/tokens_per_second" not in values
    assert values["performance/memory/resident_peak_gib"] == 5
    assert values["performance/pause_seconds/validation"] == 5

    totals = RunTotals()
    totals.add(rows, 2)
    data, memory, note = totals.findings(cuda=False, ranks_per_host=3, warm_up=0)
    assert "60% of the time (rank 0; 30% over all ranks)" in data.text
    assert (memory.subject, memory.text) == ("memory", "15.0 of 16.0 GiB were in use on rank 3 by 3 processes")
    assert "6 samples/s" in note.text and "tokens" not in note.text
    assert "memory" not in {f.subject for f in totals.findings(cuda=False, ranks_per_host=2, warm_up=0)}


class DeviceTime:
    """A device whose moments come only when it has been waited for."""

    def __init__(self):
        self.come, self.waited, self.time = 0.0, 0, 0.0

    def now(self):
        self.time += 1.0
        return self.time

    def has_come(self, moment):
        return moment <= self.come

    def wait(self, moment):
        self.waited, self.come = self.waited + 1, moment

    def seconds(self, start, end):
        assert end <= self.come, "read before the device had come so far"
        return end - start

    def forget(self, moment):
        pass


def test_a_device_is_waited_for_only_when_asked():
    clock, found = DeviceTime(), {}
    timer = PartTimer(clock, found)  # 1
    timer.start("forward")  # 2
    timer.start("forward")  # the same: no moment of its own
    timer.stop("forward")
    timer.start("callbacks")  # 3
    timer.start("validation")  # 4
    timer.start("batch_transfer")  # a pause keeps it out
    timer.start("checkpoint")  # 5
    timer.stop("validation")  # 6: all that was started since ends too
    timer.settle()
    assert (found, clock.waited) == ({}, 0)
    clock.come = 3.0
    timer.settle()
    assert found == {"other": 1.0, "forward": 1.0}
    timer.stop("backward")  # never started
    timer.stop_all()  # 7
    timer.settle(wait=True)  # 8
    assert clock.waited == 1
    assert found == {"other": 2.0, "forward": 1.0, "callbacks": 2.0, "validation": 1.0, "checkpoint": 1.0}
    assert sum(found.values()) == 7


@pytest.mark.cuda
def test_on_cuda_times_and_memory_are_those_of_the_device():
    class Big(Timed):
        def training_step(self, batch, batch_idx):
            big = torch.randn(2048, 2048, device=self.device)
            for _ in range(20):
                big = big @ big.softmax(1)
            return super().training_step(batch, batch_idx) + 0 * big.sum()

    values = fit(Big(FakeTime()), [PerformanceMonitor(4, warm_up_steps=2)], accelerator="cuda", devices=1, max_epochs=2)
    values = values.of("performance/")[7]
    assert values["seconds/forward"] > 0.5 * values["step_seconds"]
    assert sum(seconds(values).values()) == pytest.approx(values["step_seconds"])
    assert values["memory/reserved_peak_gib"] >= values["memory/allocated_peak_gib"] > 0.04


def test_memory_is_that_of_the_process():
    meter = MemoryMeter(torch.device("cpu"))
    before = meter.read()
    # Of the system, not of what other tests have left to the C library.
    big = mmap.mmap(-1, 64 << 20)
    torch.frombuffer(big, dtype=torch.uint8).fill_(1)
    with_it = meter.read()
    big.close()
    after = meter.read()
    assert with_it.resident_peak - before.resident > 0.05
    assert with_it.resident - after.resident > 0.05
    # Counters of the kernel are added up now and then.
    assert after.resident_peak > with_it.resident - 0.01
    assert meter.read().resident_peak < with_it.resident - 0.05
    assert math.isnan(before.allocated_peak)
    assert before.resident < limit_of(torch.device("cpu"))


def test_memory_is_read_where_there_is_no_proc(tmp_path):
    use = MemoryMeter(torch.device("cpu"), tmp_path).read()
    assert math.isnan(use.resident) and use.resident_peak > 0
    # A peak that cannot be reset.
    (tmp_path / "status").write_text("VmHWM:\t 2097152 kB\nVmRSS:\t 1048576 kB\n")
    (tmp_path / "clear_refs").mkdir()
    use = MemoryMeter(torch.device("cpu"), tmp_path).read()
    assert (use.resident, use.resident_peak) == (1.0, 2.0)


def traces(folder):
    return sorted(Path(folder).glob("rank0.*.pt.trace.json"))


@pytest.mark.parametrize("profile_steps", [range(3, 5), (2, 1, 2)])
def test_steps_are_traced_into_the_log_folder(tmp_path, profile_steps):
    time = FakeTime()
    callback = monitor(time, 4, profile_steps=profile_steps)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[callback], enable_progress_bar=False, enable_checkpointing=False,
        logger=TensorBoardLogger(tmp_path, name="run", version=0),
    )  # fmt: skip
    trainer.fit(Timed(time))
    (trace,) = traces(tmp_path / "run/version_0")
    text = gzip.open(trace).read() if trace.suffix == ".gz" else trace.read_text()
    names = [event.get("name", "") for event in json.loads(text)["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in set(names)) == 2
    assert any("aten::" in name for name in names)
    # Steps 2 to 4 are not averaged; with the fourth, the first window is left out.
    (note,) = (finding for finding in callback.findings() if finding.severity == "note")
    assert "over 3 steps" in note.text


def test_a_trace_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    time = FakeTime()
    callback = monitor(time, 4, profile_steps=(0, 0, 1))

    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], enable_progress_bar=False, enable_checkpointing=False,
        logger=False, default_root_dir=tmp_path / "file",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="PerformanceMonitor's trace could not write"):
        trainer.fit(Timed(time))
    assert trainer.global_step == 4


def test_bad_arguments_are_refused():
    for options, message in [
        ({"every_n_steps": 0}, "every_n_steps=0 must be at least 1"),
        ({"warm_up_steps": -1}, "warm_up_steps=-1 must not be negative"),
        ({"profile_steps": range(3, 3)}, r"profile_steps=range\(3, 3\) must be steps"),
        ({"profile_steps": (1, 2)}, r"profile_steps=\(1, 2\) must be a range"),
        ({"profile_steps": (1, 2, 0)}, r"profile_steps=\(1, 2, 0\) must be a range"),
    ]:
        with pytest.raises(ValueError, match=message):
            PerformanceMonitor(**options)
    assert traced_steps(range(5, 7)) == (range(5, 7), 1)
    assert traced_steps((3, 2, 4)) == (range(5, 9), 2)
    with pytest.raises(ValueError, match="torch has only one profiler"):
        PerformanceMonitor(profile_steps=(0, 1, 1)).on_fit_start(SimpleNamespace(profiler=PyTorchProfiler()), None)
