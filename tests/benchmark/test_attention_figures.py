"""What `danon-bench attention` makes of its measurements; nothing is measured here."""

import io
import json
import sys

import pytest
import torch
from rich.console import Console
from torch.nn.attention.flex_attention import create_block_mask

from danon_lightning.arguments import format_length, length
from danon_lightning.attention import available_variants, get_variant, registry
from danon_lightning.attention.functional import gated_linear_attention
from danon_lightning.benchmark.attention import contenders as contenders_module
from danon_lightning.benchmark.attention import measurement
from danon_lightning.benchmark.attention.cell import Measurement
from danon_lightning.benchmark.attention.contenders import Shape, contenders
from danon_lightning.benchmark.attention.export import to_json
from danon_lightning.benchmark.attention.inputs import Inputs
from danon_lightning.benchmark.attention.measurement import Setting, measure_length, measure_state
from danon_lightning.benchmark.attention.plot import save_plot
from danon_lightning.benchmark.attention.report import notes, state_tables, summary, time_tables
from danon_lightning.benchmark.attention.results import (
    Row,
    StateRow,
    expected_seconds,
    exponent_of,
    growth_exponent,
    ratio,
)
from danon_lightning.benchmark.attention.settings import build_core, measured_settings
from danon_lightning.benchmark.attention.streaming import StreamPoint, state_bytes
from danon_lightning.benchmark.command_line import main
from danon_lightning.benchmark.workers import Outcome

FIT = (16384, 65536)


def finished(contender, tokens, seconds, direction="forward", peak=10_000_000):
    return Row(contender, tokens, direction, "finished", "", "", seconds, seconds, 3, peak, 1000)


ROWS = [
    finished("sdpa", 16384, 2.0),
    finished("msra", 16384, 0.5, peak=123_000_000),
    finished("sdpa", 32768, 8.0),
    finished("msra", 32768, 1.0),
    Row("sdpa", 65536, "forward", "left out", "would take about 32 s a run, more than --budget 10"),
    finished("msra", 65536, 2.0),
    Row("dala", 65536, "forward", "killed", "killed by signal 9 (out of memory, most likely)"),
]
STATES = [
    StateRow("msra", 16384, "finished", state_bytes=400_000, peak_bytes=20_000_000, seconds=1.0),
    StateRow("msra", 32768, "crashed", "ValueError: no"),
]


def rendered(*things):
    console = Console(file=io.StringIO(), width=100, highlight=False)
    console.print(*things, sep="\n")
    return console.file.getvalue()


# --- figures


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.07, 2.0])
def test_the_exponent_of_a_power_is_its_exponent(exponent):
    points = [(n, 3e-6 * n**exponent) for n in (1024, 16384, 32768, 262144)]
    assert growth_exponent(points, 16384, 262144) == pytest.approx(exponent, abs=1e-9)


def test_exponents_are_fitted_over_their_range_and_what_was_measured():
    points = [(1000, 50.0), (2000, 1.0), (4000, 2.0), (8000, None), (16000, 99.0)]
    assert growth_exponent(points, 2000, 8000) == pytest.approx(1.0)
    assert growth_exponent(points, 4000, 8000) is None
    # Least squares: symmetric errors on a line leave its slope.
    noisy = [(1, 1.0), (2, 4.0), (4, 2.0), (8, 8.0)]
    assert growth_exponent(noisy, 1, 8) == pytest.approx(0.8)
    assert exponent_of(ROWS, "msra", "forward", FIT) == pytest.approx(1.0)
    assert exponent_of(ROWS, "msra", "both", FIT) is None


def test_ratios_are_to_sdpa_at_the_same_length():
    by_cell = {(row.contender, row.length): ratio(ROWS, row) for row in ROWS}
    assert by_cell["msra", 16384] == 4 and by_cell["msra", 32768] == 8 and by_cell["sdpa", 16384] == 1
    assert by_cell["msra", 65536] is None and by_cell["dala", 65536] is None
    assert ratio(ROWS, finished("msra", 16384, 0.5, direction="both")) is None
    assert ROWS[1].tokens_per_second == 32768


