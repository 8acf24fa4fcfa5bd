"""`danon-bench recall` from end to end, a few steps; what it measures is not tested."""

import json

from danon_lightning.benchmark.command_line import main

SMALL = ["--steps", "4", "--batch", "8", "--hidden", "32", "--jobs", "2"]


def test_it_trains_and_writes_and_the_same_seed_gives_the_same_figures(tmp_path, capsys):
    contents = []
    for number in range(2):
        files = {name: tmp_path / f"{number}.{name}" for name in ("json", "png")}
        code = main(
            ["recall", *SMALL, "--length", "32", "--pairs", "4", "--variants", "full", "sliding_window", "gated_linear"]
            + ["--seeds", "2", "--json", str(files["json"]), "--plot", str(files["png"])]
            + (["--no-equal-time", "--first-seed", "1", "--seeds", "1"] if number else [])
        )
        text = capsys.readouterr().out
        assert code == 0, text
        assert f"runs: {3 if number else 10} finished" in text.splitlines()[-1]
        assert files["png"].read_bytes().startswith(b"\x89PNG")
        contents.append(json.loads(files["json"].read_text()))
    assert contents[0]["arguments"]["mqar"]["vocabulary"] == 32 and contents[0]["environment"]["processor"]
    assert {summary["budget"] for summary in contents[0]["summaries"]} == {"steps", "time"}
    first, again = (
        {
            (run["label"], run["seed"]): [(point["step"], point["figure"]) for point in run["points"]]
            for run in content["runs"]
            if run["budget"] == "steps"
        }
        for content in contents
    )
    assert len(first) == 6 and again == {(label, seed): run for (label, seed), run in first.items() if seed == 1}
    assert [step for step, _ in first["full", 0]] == [0, 1, 2, 3, 4]


def test_text_is_measured_in_bits(tmp_path, capsys):
    file = tmp_path / "run.json"
    code = main(
        ["recall", "--task", "text", *SMALL, "--length", "16", "--layers", "1", "--heads", "2", "--variants", "full"]
        + ["--seeds", "1", "--json", str(file)]
    )
    text = capsys.readouterr().out
    assert code == 0 and "bits/byte" in text, text
    [run] = json.loads(file.read_text())["runs"]
    assert 7.5 < run["points"][0]["figure"] < 8.5 and run["points"][-1]["figure"] < run["points"][0]["figure"]
