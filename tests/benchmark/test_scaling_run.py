"""`danon-bench scaling` from end to end, with few elements; times that it measures are not tested, bytes are."""

import json

import pytest

from danon_lightning.benchmark.command_line import main
from danon_lightning.benchmark.scaling import command_line
from danon_lightning.benchmark.scaling.runner import JobFailedError
from danon_lightning.testing import EmulatedHosts


@pytest.mark.hosts
def test_two_hosts_are_measured_and_predicted(tmp_path, capsys):
    file = tmp_path / "run.json"
    sizes = ["--elements-m", "0.2", "--layers", "4", "--bucket-mb", "0.25", "--compute-ms", "30", "--steps", "2"]
    assert main(["scaling", "--hosts", "2", "--mbit", "500", *sizes, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "one host: " in text and "Nothing is projected" in text
    content = json.loads(file.read_text())
    assert content["environment"]["network"] == "emulated hosts"
    rows = {row["exchange"]: row for row in content["measured"]}
    assert list(rows) == ["ddp", "dense", "int8"]
    for row in rows.values():
        assert row["single_seconds"] >= 0.03 and row["measured"]["seconds"] >= 0.03
        assert 0 < row["exposed"] < 1 and row["predicted"]["seconds"] >= 0.03
    for name in ("dense", "int8"):
        assert rows[name]["measured"]["payload_bytes"] == pytest.approx(rows[name]["predicted"]["inter_node_bytes"])


def test_a_job_that_fails_is_reported(monkeypatch, capsys):
    def fail(*_):
        raise JobFailedError("rank 0 failed: ValueError: the reason", "the traceback")

    monkeypatch.setattr(EmulatedHosts, "unavailable_reason", staticmethod(lambda: "this is a test"))
    monkeypatch.setattr(command_line, "run_job", fail)
    assert main(["scaling", "--hosts", "2"]) == 1
    text = capsys.readouterr().out
    assert "No emulated hosts: this is a test." in text
    assert "rank 0 failed: ValueError: the reason" in " ".join(text.split()) and "the traceback" in text
