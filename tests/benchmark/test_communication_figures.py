"""What `danon-bench communication` makes of its measurements; nothing is measured here."""

import io
import json
import sys

import pytest
import torch
from rich.console import Console

from danon_lightning.benchmark.command_line import main
from danon_lightning.benchmark.communication import measurement
from danon_lightning.benchmark.communication.crossovers import find_crossovers, where_faster
from danon_lightning.benchmark.communication.export import to_json
from danon_lightning.benchmark.communication.job import Measurement, combine
from danon_lightning.benchmark.communication.job_runner import JobFailure
from danon_lightning.benchmark.communication.measurement import Setting, default_step_limit, measure_variants
from danon_lightning.benchmark.communication.plot import save_plot
from danon_lightning.benchmark.communication.report import (
    LEGEND,
    any_of_ours_failed,
    crossover_table,
    notes,
    rate_table,
    summary,
)
from danon_lightning.benchmark.communication.results import Row
from danon_lightning.benchmark.communication.variants import VARIANTS
from danon_lightning.benchmark.communication.workload import MATRICES, Workload
from danon_lightning.benchmark.json_file import write_json
from danon_lightning.strategies import available_compressors
from danon_lightning.strategies.communication.compressors import Compressor, get_compressor

TWO_BY_TWO = Workload.of_size(2, 2, 25e6)


def finished(variant, mbit, seconds, flat=None, **others):
    return Row(variant, mbit, "finished", seconds=seconds, best_seconds=seconds, flat_seconds=flat, **others)


HUNG = Row("torch-powersgd", 100.0, "hung", "hung after 30 s in step 3 of 8", "a stack")
ROWS = [
    finished("alone", 100.0, 0.05, 13.0),
    finished("flat", 100.0, 13.0, 13.0, egress_bytes=151.4e6, formula_bytes=150.99e6),
    finished("int8", 100.0, 2.0, 13.0, egress_bytes=25.7e6, formula_bytes=25.56e6, payload_bytes=25.57e6),
    HUNG,
    finished("flat", None, 0.3, 0.3),
    finished("int8", None, 0.6, 0.3),
]


def rendered(*things):
    console = Console(file=io.StringIO(), width=80, highlight=False)
    console.print(*things, sep="\n")
    return console.file.getvalue()


# --- formulas


@pytest.mark.parametrize(
    ("variant", "bytes_an_element"),
    [
        ("alone", 0),
        ("flat", 8 * 3 / 4),
        ("torch-fp16", 4 * 3 / 4),
        ("dense", 8 / 2),
        ("fp16", 4 / 2),
        ("int8", 2 * (1 + 4 / 256) / 2),
        ("topk", 8 * 0.01),
        ("sign", 1 / 4 / 2 * (1 + 32 / 2048)),
        ("randomk", 8 * 0.01 / 2),
    ],
)
def test_formulas_are_those_of_the_algorithms(variant, bytes_an_element):
    assert VARIANTS[variant].formula(TWO_BY_TWO) == pytest.approx(bytes_an_element * TWO_BY_TWO.elements)


def test_low_rank_formulas_count_both_factors():
    factors = 4 * MATRICES * 2 * TWO_BY_TWO.side
    assert VARIANTS["powersgd"].formula(TWO_BY_TWO) == 8 * factors / 2
    assert VARIANTS["torch-powersgd"].formula(TWO_BY_TWO) == 8 * factors * 3 / 4


def test_every_compressor_is_compared():
    ours = {name for name, variant in VARIANTS.items() if variant.ours}
    assert ours == {"dense", *available_compressors()}


@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("name", available_compressors())
def test_formulas_know_the_defaults_of_the_compressors(name, nodes):
    workload = Workload.of_size(nodes, 1, 6e6)
    compressor, elements = get_compressor(name), workload.side**2
    if isinstance(compressor, Compressor):
        # The later of the steps: some compressors begin with more.
        payload = MATRICES * compressor.payload_bytes(elements, 10**6)
        expected = payload * (nodes - 1) if compressor.exchange == "gather" else 2 * payload * (nodes - 1) / nodes
    else:
        code = MATRICES * compressor.code_numel(torch.Size([workload.side, workload.side]))
        expected = 8 * code * (nodes - 1) / nodes
    assert VARIANTS[name].formula(workload) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("asked", "side"), [(25e6, 2048), (1.0, 64), (0.1e6, 128)])
