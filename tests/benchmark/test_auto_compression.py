"""What `benchmarks/auto_compression.py` makes of what ranks have measured; nothing is exchanged here."""

import importlib
import io
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    if not SCRIPTS.exists():
        pytest.skip("not a checkout of the repository")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def found(mbit, **others):
    return {
        "mbit": mbit, "choice": "int8", "predicted": {"off": 0.9, "int8": 0.18}, "settled_after": 2,
        "setup_seconds": 3.0, "lost_seconds": 2.5, "first_seconds": [0.2] * 30, "decisions": [],
        "turns": {
            "ddp": [1.4, 9.0, 1.5, 1.4], "off": [1.0, 1.1, 1.2, 1.0], "int8": [0.2, 0.2, 0.4, 0.2],
            "int4": [0.19, 0.19, 0.38, 0.19], "powersgd": [0.1, 1.1],
            "auto": [0.21, 0.21, 0.42, 0.21],
        },
        **others,
    }  # fmt: skip


def change(to, answer, choice, **others):
    return {
        "from": 100.0, "to": to, "choice_before": "int8", "answer": answer, "choice": choice, "answered_after": 12,
        "warnings": [], **others,
    }  # fmt: skip


def test_auto_is_compared_with_all_others_in_the_same_round(load):
    verdict = load("auto_compression").verdict_of(found(100.0))
    assert verdict.seconds == pytest.approx(
        {"ddp": 1.4, "off": 1.0, "int8": 0.2, "int4": 0.19, "powersgd": 0.6, "auto": 0.21}
    )
    assert verdict.best == "int4"  # powersgd was measured no further
    assert (verdict.to_best["auto"], verdict.to_ddp) == pytest.approx((0.21 / 0.19, 0.21 / 1.4))
    assert verdict.to_best[verdict.choice] == pytest.approx(0.2 / 0.19)


def test_the_best_is_found_in_one_half_of_the_rounds_and_measured_in_the_other(load):
    """Two that are alike, each lucky in every second round: neither is better than the other."""
    turns = {"ddp": [1.0] * 4, "off": [0.8, 1.0] * 2, "int8": [1.0, 0.8] * 2, "auto": [0.9] * 4}
    verdict = load("auto_compression").verdict_of(found(None, turns=turns))
    assert verdict.to_best["auto"] == pytest.approx(0.9) and verdict.to_best["off"] == pytest.approx((0.8 + 1) / 2)


def test_a_single_round_will_do(load):
    turns = {"ddp": [1.0], "off": [0.8], "int8": [1.0], "auto": [0.9]}
    verdict = load("auto_compression").verdict_of(found(None, turns=turns))
    assert verdict.best == "off" and verdict.to_best["auto"] == pytest.approx(0.9 / 0.8)


def test_a_change_of_bandwidth_is_answered_rightly_if_the_choice_is_good_and_in_time(load):
    script = load("auto_compression")
    verdicts = {None: script.verdict_of(found(None))}
    assert script.is_right(change(None, "int4", "int4"), verdicts)
    assert not script.is_right(change(None, "int8", "int4"), verdicts)  # 5.3 % slower
    assert not script.is_right(change(None, "int4", "int8"), verdicts)


def test_the_last_change_of_a_choice_is_what_counts(load):
    last_change = load("auto_compression_ranks").last_change
    assert last_change("off", ["off", "int8", "int8", "int4", "int4"]) == 4
    assert last_change("off", ["int8"] * 3) == 1 and last_change("off", ["off"] * 3) == 0


def test_tables_summary_and_picture(load, tmp_path):
    script = load("auto_compression")
    model = {
        "model": "wide", "parameters": 2_500_000, "rates": [found(100.0), found(None)],
        "changes": [change(None, "int4", "int4"), change(100.0, "powersgd", "int4")],
    }  # fmt: skip
    verdicts = {"wide": {one["mbit"]: script.verdict_of(one) for one in model["rates"]}}
    console = Console(file=io.StringIO(), width=80, highlight=False)
    for one in model["rates"]:
        console.print(script.table_of(model, one, verdicts["wide"][one["mbit"]]))
    console.print(script.changes_table(model, verdicts["wide"]))
    text = console.file.getvalue()
    assert "…" not in text and "wide, 2.5 M parameters, 100 Mbit/s" in text and "unshaped" in text
    rows = [line.replace("│", "").split() for line in text.splitlines() if line.startswith("│")]
    assert "int8 0.2000 0.95 7.00 0.1800 -10%".split() in rows
    assert "auto: int8 0.2100 0.90 6.67 - -".split() in rows
    assert rows[-2][-1] == "right" and rows[-1][-1] == "WRONG"
    best, ddp, changes = script.summary([model], verdicts)
    assert "0 of 2 (at worst 1.105)" in best and "2 of 2 (at worst 0.150)" in ddp and "1 of 2" in changes
    assert len(script.summary([{**model, "changes": []}], verdicts)) == 2
    pytest.importorskip("matplotlib")
    script.save_plot([model], verdicts, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_rank_0_is_heard_and_waits_until_it_is(load, tmp_path, monkeypatch):
    script, ranks = load("auto_compression"), load("auto_compression_ranks")
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ranks.dist, "barrier", lambda: None)
    rates, console = [], Console(file=io.StringIO())

    class Hosts:
        def set_rate(self, mbit):
            assert threading.current_thread().name == "listener"
            rates.append(mbit)

    with script.Listener(str(tmp_path), Hosts(), console):
        folder = ranks.Folder(str(tmp_path))
        folder.tell(mbit=100.0)
        assert rates == [100.0]
        folder.tell(say="half way")
        folder.tell(mbit=None)
    assert rates == [100.0, None] and "half way" in console.file.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_models_are_of_different_character(load):
    kinds = load("auto_compression_ranks").KINDS
    generator = torch.Generator().manual_seed(0)
    tensors, sizes = {}, {}
    for name, kind in kinds.items():
        model = kind.model()
        model(kind.batch(generator)).backward()
        parameters = list(model.parameters())
        assert all(parameter.grad is not None for parameter in parameters)
        tensors[name], sizes[name] = len(parameters), sum(parameter.numel() for parameter in parameters)
    assert tensors["convolutions"] > 2 * tensors["transformer"] > 4 * tensors["embeddings"]
    assert all(5e5 < size < 5e6 for size in sizes.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "what"], "invalid choice"),
        (["--mbit", "-1"], "not a rate"),
        (["--settle", "19"], "at least the 20 steps"),
        (["--rounds", "0"], "not a whole number of at least 1"),
    ],
)
def test_bad_arguments_are_refused(load, arguments, message, capsys, monkeypatch):
    script = load("auto_compression")
    monkeypatch.setattr(script.EmulatedHosts, "unavailable_reason", staticmethod(lambda: None))
    with pytest.raises(SystemExit):
        script.parsed(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_rates_need_hosts(load, capsys, monkeypatch):
    script = load("auto_compression")
    monkeypatch.setattr(script.EmulatedHosts, "unavailable_reason", staticmethod(lambda: "no root"))
    assert script.parsed([]).mbit == [100.0, 1000.0, None]
    with pytest.raises(SystemExit):
        script.parsed(["--mbit", "100"])
    assert "links cannot be shaped (no root)" in capsys.readouterr().err
