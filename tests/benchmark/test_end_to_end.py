"""What `benchmarks/end_to_end.py` makes of its runs; none is trained here."""

import importlib
import io
from pathlib import Path

import pytest
from rich.console import Console

from danon_lightning.strategies import PeriodicSync

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
CURVE = [(10, 5.0, 6.0), (20, 9.0, 4.0), (30, 13.0, 5.0)]


@pytest.fixture
def script(monkeypatch):
    if not SCRIPTS.exists():
        pytest.skip("not a checkout of the repository")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("end_to_end")


def test_the_target_is_first_reached_between_two_points(script):
    assert script.first_below(CURVE, 5.0) == (15.0, 7.0)
    assert script.first_below(CURVE, 6.5) == (10.0, 5.0)
    assert script.first_below(CURVE, 3.9) is None and script.first_below([], 9.0) is None


def test_losses_are_compared_over_the_steps_that_both_have(script):
    assert script.loss_difference([1.0, 2.2], [1.0, 2.0, 9.0]) == pytest.approx(0.1)
    assert script.loss_difference([1.0], [1.0, 2.0]) == 0.0


def test_runs_by_name(script):
    assert script.strategy_of("ddp") == "ddp"
    assert script.strategy_of("dense")._compressor is None
    assert script.strategy_of("topk@1.5")._compressor is not None
    periodic = script.strategy_of("every_n_steps=7,compression=int8")
    assert periodic._sync_mode == PeriodicSync(every_n_steps=7)
    assert (script.steps_of("topk@1.5", 200), script.steps_of("topk", 200)) == (300, 200)
    assert [name for name in ("dense", "int8", "async", "periodic", "auto", "sign", "every_n_steps=7") if
            script.depends_on_time(name)] == ["periodic", "auto", "sign", "every_n_steps=7"]  # fmt: skip
    for wrong in ("what", "sync_mode=sometimes", "no_such_argument=1"):
        with pytest.raises(ValueError, match=wrong.rpartition("=")[0] or wrong):
            script.strategy_of(wrong)


def test_what_runs_learn_can_be_kept(script, tmp_path):
    sizes = script.Sizes(8, 1, 8, 4, 10, 5, 1, 0.1, 0)
    runs = {"int8": [script.Trained(CURVE, [0.5], [1.0], 7, 9), script.Trained(losses=[2.0])]}
    script.write_learned(tmp_path / "learned.json", sizes, runs)
    known = script.read_learned(tmp_path / "learned.json", sizes)
    assert [tuple(point) for point in known["int8"][0].points] == CURVE and known["int8"][1] == runs["int8"][1]
    with pytest.raises(ValueError, match="of other sizes.*name another file"):
        script.read_learned(tmp_path / "learned.json", script.replace(sizes, steps=20))


def test_table_and_picture(script, tmp_path):
    alone = script.Result("alone", 100.0, 0.1, 0.0, [], "")
    slow = [(step, 10 * seconds, bits) for step, seconds, bits in CURVE]
    results = [
        script.with_target(script.Result("ddp", 100.0, 2.0, 40.0, slow, "timed"), 5.0),
        script.with_target(script.Result("int8", 100.0, 0.4, 8.0, CURVE, "trained"), 5.0),
        script.with_target(script.Result("every_n_steps=100,compression=int8", 100.0, 0.2, 1.0, CURVE, ""), 3.0),
    ]
    assert results[1].megabytes_to_target == 15 * 8.0
    console = Console(file=io.StringIO(), width=80, highlight=False)
    console.print(script.table_of(results, alone, "the title"))
    text = console.file.getvalue()
    assert "…" not in text and "2.000 / 0.100 = 20.0 times" in " ".join(text.split())
    lines = [line.replace("│", "").split() for line in text.splitlines() if line.startswith("│")]
    assert lines[0] == "ddp 2.000 70.0 1.00 40.000 1.0 5.000".split()
    assert lines[1] == "int8 0.400 7.0 10.00 8.000 5.0 5.000".split()
    assert "never" in lines[2]
    pytest.importorskip("matplotlib")
    script.save_plot([alone, *results], {100.0: 5.0}, "the title", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "what"], "compression='what' is not known"),
        (["--steps", "10"], "fewer steps than --validate-every"),
        (["--timed-steps", "3"], "more than the 3 of the warm-up"),
        (["--batch", "6"], "cannot be shared out evenly among 4 ranks"),
        (["--mbit", "0"], "not a number above 0"),
    ],
)
def test_bad_arguments_are_refused(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.parsed(arguments)
    assert message in " ".join(capsys.readouterr().err.split())