def test_the_workload_is_near_to_what_was_asked_for(asked, side):
    workload = Workload.of_size(2, 2, asked)
    assert (workload.side, workload.elements) == (side, MATRICES * side**2)
    assert workload.bucket_mb * 2**20 == 4 * side**2


# --- from ranks to one measurement


def test_the_slowest_rank_and_the_busiest_node_count():
    seconds = [[1.0, 5.0, 2.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 9.0]]
    sent = [{"egress": e, "payload": p} for e, p in [(30, 1), (30, 2), (60, 10), (60, 20)]]
    assert combine(TWO_BY_TWO, seconds, sent) == Measurement(5.0, 3.0, egress_bytes=20.0, payload_bytes=10.0)
    nobody_counts = combine(TWO_BY_TWO, seconds, [{}] * 4)
    assert nobody_counts.egress_bytes is None and nobody_counts.payload_bytes is None


# --- which jobs are run


@pytest.fixture
def jobs(monkeypatch):
    """A function that replaces jobs: it takes what fails, by variant, and gives the list of jobs that were run."""

    def replace(failing):
        run = []

        def run_job(plan, hosts, report):
            names = [name for name, _ in plan.variants]
            run.append(names)
            measured = {}
            for name in names:
                if name in failing:
                    return measured, failing[name]
                measured[name] = Measurement(float(len(run)), 1.0, None, None)
            return measured, None

        monkeypatch.setattr(measurement, "run_job", run_job)
        return run

    return replace


SETTING = Setting(TWO_BY_TWO, None, None, steps=1, step_limit=1.0)


def measured_by_name(*names):
    rows = measure_variants([VARIANTS[name] for name in names], SETTING, lambda progress: None)
    assert len(rows) == len(names)
    return {row.variant: row for row in rows}


def test_all_that_is_trusted_shares_a_job(jobs):
    run = jobs({})
    rows = measured_by_name("flat", "dense", "torch-powersgd", "int8")
    assert run == [["flat", "dense", "int8"], ["torch-powersgd"]]
    assert {row.status for row in rows.values()} == {"finished"}
    assert rows["torch-powersgd"].ratio == 1 / 2  # "flat" was in the first job


def test_after_a_failure_the_others_get_a_job_and_a_reference_of_their_own(jobs):
    run = jobs({"dense": JobFailure("crashed", "crashed in step 1 of 4: why", "", started=True)})
    rows = measured_by_name("flat", "dense", "int8", "topk")
    assert run == [["flat", "dense", "int8", "topk"], ["flat", "int8", "topk"]]
    assert (rows["dense"].status, rows["dense"].message) == ("crashed", "crashed in step 1 of 4: why")
    assert rows["dense"].seconds is None and rows["dense"].ratio is None
    assert (rows["flat"].seconds, rows["topk"].flat_seconds) == (1.0, 2.0)


def test_a_reference_that_fails_is_not_tried_again(jobs):
    run = jobs({"flat": JobFailure("hung", "hung", "", started=True)})
    rows = measured_by_name("flat", "dense", "int8")
    assert run == [["flat", "dense", "int8"], ["dense", "int8"]]
    assert rows["int8"].status == "finished" and rows["int8"].ratio is None


def test_a_job_that_does_not_start_is_nobodys_fault(jobs):
    run = jobs({"flat": JobFailure("crashed", "no memory", "", started=False)})
    rows = measured_by_name("flat", "dense")
    assert run == [["flat", "dense"]]
    assert {row.message for row in rows.values()} == {"no memory"}


def test_a_slow_link_is_no_hang():
    assert default_step_limit(TWO_BY_TWO, 100.0) > 3 * VARIANTS["flat"].formula(TWO_BY_TWO) * 8 / 100e6
    assert default_step_limit(TWO_BY_TWO, None) < 60


# --- crossovers