def test_what_a_run_should_take_follows_from_shorter_ones():
    assert expected_seconds([], 8) is None
    assert expected_seconds([(4, 1.0)], 8) == 2 and expected_seconds([(4, 1.0)], 8, presumed=2.0) == 4
    assert expected_seconds([(1, 0.9), (4, 1.0)], 8) == 2  # overhead does not last
    assert expected_seconds([(2, 1.0), (4, 4.0)], 8) == 16
    assert expected_seconds([(2, 1.0), (4, 64.0)], 8) == 256  # nothing grows faster than this


@pytest.mark.parametrize(("text", "tokens"), [("1000", 1000), ("16k", 16384), ("1M", 1048576)])
def test_lengths_are_read_and_written(text, tokens):
    assert length(text) == tokens and format_length(tokens) == text


# --- which cells are run


@pytest.fixture
def cells(monkeypatch):
    """Replaces processes; gives the cells that were run, and takes what fails of them."""
    run, failing = [], {}

    def run_isolated(function, plans, *, time_limit, told=None):
        [plan] = plans
        run.append((plan.contender, plan.shape.length))
        return [failing.get(run[-1], Outcome("finished", Measurement(plan.shape.length / 1000, 0.0, 3, 1, 1)))]

    monkeypatch.setattr(measurement, "run_isolated", run_isolated)
    return run, failing


def test_cells_that_failed_or_would_take_too_long_are_left_out_with_the_reason(cells):
    run, failing = cells
    failing["msra", 2000] = Outcome("killed", message="killed by signal 9")
    chosen = [contenders()[name] for name in ("gated_linear", "fla", "msra")]
    setting, rows = Setting(4, 64, "cpu", 3, budget=3.0), []
    for tokens in (1000, 2000, 4000):
        rows += measure_length(chosen, tokens, "forward", setting, rows, lambda name: None)
    assert run == [("gated_linear", 1000), ("msra", 1000), ("gated_linear", 2000), ("msra", 2000)]
    reasons = {(row.contender, row.length): row.message for row in rows if row.status == "left out"}
    assert reasons["gated_linear", 4000] == "would take about 4 s a run, more than --budget 3"
    assert reasons["msra", 4000] == "not tried, as it was killed at 2000"
    assert {reason for (name, _), reason in reasons.items() if name == "fla"} == {
        "flash-linear-attention runs on CUDA only"
    }


def test_a_run_that_begins_with_a_long_sequence_asks_a_short_one_first(cells):
    run, _ = cells
    chosen = [contenders()[name] for name in ("sdpa", "msra")]
    rows = measure_length(chosen, 65536, "forward", Setting(4, 64, "cpu", 3, budget=100.0), [], lambda name: None)
    assert run == [("sdpa", 4096), ("msra", 4096), ("msra", 65536)]
    assert [row.status for row in rows] == ["left out", "finished"]


def test_points_of_a_stream_that_was_killed_are_kept(monkeypatch):
    def run_isolated(function, plans, *, time_limit, told):
        told(0, StreamPoint(1000, 5, 6, 7.0))
        return [Outcome("killed", message="killed by signal 9")]

    monkeypatch.setattr(measurement, "run_isolated", run_isolated)
    first, second = measure_state(contenders()["msra"], [2000, 1000], Setting(4, 64, "cpu", 3, 3.0))
    assert (first.length, first.status, first.state_bytes) == (1000, "finished", 5)
    assert (second.length, second.status, second.message) == (2000, "killed", "killed by signal 9")


# --- what is compared


def test_every_registered_variant_is_measured_with_settings_that_fit_it():
    expected = {name for name in available_variants() if not name.startswith(("full", "benchmark_"))}
    assert {setting.variant for setting in measured_settings().values()} == expected
    for label, setting in measured_settings().items():
        core = build_core(label, heads=2, head_dim=8, length=128)
        assert isinstance(core, get_variant(setting.variant).attention_class)


def test_a_variant_of_others_is_measured_with_its_defaults(monkeypatch):
    class Config(get_variant("full").config_class):
        pass

    monkeypatch.setattr(registry, "_variants", dict(registry._variants))
    registry.register_variant("other", Config, get_variant("full").attention_class)
    assert contenders()["other"].ours and measured_settings()["other"].fields == {}


@pytest.mark.parametrize("name", ["sdpa", "gated_linear", *measured_settings()])
def test_contenders_compute_in_the_shape_of_the_queries(name):
    inputs = Inputs.random(40, heads=2, head_dim=8, device="cpu")
    output = contenders()[name].build(Shape(40, 2, 8, "cpu", "forward")).run(inputs)
    assert output.shape == inputs.q.shape and output.isfinite().all()
    if name == "gated_linear":
        expected = gated_linear_attention(inputs.q, inputs.k, inputs.v, inputs.log_decay)[0]
        assert torch.equal(output, expected)


