"""The command, in this process."""

import json

import pytest

from danon_lightning.planner.command_line import main
from danon_lightning.strategies.communication.cost_model import Link, Links

SMOKE = ["experiment=smoke", "data.path=.", "data.val_windows=4"]
FAST = ["--compressions", "dense", "--schedules", "1f1b", "--top", "3"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one line of text after another\n" * 400)
    (tmp_path / "b.txt").write_text("and some more to validate on\n" * 400)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return [f"data.path={tmp_path / 'a.txt'}", f"data.cache_dir={tmp_path / 'cache'}"]


def test_a_config_is_planned(text, tmp_path, capsys):
    file = tmp_path / "plan.json"
    command = [*text, "experiment=smoke", "--nodes", "2", "--ranks-per-node", "1", "--inter", "1gbit", *FAST]
    assert main([*command, "--batch", "8", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "danon-train" in printed and "assumed:" in printed and "strategy:" in printed
    # 80 columns do: no word of a layout is broken, and nothing is left out.
    assert "2 replicas," in printed and "optimizer," in printed and "…" not in printed
    assert max(map(len, printed[: printed.index("assumed:")].splitlines())) <= 80
    assert "GPU available" not in printed and "max_steps" not in printed
    content = json.loads(file.read_text())
    assert content["batch_size"] == 8 and content["cluster"]["links"]["nodes"] == 2
    best = content["plans"][0]
    assert best["feasible"] and "data.global_batch_size=8" in best["overrides"]
    assert content["profile"]["blocks"]["number"] == 2


def test_links_come_from_a_file_and_a_module_from_a_name(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    links = tmp_path / "links.json"
    links.write_text(json.dumps(Links(1, 2, Link(1e-5, 1e9)).to_json()))
    named = ["--module", "planned_models:Stack", "--data", "planned_models:batch", "--links", str(links), *FAST]
    assert main(named) == 0
    assert "1 node × 2 ranks, 16 samples" in capsys.readouterr().out
    assert main([*named, "--memory", "1KiB"]) == 1
    printed = capsys.readouterr().out
    assert "No layout can be had" in printed and "why not" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--nodes", "2"], "say how fast the link"),
        (["--inter", "quick"], "is not a rate"),
        (["--nodes", "0"], "at least 1"),
        (["--json", "nowhere/plan.json"], "the folder of 'nowhere/plan.json' does not exist"),
        (["--links", "nowhere.json"], "nowhere.json"),
        (["--links", "x.json", "--nodes", "2"], "--nodes cannot be given with --links"),
        (["--module", "planned_models"], "package.module:name"),
        (["--module", "a:b", "model=msra"], "leave out one of both"),
        (["--data", "a:b"], "--data goes with --module"),
        (["model=nonsense"], "nonsense"),
    ],
)
def test_mistakes_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
