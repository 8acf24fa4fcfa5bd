"""The scripts run; what they measure is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def run(script, *arguments):
    if not SCRIPTS.exists():
        pytest.skip("not a checkout of the repository")
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def test_the_cost_of_kernels_is_printed_and_written(tmp_path):
    file = tmp_path / "kernels.json"
    assert "int8: encode" in run("kernels.py", "--json", str(file))
    assert json.loads(file.read_text())["eager"]["compiled"] is False


def test_the_cost_in_quality_is_printed_and_written(tmp_path):
    file = tmp_path / "quality.json"
    variants = ["int8", "sgd topk 1 %, warm-up, momentum correction"]
    output = run("quality.py", "--only", *variants, "--seeds", "1", "--steps", "10", "--json", str(file))
    assert "dense" in output
    results = json.loads(file.read_text())["results"]
    assert set(results) == {"dense", "int8", "sgd dense", "sgd topk 1 %, warm-up, momentum correction"}
    assert results["dense"]["ratio"] == results["sgd dense"]["ratio"] == 1
    assert all(0.5 < row["ratio"] < 2 for row in results.values())


def test_the_cost_of_pipelines_is_printed_and_drawn(tmp_path):
    file = tmp_path / "timeline.png"
    output = run("pipeline.py", "--only", "1f1b", "--steps", "5", "--micro-batches", "2", "--plot", str(file))
    assert "1f1b" in output
    assert file.read_bytes().startswith(b"\x89PNG")
