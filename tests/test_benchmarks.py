"""The scripts run. Times that they measure are not tested; bytes are, and what is made of times."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from danon_lightning.strategies.pipeline.timeline import Pass

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def run(script, *arguments):
    if not SCRIPTS.exists():
        pytest.skip("not a checkout of the repository")
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.slow
def test_the_cost_of_kernels_is_printed_and_written(tmp_path):
    file = tmp_path / "kernels.json"
    assert "int8: encode" in run("kernels.py", "--json", str(file))
    assert json.loads(file.read_text())["eager"]["compiled"] is False


@pytest.mark.slow
def test_the_cost_in_quality_is_printed_and_written(tmp_path):
    file = tmp_path / "quality.json"
    variants = ["int8", "sgd topk 1 %, warm-up, momentum correction"]
    output = run("quality.py", "--only", *variants, "--seeds", "1", "--steps", "10", "--json", str(file))
    assert "dense" in output
    results = json.loads(file.read_text())["results"]
    assert set(results) == {"dense", "int8", "sgd dense", "sgd topk 1 %, warm-up, momentum correction"}
    assert results["dense"]["ratio"] == results["sgd dense"]["ratio"] == 1
    assert all(0.5 < row["ratio"] < 2 for row in results.values())


@pytest.mark.slow
def test_the_cost_of_pipelines_is_printed_and_drawn(tmp_path):
    file = tmp_path / "timeline.png"
    output = run("pipeline.py", "--only", "1f1b", "--steps", "5", "--micro-batches", "2", "--plot", str(file))
    assert "1f1b" in output
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_cost_of_monitors_is_printed_and_written(tmp_path):
    file = tmp_path / "monitors.json"
    small = ["--layers", "1", "--width", "64", "--block", "4", "--every", "2", "--pairs", "2"]
    assert "both monitors every 2 steps" in run("monitors_cost.py", *small, "--json", str(file))
    results = json.loads(file.read_text())["results"]
    assert len(results["wall"]["ratios"]) == len(results["processor"]["ratios"]) == 2


@pytest.mark.slow
def test_what_auto_chooses_is_printed_and_written(tmp_path):
    file = tmp_path / "auto.json"
    quick = ["--models", "embeddings", "--rounds", "1", "--seconds", "0.1", "--settle", "20"]
    assert "auto within 1.05 of the best fixed choice" in run("auto_compression.py", *quick, "--json", str(file))
    (model,) = json.loads(file.read_text())["models"]
    candidates = {"off", "bf16", "int8", "int4", "powersgd", "topk", "sign"}
    for found in model["rates"]:
        assert set(found["turns"]) == {"ddp", "auto", *candidates} and found["choice"] in candidates
        assert found["mbit"] is None or set(found["predicted"]) == candidates


# ---- what the figures rest on: the measures themselves, on small settings


@pytest.fixture
def load(monkeypatch):
    """Imports a script."""
    if not SCRIPTS.exists():
        pytest.skip("not a checkout of the repository")
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def test_idle_is_what_passes_leave_of_ranks_and_time(load):
    bubble = load("pipeline_bubble")
    # Two ranks and two micro-batches, F = 1 and B = 2; clocks of ranks start anywhere before the first pass.
    ranks = [
        [Pass(0, "forward", 0, 5, 6), Pass(0, "forward", 1, 6, 7), Pass(0, "backward", 0, 9, 11)],
        [Pass(1, "forward", 0, 6, 7), Pass(1, "backward", 0, 7, 9), Pass(1, "forward", 1, 9, 10)],
    ]
    ranks[1].append(Pass(1, "backward", 1, 10, 12))
    ranks[0].append(Pass(0, "backward", 1, 12, 14))
    assert bubble.idle_share(ranks) == pytest.approx(bubble.least_idle(2, 2)) == pytest.approx(1 / 3)
    # Gradients of weights are work; what else a timeline may show is not.
    ranks[1].append(Pass(1, "weights", 1, 12, 13.5))
    ranks[1].append(Pass(1, "waiting", 1, 13.5, 20))
    assert bubble.idle_share(ranks) == pytest.approx(1 - 13.5 / 18)


def test_a_layer_waits_for_its_weight_when_the_gradient_of_the_weight_is_computed(load, monkeypatch):
    bubble = load("pipeline_bubble")
    slept = []
    monkeypatch.setattr(bubble.time, "sleep", lambda seconds: slept.append(seconds) if seconds else None)
    layer = bubble.WaitingLayer(3.0)
    x = torch.zeros(2, requires_grad=True)
    layer(x).sum().backward()
    assert len(slept) == 3
    slept.clear()
    _, groups = stage_backward_input([layer(x).sum()], None, [x], iter([layer.weight]))
    assert len(slept) == 2
    stage_backward_weight(iter([layer.weight]), groups)
    assert len(slept) == 3
    assert layer.weight.grad == 4  # of both


@pytest.mark.slow
def test_a_rank_holds_its_share_of_parameters_gradients_and_optimizer_state(load):
    memory = load("pipeline_memory")
    single = memory.hold(1, 128)
    weights = memory.LAYERS * (128 + 1) * 128 * 4
    assert single.parameters == single.gradients == weights
    assert single.optimizer == 2 * weights + 4 * 2 * memory.LAYERS  # and counters of steps
    for held in memory.measure_held(2, 128):
        assert held.parameters + held.optimizer <= 1.1 / 2 * (single.parameters + single.optimizer)
        assert held.gradients == weights / 2
        # Nothing else is kept but a batch, of other sizes.
        assert held.tensors <= 1.1 * (held.parameters + held.optimizer + held.gradients)


@pytest.mark.slow
def test_activations_of_1f1b_do_not_grow_with_the_number_of_micro_batches(load):
    peaks = load("pipeline_memory").measure_activations(2, [4, 8], width=32, samples=256)
    assert peaks["1f1b"][4] == peaks["1f1b"][8]
    assert peaks["gpipe"][8] > 1.9 * peaks["gpipe"][4] > 1.9 * peaks["1f1b"][4]


@pytest.mark.slow
def test_who_finds_planted_faults_is_printed_and_written(tmp_path):
    file = tmp_path / "nan_faults.json"
    assert "module named" in run("nan_faults.py", "--json", str(file), "--rounds", "1", "--layers", "1")
    found = json.loads(file.read_text())
    ours = found["faults"]["totals"]["NaN debugger"]
    assert ours["both"] / ours["of"] >= 13 / 14 and ours["false_alarms"] == 0
    assert set(found["costs"]["tools"]) == {"plain", "NaN debugger", "detect_anomaly", "module hooks"}


@pytest.mark.slow
def test_the_cost_of_a_healthy_check_is_printed_and_written(tmp_path):
    file = tmp_path / "nan_check.json"
    small = ["--pairs", "2", "--layers", "1", "--samples", "2", "--length", "8"]
    assert "the callback itself" in run("nan_check.py", *small, "--json", str(file))
    found = json.loads(file.read_text())
    assert found["reads_a_step"] == 1 and found["pairs"] == 2 and found["tokens_a_step"] == 16


def test_buckets_are_those_of_ddp(load):
    script = load("forward_overlap")
    sizes = script.Sizes(layers=7, side=256, compute_seconds=1.0, bucket_mb=0.5, steps=1)  # two matrices fill a bucket
    assert script.buckets_of(sizes) == 4
    assert script.saving(sizes, 2.0) == pytest.approx(1 / 3 * (1 - 1 / 3))
    assert script.saving(sizes, 0.6) == 0


@pytest.mark.slow
@pytest.mark.hosts
def test_what_overlap_gains_is_printed_and_written(tmp_path):
    file = tmp_path / "overlap.json"
    small = ["--mbit", "500", "--layers", "6", "--side", "128", "--compute-ms", "30", "--bucket-mb", "0.05"]
    assert "forward" in run("forward_overlap.py", *small, "--steps", "4", "--json", str(file))
    results = {one["name"]: one for one in json.loads(file.read_text())["results"]}
    assert set(results) == {"alone", "ddp", "dense", "arrival", "forward"}
    assert results["arrival"]["held_back"] == 0 and 0 <= results["forward"]["held_back"] <= 5
    assert 0 < results["forward"]["exposed_seconds"] <= results["forward"]["exchange_seconds"]
