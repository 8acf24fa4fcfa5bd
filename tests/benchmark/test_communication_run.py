"""`danon-bench communication` from end to end, with few elements; what it measures is not tested."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from danon_lightning.benchmark.command_line import main
from danon_lightning.benchmark.communication.measurement import Setting, measure_variants
from danon_lightning.benchmark.communication.variants import VARIANTS, Variant
from danon_lightning.benchmark.communication.workload import Workload
from danon_lightning.testing import EmulatedHosts


@pytest.mark.slow
def test_without_hosts_it_says_so_and_measures_on_loopback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(EmulatedHosts, "unavailable_reason", staticmethod(lambda: "this is a test"))
    files = {name: tmp_path / name for name in ("run.json", "plot.png")}
    code = main(
        ["communication", "--ranks", "1", "--elements-m", "0.03", "--steps", "2", "--only", "alone", "flat", "int8"]
        + ["--mbit", "100", "0", "--json", str(files["run.json"]), "--plot", str(files["plot.png"])]
    )
    text = capsys.readouterr().out
    assert code == 0, text
    assert "No emulated hosts: this is a test." in text and "unshaped: flat" in text
    assert "3 finished" in text.splitlines()[-1] and "plot.png" in text.splitlines()[-1]
    assert files["plot.png"].read_bytes().startswith(b"\x89PNG")
    content = json.loads(files["run.json"].read_text())
    assert content["arguments"]["mbit"] == [None] and content["environment"]["network"] == "loopback"
    rows = {row["variant"]: row for row in content["rows"]}
    assert all(row["egress_bytes"] is None and row["line_rate_share"] is None for row in rows.values())
    assert rows["flat"]["ratio"] == 1 and rows["flat"]["payload_bytes"] is None
    assert rows["int8"]["payload_bytes"] == pytest.approx(rows["int8"]["formula_bytes"], rel=0.1)


@pytest.mark.hosts
def test_bytes_that_leave_emulated_hosts_are_as_the_formula_says(tmp_path, capsys):
    file = tmp_path / "run.json"
    arguments = ["--elements-m", "1.5", "--steps", "2", "--only", "flat", "dense", "int8", "--mbit", "1000"]
    assert main(["communication", *arguments, "--json", str(file)]) == 0, capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["flat", "dense", "int8"]
    for row in rows:
        assert (row["status"], row["mbit"]) == ("finished", 1000)
        assert row["egress_bytes"] == pytest.approx(row["formula_bytes"], rel=0.05)
        assert 0 < row["line_rate_share"] < 1.1
        if row["variant"] != "flat":
            assert row["payload_bytes"] == pytest.approx(row["formula_bytes"], rel=0.03)


def _crash(ddp, nodes):
    if dist.get_rank() == 1:
        raise ValueError("this is the reason\nand more of it")


def _sleep(folder: str, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)
    raise AssertionError


def _hang(folder, ddp, nodes):
    ddp.register_comm_hook(folder, _sleep)


@pytest.mark.slow
def test_variants_that_fail_are_reported_and_leave_nothing_behind(tmp_path):
    crashing = Variant("crashing", "", _crash, lambda workload: 0.0)
    hanging = Variant("hanging", "", partial(_hang, str(tmp_path)), lambda workload: 0.0)
    seen = []
    setting = Setting(Workload.of_size(1, 2, 1), None, None, steps=1, step_limit=3.0)
    rows = measure_variants([VARIANTS["flat"], crashing, hanging], setting, seen.append)
    flat, crashed, hung = rows
    assert flat.status == "finished" and flat.seconds
    assert crashed.status == "crashed"
    assert crashed.message == "crashed while it was set up: ValueError: this is the reason"
    assert "in _crash" in crashed.detail
    assert (hung.status, hung.message) == ("hung", "hung after 3 s in step 1 of 4")
    assert "in _sleep" in hung.detail
    assert {progress.variant for progress in seen} >= {"hanging"}
    processes = [int(path.name) for path in tmp_path.iterdir()]
    assert len(processes) == 2
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.slow
@pytest.mark.hosts
def test_interrupted_it_leaves_nothing_behind():
    command = [sys.executable, "-u", "-m", "danon_lightning.benchmark.command_line", "communication"]
    with subprocess.Popen(
        [*command, "--ranks", "1", "--mbit", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with the signal ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert any("1 Mbit/s: alone" in line for line in process.stdout)
            assert _namespaces(process.pid)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.startswith("interrupted")
    assert not _namespaces(process.pid)


def _namespaces(pid):
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return re.findall(rf"^danon-{pid}-\S+", listed, re.MULTILINE)
