"""`danon-bench links` from end to end; times that it measures are not tested, rates of emulated links and bytes are."""

import json

import pytest

from danon_lightning.benchmark.command_line import main
from danon_lightning.strategies.communication.cost_model import Links
from danon_lightning.testing import torchrun


@pytest.mark.hosts
def test_emulated_links_are_measured_and_predictions_checked(tmp_path, capsys):
    file = tmp_path / "links.json"
    arguments = ["--mbit", "200", "--message-mb", "1", "--pairwise", "--json", str(file)]
    check = ["--check", "--elements-m", "0.5", "--steps", "2", "--only", "torch", "dense", "int8"]
    assert main(["links", *arguments, *check]) == 0
    text = capsys.readouterr().out
    assert "between nodes" in text and "ring with the fastest slowest link: 0 → 1" in text
    links = Links.read(file)
    assert (links.nodes, links.ranks_per_node) == (2, 2)
    # Payload: 95 % of the rate; what 1 MB over-reads, and other work on the machine, take the rest.
    assert links.inter.bytes_per_second == pytest.approx(0.95 * 200e6 / 8, rel=0.25)
    content = json.loads(file.read_text())
    assert content["environment"]["network"] == "emulated hosts"
    assert [check["exchange"] for check in content["checks"]] == ["torch", "dense", "int8"]
    for one in content["checks"][1:]:
        assert one["inter_node_bytes"] == pytest.approx(one["predicted"]["inter_node_bytes"], rel=1e-6)
        assert one["seconds"] > 0 and one["predicted"]["seconds"] > 0


@pytest.mark.slow
def test_under_torchrun_it_measures_what_it_runs_on(tmp_path):
    file = tmp_path / "links.json"
    results = torchrun(
        ["-m", "danon_lightning.benchmark.command_line", "links", "--json", str(file)], nodes=1, ranks_per_node=2
    )
    assert all(result.ok for result in results), "\n".join(map(str, results))
    links = Links.read(file)
    assert (links.nodes, links.ranks_per_node, links.inter) == (1, 2, None)
    assert json.loads(file.read_text())["environment"]["network"] == "this cluster"