@pytest.mark.parametrize("tokens", [100, 128, 300, 512])
def test_the_blocks_of_the_window_are_those_that_torch_finds(tokens):
    ours = contenders_module._window_mask(tokens, "cpu")
    theirs = create_block_mask(contenders_module._in_window, None, None, tokens, tokens, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())


def test_bytes_of_a_state_count_what_it_keeps_alive_once():
    large = torch.zeros(1000)
    state = {"a": large[:10], "b": [large, torch.zeros(5, dtype=torch.int64)], "position": 3}
    assert state_bytes(state) == 4000 + 40


# --- what is shown


def test_tables_show_ratios_exponents_and_failures():
    text = rendered(*time_tables(ROWS, "forward", FIT, "a title"), *notes(ROWS))
    ratios = next(line.split() for line in text.splitlines() if line.split()[:1] == ["msra"])
    assert ratios == ["msra", "4.0", "8.0", "-", "1.00"]
    assert "exponent 16k..64k" in text
    assert ["sdpa,", "s", "2.0", "8.0", "-", "2.00"] in [line.split() for line in text.splitlines()]
    assert next(line.split() for line in text.splitlines() if line.split()[:1] == ["dala"]) == [
        "dala",
        "-",
        "-",
        "x",
        "-",
    ]
    assert "sdpa at 64k: left out: would take about 32 s a run, more than --budget 10" in text
    assert "dala at 64k: killed: killed by signal 9 (out of memory, most likely)" in text
    assert "123" in text and "32.8" in text


def test_the_table_of_states_ends_with_the_cache_of_full_attention():
    text = rendered(*state_tables(STATES, 2048, "a title"), *notes(STATES))
    lines = [line.split() for line in text.splitlines()]
    assert ["msra", "400", "x"] in lines and ["full", "(formula)", "33554", "67109"] in lines
    assert "msra at 32k: crashed: ValueError: no" in text
    assert summary([*ROWS, *STATES], []) == "cells: 1 crashed, 6 finished, 1 killed, 1 left out"


def test_figures_are_exported_and_drawn(tmp_path):
    content = json.loads(json.dumps(to_json({"heads": 4}, {"torch": "2"}, ROWS, STATES, FIT)))
    assert content["benchmark"] == "attention" and content["rows"][1]["ratio"] == 4
    exponents = {item["contender"]: item["exponent"] for item in content["exponents"]}
    assert exponents == {"sdpa": pytest.approx(2.0), "msra": pytest.approx(1.0), "dala": None}
    assert content["states"][0]["state_bytes"] == 400_000
    file = tmp_path / "plot.png"
    save_plot([*ROWS, finished("msra", 16384, 0.1, "both")], STATES, ["msra"], "a title", file)
    assert file.read_bytes().startswith(b"\x89PNG")
    save_plot([ROWS[-1]], [], ["dala"], "nothing was measured", file)


@pytest.mark.parametrize(
    ("arguments", "explanation"),
    [
        (["--variants", "msra", "mrsa"], "argument --variants: there is no 'mrsa': choose from sdpa, flex_window"),
        (["--lengths", "1x"], "'1x' is not a number of tokens, such as 4096, 16k or 1M"),
        (["--fit", "16k", "4k"], "argument --fit: the first length must be the smaller one"),
        (["--head-dim", "7"], "argument --head-dim: 7 is odd"),
        (["--import", "no_such_module"], "'no_such_module' cannot be imported"),
        (["--budget", "0"], "'0' is not a number above 0"),
    ],
)
def test_wrong_arguments_are_explained(arguments, explanation, capsys):
    with pytest.raises(SystemExit) as end:
        main(["attention", *arguments])
    assert end.value.code == 2
    assert explanation in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as end:
        main(["attention", "--plot", str(tmp_path / "plot.png")])
    assert end.value.code == 2
    assert "pip install 'danon-lightning[bench]'" in capsys.readouterr().err


def test_help_names_everything_that_is_measured(capsys):
    with pytest.raises(SystemExit) as end:
        main(["attention", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "examples:" in text
    for name, contender in contenders().items():
        assert f"\n  {name} " in text and contender.description in text
