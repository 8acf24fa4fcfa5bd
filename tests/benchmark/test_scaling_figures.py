"""What `danon-bench scaling` makes of its measurements, and what it predicts; nothing is measured here."""

import io
import json
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from danon_lightning.benchmark.command_line import main
from danon_lightning.benchmark.json_file import write_json
from danon_lightning.benchmark.scaling.command_line import PRESETS, dilation_for
from danon_lightning.benchmark.scaling.exchanges import DEFAULT, compression_of, exchange_names
from danon_lightning.benchmark.scaling.job import Measurement, Outcome, Plan
from danon_lightning.benchmark.scaling.plot import save_plot
from danon_lightning.benchmark.scaling.prediction import links_of, predict_step
from danon_lightning.benchmark.scaling.report import notes, projection_table, rate_table, summary, to_json
from danon_lightning.benchmark.scaling.results import Setting, project, rows_of
from danon_lightning.benchmark.scaling.runner import JobFailedError, time_limit
from danon_lightning.benchmark.scaling.workload import TimedStack, Workload
from danon_lightning.strategies.communication.compressors import get_compressor
from danon_lightning.strategies.communication.cost_model import CodingCosts, Link, Links, predict_exchange

WORKLOAD = Workload.of_size(1.05e6, 4, 0.3, 1.0)  # four matrices of 512 × 512, a bucket each
FREE = CodingCosts()


def links(hosts, rate=1e7, latency=0.0, overhead=0.0):
    return Links(hosts, 1, inter=Link(latency, rate, overhead))


def measurement(seconds, exposed, payload=None):
    return Measurement(seconds, seconds, exposed, payload, FREE)


def setting(dilation=1.0, mbit=80.0):
    return Setting(("ddp", "int8"), mbit, WORKLOAD, 0.3, dilation)


OUTCOMES = {
    2: Outcome(links(2), 1.0, {"ddp": measurement(0.6, 0.3), "int8": measurement(0.4, 0.1, 1.05e6)}),
    4: JobFailedError("rank 1 failed: ValueError: the reason", "the traceback"),
    8: Outcome(links(8, 0.5e7), 1.0, {"ddp": measurement(1.2, 0.9), "int8": measurement(0.5, 0.2, 1.8e6)}),
}


def rendered(*things):
    console = Console(file=io.StringIO(), width=80, highlight=False)
    console.print(*things, sep="\n")
    return console.file.getvalue()


def cells(text):
    return [line.replace("│", "").split() for line in text.splitlines() if line.startswith("│")]


def test_buckets_are_ready_in_the_order_of_the_backward_pass():
    assert (WORKLOAD.elements, WORKLOAD.num_bytes) == (4 * 512 * 512, 4 * 4 * 512 * 512)
    assert [[name for name, _ in bucket] for bucket in WORKLOAD.buckets()] == [["3"], ["2"], ["1"], ["0"]]
    assert WORKLOAD.ready_seconds(0.3) == pytest.approx([0.15, 0.2, 0.25, 0.3])
    assert Workload.of_size(1.05e6, 4, 0.3, 2.0).ready_seconds(0.3) == pytest.approx([0.15, 0.25, 0.3])
    assert WORKLOAD.dilated(3).compute_seconds == pytest.approx(0.9)


def test_gradients_come_when_their_time_has_come_and_are_those_given():
    workload = Workload.of_size(4 * 64 * 64, 4, 0.12, 1.0)
    stack, other = TimedStack(workload, 0), TimedStack(workload, 1)
    moments = []
    for matrix in stack.matrices:
        matrix.register_post_accumulate_grad_hook(lambda _: moments.append(time.perf_counter()))
    start = time.perf_counter()
    loss = stack()
    forward = time.perf_counter() - start
    loss.backward()
    # Never early; how late depends on what else the machine does.
    assert forward >= 0.04
    assert all(at - start >= due for at, due in zip(moments, (0.06, 0.08, 0.1, 0.12), strict=True))
    assert start + 0.12 <= stack.computed_at <= moments[-1]
    for matrix, gradient, another in zip(stack.matrices, stack.gradients, other.gradients, strict=True):
        assert torch.equal(matrix.grad, gradient) and not torch.equal(gradient, another)