def test_crossover_of_two_straight_lines_is_exact():
    # Seconds are 1000 / rate and a constant 4: they cross at 250.
    rows = [finished("flat", mbit, 1000 / mbit) for mbit in (1000.0, 100.0)]
    rows += [finished("int8", mbit, 4.0) for mbit in (100.0, 1000.0)]
    [crossover] = find_crossovers(rows)
    assert (crossover.variant, crossover.reference, crossover.faster) == ("int8", "flat", "below")
    assert crossover.mbit == pytest.approx(250) and crossover.seconds == pytest.approx(4)
    assert (crossover.low_mbit, crossover.high_mbit) == (100, 1000)
    assert where_faster(rows, "int8", "flat") == "below 250 Mbit/s"


def test_nothing_is_interpolated_to_unshaped():
    [crossover] = find_crossovers(ROWS)
    assert (crossover.mbit, crossover.seconds, crossover.low_mbit, crossover.high_mbit) == (None, None, 100, None)
    assert where_faster(ROWS, "int8", "flat") == "up to 100 Mbit/s, not unshaped"
    swapped = [finished("flat", row.mbit, row.seconds) for row in ROWS if row.variant == "int8"]
    swapped += [finished("dense", row.mbit, row.seconds) for row in ROWS if row.variant == "flat"]
    assert where_faster(swapped, "dense", "flat") == "unshaped"


def test_several_crossovers_and_none():
    rates = [100.0, 1000.0, 10000.0]
    rows = [finished("flat", mbit, 1.0) for mbit in rates]
    rows += [finished("dense", mbit, seconds) for mbit, seconds in zip(rates, [0.5, 2.0, 0.5], strict=True)]
    rows += [finished("int8", mbit, 0.9) for mbit in rates] + [finished("int4", mbit, 1.0) for mbit in rates]
    assert where_faster(rows, "dense", "flat") == "below 316 Mbit/s and above 3.16 Gbit/s"
    assert where_faster(rows, "int8", "flat") == "everywhere"
    assert where_faster(rows, "int4", "flat") == "nowhere"
    assert where_faster(rows, "torch-powersgd", "flat") == "-"


def test_failed_rows_are_left_out_of_crossovers():
    rows = [*ROWS, Row("dense", 100.0, "crashed", "why"), finished("dense", None, 0.1)]
    assert where_faster(rows, "torch-powersgd", "flat") == "-"
    assert where_faster(rows, "dense", "flat") == "everywhere"


# --- reports


def test_table_of_a_rate():
    text = rendered(rate_table(ROWS[:4], "the title"), *notes(ROWS[:4]))
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert "the title" in text and "Without any exchange a step takes 0.050 s." in text
    assert lines.keys() == {"flat", "int8", "torch-powersgd"}
    assert lines["int8"].replace("│", "").split() == "int8 2.000 6.50 25.7 25.56 25.57 103%".split()
    assert "hung" in lines["torch-powersgd"]
    assert "torch-powersgd: hung after 30 s in step 3 of 8" in text
    assert all(line.split()[0] in text or line.startswith("MB sent") for line in LEGEND.splitlines())
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


def test_messages_are_shown_as_they_are():
    assert "[enforce fail]" in rendered(*notes([Row("flat", None, "crashed", "crashed: [enforce fail] at")]))


def test_table_of_crossovers():
    text = rendered(crossover_table(ROWS))
    assert "faster than flat" in text and "faster than dense" not in text
    assert "up to 100 Mbit/s, not unshaped" in text and "alone" not in text


def test_summary_is_one_line(tmp_path):
    line = summary(ROWS, [tmp_path / "a.json"])
    assert line == (
        f"fastest at 100 Mbit/s: int8 (6.5 × flat), unshaped: flat (1.0 × flat); 5 finished, 1 hung; "
        f"written: {tmp_path / 'a.json'}"
    )
    assert summary([HUNG], []) == "nothing was measured; 1 hung"


def test_only_failures_of_our_own_are_errors():
    assert not any_of_ours_failed(ROWS)
    assert any_of_ours_failed([*ROWS, Row("topk", None, "crashed", "why")])


