"""`danon-bench attention` from end to end on short sequences; what it measures is not tested."""

import json

import pytest
import torch

from danon_lightning.attention import registry
from danon_lightning.benchmark.attention.memory import PeakMemory
from danon_lightning.benchmark.command_line import main

FAILING = """
import os, signal
from dataclasses import dataclass
from danon_lightning.attention import AttentionConfig, AttentionCore, register_variant

@dataclass(frozen=True, kw_only=True)
class FailingConfig(AttentionConfig):
    pass

class Failing(AttentionCore):
    def init_state(self, batch_size, *, device, dtype):
        raise NotImplementedError("it does not stream")

    def forward(self, x, q, k, v, *, key_padding_mask=None, state=None):
        if q.shape[2] == 64:
            os.kill(os.getpid(), signal.SIGKILL)
        return v, None

register_variant("failing", FailingConfig, Failing)
"""


def test_it_measures_and_writes_and_a_failing_variant_gets_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "failing_variant.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_variants", dict(registry._variants))
    files = {name: tmp_path / name for name in ("run.json", "plot.png")}
    code = main(
        ["attention", "--import", "failing_variant", "--variants", "sdpa", "msra", "failing"]
        + ["--lengths", "32", "64", "--heads", "2", "--head-dim", "8", "--repeats", "1", "--fit", "32", "64"]
        + ["--json", str(files["run.json"]), "--plot", str(files["plot.png"])]
    )
    text = capsys.readouterr().out
    assert code == 1, text
    assert "failing at 64: killed: killed by signal 9" in text
    assert "failing at 32, 64: crashed: NotImplementedError: it does not stream" in text
    assert files["plot.png"].read_bytes().startswith(b"\x89PNG")
    content = json.loads(files["run.json"].read_text())
    assert content["arguments"]["lengths"] == [32, 64] and content["environment"]["processor"]
    rows = {(row["contender"], row["direction"], row["length"]): row for row in content["rows"]}
    assert len(rows) == 3 * 2 * 2
    for (name, _, tokens), row in rows.items():
        if name != "failing" or tokens == 32:
            assert row["status"] == "finished" and row["seconds"] > 0 and row["runs"] >= 1
            assert row["ratio"] > 0 and row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
            # x, q, k, v and a decay a head.
            assert row["input_bytes"] == 4 * tokens * (4 * 16 + 2)
    states = {(state["contender"], state["length"]): state for state in content["states"]}
    assert [states["msra", tokens]["status"] for tokens in (32, 64)] == ["finished"] * 2
    assert 0 < states["msra", 32]["state_bytes"] < states["msra", 64]["state_bytes"]


def test_a_cell_that_needs_more_memory_than_allowed_says_so(tmp_path, capsys):
    file = tmp_path / "run.json"
    code = main(
        ["attention", "--variants", "sdpa", "msra", "--lengths", "64", "16k", "--heads", "2", "--head-dim", "16"]
        + ["--direction", "forward", "--memory-limit", "0.004", "--repeats", "1", "--no-state", "--json", str(file)]
    )
    assert code == 1, capsys.readouterr().out
    rows = {(row["contender"], row["length"]): row for row in json.loads(file.read_text())["rows"]}
    assert rows["msra", 64]["status"] == "finished"
    assert rows["msra", 16384]["status"] == "crashed" and "allocate" in rows["msra", 16384]["message"]


def test_memory_that_was_given_back_is_in_the_peak():
    peak = PeakMemory("cpu")
    torch.ones(5_000_000).sum()
    assert 19e6 < peak.grown() < 40e6