def test_ddp_is_predicted_as_rings_two_at_a_time():
    # 2·(N−1)/N·b/β for each of four buckets, longer than the backward pass takes from one to the next; the latency,
    # 2(N−1)·α, of one passes while another sends.
    sending = 2 * 3 / 4 * 4 * 512 * 512 / 1e7
    found = predict_step("ddp", WORKLOAD, 0.3, links(4, latency=1e-3), FREE)
    assert found.seconds == pytest.approx(0.15 + 4 * sending)
    # Where it is all that counts, two of four buckets wait for it, then the other two.
    slow = predict_step("ddp", WORKLOAD, 0.3, links(4, rate=1e15, latency=0.5), FREE)
    assert slow.seconds == pytest.approx(0.2 + 2 * 3.0)
    assert slow.exposed_seconds == pytest.approx(slow.seconds - 0.3)
    found = predict_step("ddp", WORKLOAD, 0.3, links(4), FREE)
    assert found.exposed_seconds == pytest.approx(found.seconds - 0.3)
    assert found.inter_node_bytes == pytest.approx(2 * 3 / 4 * WORKLOAD.num_bytes)
    # On a fast link only the last one is seen.
    fast = predict_step("ddp", WORKLOAD, 0.3, links(4, rate=1e9), FREE)
    assert fast.exposed_seconds == pytest.approx(2 * 3 / 4 * 4 * 512 * 512 / 1e9)


@pytest.mark.parametrize("exchange", ["dense", "int8", "powersgd"])
def test_ours_is_predicted_by_the_cost_model(exchange):
    known = predict_exchange(
        WORKLOAD.buckets(), links(4), compression=compression_of(exchange), ready=WORKLOAD.ready_seconds(0.3)
    )
    found = predict_step(exchange, WORKLOAD, 0.3, links(4), FREE)
    assert found.exposed_seconds == known.exposed_seconds > 0
    assert found.seconds == 0.3 + known.exposed_seconds
    assert predict_step(exchange, WORKLOAD, 0.3, None, FREE).exposed_seconds == 0


def test_links_of_other_clusters():
    probed = [links(2, 1e8, 1e-4, 1e-5), links(4, 9e7, 5e-3, 3e-5), links(8, 5e7, 9e-3, 7e-5)]
    # Those that were probed are as they were found, but that a ring has the link of two.
    assert links_of(probed, 8, "int8") == probed[2]
    assert links_of(probed, 8, "ddp") == replace(probed[0], nodes=8)
    more = links_of(probed, 102, "ddp")
    assert (more.nodes, more.inter) == (102, probed[0].inter)
    # Each host more adds 10 µs: latency that ranks have by waiting for processors is not carried on.
    more = links_of(probed, 102, "int8").inter
    assert more.latency_seconds == pytest.approx(1e-4 + 1e-3) and more.overhead_seconds == pytest.approx(1e-5 + 1e-3)
    assert more.bytes_per_second == 1e8


def test_rows_and_their_table():
    rows = rows_of(setting(), OUTCOMES)
    assert [(row.exchange, row.hosts, row.status) for row in rows[:3]] == [
        ("ddp", 2, "finished"), ("ddp", 4, "failed"), ("ddp", 8, "finished"),
    ]  # fmt: skip
    assert rows[0].speedup == pytest.approx(1.0) and rows[0].exposed == pytest.approx(0.5)
    assert rows[2].speedup == pytest.approx(2.0) and rows[5].speedup == pytest.approx(4.8)
    assert rows[0].predicted == predict_step("ddp", WORKLOAD, 0.3, links(2), FREE)
    assert rows[0].error == pytest.approx(rows[0].predicted.seconds / 0.6 - 1)
    text = rendered(rate_table(rows, "the title"))
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    first, failed, *_ = cells(text)
    assert first[:3] == ["ddp", "2", "600.0"] and first[5] == "1.00" and first[7] == "50.0%"
    assert failed[:3] == ["ddp", "4", "failed"]
    lines = notes(rows)
    assert lines[0] == "[red]4 hosts[/]: rank 1 failed: ValueError: the reason"
    assert lines[1].startswith("[yellow]8 hosts[/]: 40 Mbit/s of payload come through of 80 Mbit/s")
    line = summary(rows, [])
    assert "80 Mbit/s: int8 4.80 × on 8 hosts, 40.0% exposed" in line and "4 finished, 2 failed" in line