def test_json_holds_everything(tmp_path):
    write_json(tmp_path / "run.json", to_json({"steps": 1}, {"cores": 2}, ROWS))
    content = json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    assert content.keys() == {"benchmark", "arguments", "environment", "rows", "crossovers"}
    assert content["benchmark"] == "communication"
    assert (content["arguments"], content["environment"]) == ({"steps": 1}, {"cores": 2})
    assert [row["variant"] for row in content["rows"]] == [row.variant for row in ROWS]
    assert set(content["rows"][2]) == {
        *("variant", "mbit", "status", "message", "detail", "seconds", "best_seconds", "flat_seconds"),
        *("formula_bytes", "egress_bytes", "payload_bytes", "ratio", "line_rate_share"),
    }
    assert content["rows"][2]["ratio"] == 6.5
    assert content["rows"][2]["line_rate_share"] == pytest.approx(25.7e6 * 8 / (2 * 100e6))
    assert (content["rows"][3]["status"], content["rows"][3]["detail"]) == ("hung", "a stack")
    assert content["rows"][5]["mbit"] is None
    assert content["crossovers"][0]["variant"] == "int8"


@pytest.mark.parametrize(
    "rows",
    [ROWS, [row for row in ROWS if row.mbit is None], [finished("flat", 10.0, 1), finished("int8", 10.0, 2)], [HUNG]],
    ids=["several", "unshaped", "one rate", "all failed"],
)
def test_plot_is_a_png(tmp_path, rows):
    save_plot(rows, "the title", tmp_path / "plot")
    content = (tmp_path / "plot").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000


def test_crossovers_are_marked_in_the_plot(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    legend, marks = [], []
    draw = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *args, label, **how: [legend.append(label), draw(*args, label=label, **how)][1]
    )
    monkeypatch.setattr(Axes, "scatter", lambda self, x, y, **_: marks.append((x, y)))
    rows = [finished("flat", mbit, 1000 / mbit) for mbit in (100.0, 1000.0)]
    save_plot([*rows, *(finished("int8", mbit, 4.0) for mbit in (100.0, 1000.0))], "", tmp_path / "plot.png")
    assert legend == ["flat", "int8, as flat at 250 Mbit/s"]
    [((mbit,), (seconds,))] = marks
    assert (mbit, seconds) == (pytest.approx(250), pytest.approx(4))


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "explanation"),
    [
        ([], "SUBJECT"),
        (["communication", "--nodes", "0"], "argument --nodes: '0' is not a whole number of at least 1"),
        (["communication", "--nodes", "101"], "argument --nodes: count must be from 1 to 100, got 101"),
        (["communication", "--ranks", "two"], "argument --ranks: 'two' is not a whole number"),
        (["communication", "--steps", "0"], "argument --steps: '0' is not"),
        (["communication", "--mbit", "-5"], "argument --mbit: '-5' is not a rate: give a number of Mbit/s, or 0"),
        (["communication", "--mbit", "nan"], "argument --mbit: 'nan' is not a rate"),
        (["communication", "--elements-m", "0"], "argument --elements-m: '0' is not a number above 0"),
        (["communication", "--step-limit", "inf"], "argument --step-limit: 'inf' is not a number above 0"),
        (["communication", "--only", "int9"], "argument --only: there is no 'int9': choose from alone, flat,"),
        (["communication", "--json", "/nowhere/a.json"], "argument --json: the folder of '/nowhere/a.json' does not"),
        (["communication", "--plot", "/"], "argument --plot: '/' is a folder"),
        (["communication", "--nodes", "1", "--ranks", "1"], "nobody to exchange gradients with"),
        (["communication", "--nodes", "1", "--mbit", "100", "0"], "argument --mbit: with --nodes 1 there is no link"),
    ],
)
def test_wrong_arguments_are_explained(arguments, explanation, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert explanation in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as end:
        main(["communication", "--plot", str(tmp_path / "plot.png")])
    assert end.value.code == 2
    assert "pip install 'danon-lightning[bench]'" in capsys.readouterr().err


def test_help_names_every_variant(capsys):
    with pytest.raises(SystemExit) as end:
        main(["communication", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "examples:" in text
    for name, variant in VARIANTS.items():
        assert f"\n  {name} " in text and variant.description in text
