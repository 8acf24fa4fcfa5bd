"""Every benchmark runs; what it measures is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script, folder, *arguments):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments, "--json", folder / "out.json"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text())["results"]


@pytest.mark.hosts
def test_exchange(tmp_path):
    results = run("exchange.py", tmp_path, "--nodes", "2", "--ranks", "1", "--layers", "1", "--steps", "1")
    assert results["ddp"]["speedup"] == 1
    assert results["int8"]["inter_node_bytes"] < 0.3 * results["dense"]["inter_node_bytes"]