def test_times_are_shown_undilated_and_ratios_are_the_same():
    plain, dilated = rows_of(setting(), OUTCOMES), rows_of(setting(dilation=2.0), OUTCOMES)
    assert [row.speedup for row in plain] == [row.speedup for row in dilated]
    assert cells(rendered(rate_table(dilated, "")))[0][2] == "300.0"
    # The links were half as fast as what they stand for.
    assert dilated[0].link_mbit == 2 * plain[0].link_mbit == 160
    assert [dilation_for(8, mbit) for mbit in (None, 100.0, 1000.0, 10000.0)] == [1, 1, 2, 20]


def test_projections():
    probed, costs = [links(2), links(8)], {"ddp": FREE, "int8": FREE}
    found = project(setting(), [64, 512], probed, costs)
    assert [(one.exchange, one.hosts) for one in found] == [("ddp", 64), ("ddp", 512), ("int8", 64), ("int8", 512)]
    assert found[0].predicted == predict_step("ddp", WORKLOAD, 0.3, links(64), FREE)
    assert found[0].speedup == pytest.approx(64 * 0.3 / found[0].predicted.seconds)
    assert found[0].exposed == pytest.approx(1 - 0.3 / found[0].predicted.seconds)
    assert project(setting(), [64], probed[:1], costs) == project(setting(), [], probed, costs) == []
    text = rendered(projection_table(found, "the title"))
    assert "PROJECTED, not measured: the title" in text and max(map(len, text.splitlines())) <= 80
    assert [line[:2] for line in cells(text)[:2]] == [["ddp", "64"], ["ddp", "512"]]


def test_without_links_nothing_is_predicted():
    outcomes = {2: Outcome(None, 1.0, OUTCOMES[2].measured)}
    rows = rows_of(setting(), outcomes)
    assert all(row.predicted is None and row.error is None for row in rows)
    assert cells(rendered(rate_table(rows, "")))[0][3:5] == ["-", "-"]
    assert notes(rows) == ["[yellow]2 hosts[/]: the links could not be measured, so nothing is predicted"]


def test_file_and_picture(tmp_path):
    rows, probed = rows_of(setting(), OUTCOMES), [links(2), links(8)]
    projections = project(setting(), [64], probed, {"ddp": FREE, "int8": FREE})
    content = to_json({"steps": 3}, {"cores": 2}, rows, projections, {80.0: probed})
    write_json(tmp_path / "run.json", content)
    read = json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    assert len(read["measured"]) == 6 and len(read["projected"]) == 2
    assert read["measured"][0]["speedup"] == pytest.approx(1.0) and read["measured"][1]["speedup"] is None
    assert read["projected"][0]["hosts"] == 64
    assert [Links.from_json(entry) for entry in read["links"]] == probed
    pytest.importorskip("matplotlib")
    save_plot(rows, projections, "the title", tmp_path / "run.png")
    save_plot([row for row in rows if row.status == "failed"], [], "none", tmp_path / "none.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("run.png", "none.png"))


def test_names_and_limits():
    assert set(DEFAULT) <= set(exchange_names())
    for name in exchange_names():
        get_compressor(compression_of(name))
    for preset in PRESETS.values():
        workload = Workload.of_size(1e6 * preset.elements_m, preset.layers, preset.compute_ms / 1e3, preset.bucket_mb)
        assert workload.elements == pytest.approx(1e6 * preset.elements_m, rel=0.2)
        assert len(workload.buckets()) >= 8
    plan = Plan(WORKLOAD, ("ddp",), 5)
    assert time_limit(plan, 8, 100.0) > time_limit(plan, 8, 1000.0) > 8 * WORKLOAD.compute_seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", "1"], "one host is always measured"),
        (["--hosts", "101"], "count must be from 1 to 100"),
        (["--mbit", "fast"], "not a rate"),
        (["--only", "what"], "invalid choice"),
        (["--preset", "what"], "invalid choice"),
        (["--project", "1"], "give numbers of at least 2"),
        (["--compute-ms", "0"], "not a number above 0"),
        (["--json", "no/such/folder/run.json"], "does not exist"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["scaling", *arguments])
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
