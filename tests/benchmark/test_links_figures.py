"""What `danon-bench links` makes of its measurements; nothing is measured here."""

import io
import json

import pytest
from rich.console import Console

from danon_lightning.benchmark.command_line import main
from danon_lightning.benchmark.json_file import write_json
from danon_lightning.benchmark.links.exchanges import EXCHANGES
from danon_lightning.benchmark.links.job import Check, Outcome
from danon_lightning.benchmark.links.report import (
    algorithm_line,
    check_line,
    check_table,
    links_table,
    pairwise_lines,
    to_json,
)
from danon_lightning.strategies.communication.compressors import get_compressor
from danon_lightning.strategies.communication.cost_model import CodingCosts, Link, Links
from danon_lightning.strategies.communication.cost_model.prediction import Prediction

LINKS = Links(
    nodes=3, ranks_per_node=2, intra=Link(2e-5, 5e9), inter=Link(3e-4, 1.2e8), shared_memory=True,
    pairwise=((0.0, 1e8, 1e7), (1e7, 0.0, 1e8), (1e8, 1e7, 0.0)),
)  # fmt: skip
CHECKS = (
    Check("torch", Prediction(1.0, 150e6, 0, 0, 36), CodingCosts(), 1.1, 1.0, None),
    Check("int8", Prediction(0.2, 25e6, 50e6, 0.1, 48), CodingCosts(1e-9), 0.4, 0.3, 25.1e6),
)


def rendered(*things):
    console = Console(file=io.StringIO(), width=80, highlight=False)
    console.print(*things, sep="\n")
    return console.file.getvalue()


def test_table_of_links():
    text = rendered(links_table(LINKS, "the title"))
    lines = [line.replace("│", "").split() for line in text.splitlines() if line.startswith("│")]
    assert lines == ["inside a node (shared memory) 20 5000 40".split(), "between nodes 300 120 0.96".split()]
    assert "the title" in text and max(map(len, text.splitlines())) <= 80
    alone = rendered(links_table(Links(1, 2, intra=Link(0, 1e9)), ""))
    assert "inside a node" in alone and "between" not in alone and "memory" not in alone


def test_links_between_every_two_nodes_and_their_ring():
    *_, ring = pairwise_lines(LINKS)
    assert ring == "ring with the fastest slowest link: 0 → 1 → 2, 100 MB/s (in the given order 100 MB/s)"
    assert pairwise_lines(Links(2, 1, inter=Link(0, 1))) == []


def test_algorithms_by_size():
    assert algorithm_line(LINKS).startswith("fastest all-reduce by the α-β model: 1 kB: ")


def test_table_of_a_check():
    text = rendered(check_table(CHECKS, "the title"))
    lines = [line.replace("│", "").split() for line in text.splitlines() if line.startswith("│")]
    assert lines == ["torch 1.100 1.000 -9% 0.000 - 150".split(), "int8 0.400 0.200 -50% 0.100 25.1 25".split()]
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert check_line(CHECKS) == "1 of 2 predictions are within 15% of the median measurement"


def test_the_file_is_read_again(tmp_path):
    file = tmp_path / "links.json"
    write_json(file, to_json(Outcome(LINKS, 1.5, CHECKS), {"nodes": 3}, {"cores": 2}))
    assert Links.read(file) == LINKS
    content = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert content["environment"] == {"cores": 2} and content["checks"][1]["error"] == -0.5


def test_the_exchanges_of_a_check_exist():
    for exchange in EXCHANGES.values():
        get_compressor(exchange.compression)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "1", "--ranks", "1"], "a single rank has no links"),
        (["--nodes", "1", "--mbit", "100"], "no link to shape"),
        (["--mbit", "fast"], "not a rate"),
        (["--nodes", "101"], "count must be from 1 to 100"),
        (["--device", "cuda"], "start it under torchrun"),
        (["--mbit", "1", "2", "--json", "run.json"], "give --mbit one rate"),
        (["--check", "--json", "run.json"], "give --mbit one rate"),
        (["--only", "what"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as error:
        main(["links", *arguments])
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("size", "arguments", "message"),
    [
        ("1", [], "1 rank(s) on 1 node(s): links need at least two"),
        ("4", ["--nodes", "3"], "4 rank(s) on 3 node(s)"),
        ("4", ["--mbit", "100"], "under a launcher"),
    ],
)
def test_bad_launches_are_refused(size, arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", size)
    with pytest.raises(SystemExit) as error:
        main(["links", *arguments])
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
