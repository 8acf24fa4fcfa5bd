"""The task, the models and the figures of `danon-bench recall`; nothing is trained here."""

import io
import json

import pytest
import torch
from rich.console import Console

from danon_lightning.attention import AttentionModel, available_variants, get_variant, registry
from danon_lightning.benchmark.command_line import main
from danon_lightning.benchmark.recall import measurement
from danon_lightning.benchmark.recall.baselines import GATED_LINEAR
from danon_lightning.benchmark.recall.export import to_json
from danon_lightning.benchmark.recall.measurement import Setting, train_all
from danon_lightning.benchmark.recall.model import TOLERANCE, LanguageModel, matched
from danon_lightning.benchmark.recall.mqar import IGNORED, MQAR
from danon_lightning.benchmark.recall.plot import save_plot
from danon_lightning.benchmark.recall.report import notes, parameter_lines, result_tables, summary_line
from danon_lightning.benchmark.recall.results import Run, steps_in_equal_time, summarize
from danon_lightning.benchmark.recall.settings import SIZES, Sizes, trained_settings
from danon_lightning.benchmark.recall.tasks import MQARData, TextData
from danon_lightning.benchmark.recall.training import Point, rate_factor
from danon_lightning.benchmark.workers import Outcome

SMALL = Sizes(length=32, layers=1, hidden=16, heads=2, steps=10, batch=4, learning_rate=1e-3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rendered(*things):
    console = Console(file=io.StringIO(), width=100, highlight=False)
    console.print(*things, sep="\n")
    return console.file.getvalue()


# --- the task


@pytest.mark.parametrize("kind", ["uniform", "zoology"])
@pytest.mark.parametrize(("length", "pairs", "vocabulary"), [(128, 8, 64), (16, 4, 10), (64, 3, 100)])
def test_every_key_is_asked_for_once_and_answered_by_what_followed_it(kind, length, pairs, vocabulary):
    tokens, labels = MQAR(length, pairs, vocabulary, kind).batch(50, generator())
    assert tokens.shape == labels.shape == (50, length) and tokens.dtype == labels.dtype == torch.int64
    assert 0 <= tokens.min() and tokens.max() < vocabulary
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < vocabulary // 2 <= value < vocabulary for key, value in zip(keys, values, strict=True))
        held = dict(zip(keys, values, strict=True))
        asked = [i for i, due in enumerate(label) if due != IGNORED]
        assert len(asked) == pairs and {row[i] for i in asked} == set(keys)
        assert all(i >= 2 * pairs and i % 2 == 0 and label[i] == held[row[i]] for i in asked)
        if kind == "uniform":
            assert all(row[i] == 0 for i in range(2 * pairs, length) if i not in asked)


def test_the_same_seed_gives_the_same_sequences_and_another_one_others():
    task = MQAR(64, 4, 32)
    first, again, other = (task.batch(8, generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_published_queries_are_mostly_early_and_uniform_ones_are_not():
    def mean_position(kind):
        _, labels = MQAR(256, 4, 64, kind).batch(400, generator())
        return (labels != IGNORED).nonzero()[:, 1].float().mean()

    assert mean_position("uniform") == pytest.approx(8 + 248 / 2, abs=8)
    assert mean_position("zoology") < 70


@pytest.mark.parametrize(("length", "pairs", "vocabulary"), [(31, 4, 32), (12, 4, 32), (32, 4, 8), (32, 4, 33)])
def test_sizes_that_do_not_fit_are_refused(length, pairs, vocabulary):
    with pytest.raises(ValueError, match="must be even and at least"):
        MQAR(length, pairs, vocabulary)


def test_data_depend_on_the_seed_and_evaluations_do_not():
    first, other = (MQARData(MQAR(32, 4, 16), 4, seed) for seed in (0, 1))
    assert not torch.equal(next(first.training())[0], next(other.training())[0])
    for one, another in zip(first.evaluation(), other.evaluation(), strict=True):
        assert torch.equal(one[0], another[0]) and torch.equal(one[1], another[1])
    labels = torch.tensor([[IGNORED, 2, 3]])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0]]), 4).float()
    assert first.score(logits, labels).tolist() == [1.0, 0.0]


def test_text_is_bytes_and_bits():
    data = TextData(16, 4, seed=0)
    tokens, labels = next(data.training())
    assert tokens.shape == (4, 16) and torch.equal(tokens[:, 1:], labels[:, :-1])
    assert sum(len(tokens) for tokens, _ in data.evaluation()) == 64
    # A model that knows nothing needs eight bits.
    assert data.score(torch.zeros(4, 16, 256), labels).mean() == pytest.approx(8.0)


# --- the models


@pytest.mark.parametrize("task", list(SIZES))
@pytest.mark.parametrize("label", list(trained_settings()))
def test_models_have_equal_parameters(label, task):
    model = matched(label, task, SIZES[task], 64)
    assert abs(model.deviation) <= TOLERANCE == 0.03
    torch.manual_seed(0)
    built = LanguageModel(model.config)
    assert sum(parameter.numel() for parameter in built.parameters()) == model.parameters
    assert built(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 64)


def test_fields_can_be_set_otherwise_also_in_the_hybrid():
    changed = {"msra": {"block_size": 32}, "super_hybrid": {"router_temperature": 2.0}}
    assert matched("msra", "mqar", SMALL, 64, changed).config.block_size == 32
    assert matched("sliding_window", "mqar", SMALL, 64, changed).config.block_size == 16
    hybrid = matched("super_hybrid", "mqar", SMALL, 64, changed).config
    assert hybrid.settings["msra"]["block_size"] == 32 and hybrid.settings["dala"]["block_size"] == 16
    assert hybrid.router_temperature == 2.0


def test_a_model_that_cannot_be_matched_is_refused():
    with pytest.raises(ValueError, match="cannot make up for; make the model larger"):
        matched("msra", "mqar", Sizes(4096, 1, 64, 1, 1, 1, 1.0), 64)


def test_every_registered_variant_is_trained(monkeypatch):
    assert {setting.variant for setting in trained_settings().values()} == set(available_variants())

    class Config(get_variant("full").config_class):
        pass

    monkeypatch.setattr(registry, "_variants", dict(registry._variants))
    registry.register_variant("other", Config, get_variant("full").attention_class)
    assert matched("other", "mqar", SMALL, 64).deviation == 0


def test_the_linear_baseline_is_causal_streams_and_skips_padding():
    torch.manual_seed(0)
    config = get_variant(GATED_LINEAR).config_class(vocab_size=16, hidden_size=16, num_heads=2, num_layers=2)
    model = AttentionModel(config).double()
    tokens = torch.randint(16, (2, 12), generator=generator())
    whole = model(tokens).last_hidden_state
    state, parts = model.init_state(2), []
    for piece in tokens.split([5, 1, 6], dim=1):
        output = model(piece, state=state)
        state = output.state
        parts.append(output.last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    changed = tokens.clone()
    changed[:, 8:] = 0
    torch.testing.assert_close(model(changed).last_hidden_state[:, :8], whole[:, :8])
    mask = torch.ones(2, 14, dtype=torch.int64)
    mask[:, :2] = 0
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.int64), tokens], 1)
    torch.testing.assert_close(model(padded, mask).last_hidden_state[:, 2:], whole)


def test_the_learning_rate_rises_and_falls():
    factors = [rate_factor(step, 200) for step in range(201)]
    assert factors[0] == pytest.approx(1 / 20, rel=0.01) and max(factors) > 0.97
    assert factors[-1] == pytest.approx(0.1) and factors.index(max(factors)) == 19


# --- the figures


def run_of(label, seed, last, *, budget="steps", steps=10, seconds=2.0, best=None, status="finished"):
    points = (Point(0, 0.0, 0.0), Point(steps // 2, last if best is None else best, 1.0), Point(steps, last, seconds))
    return Run(label, seed, budget, steps, 1000, status, "" if status == "finished" else "ValueError: no", "", points)


RUNS = [
    run_of("full", 0, 0.9),
    run_of("full", 1, 0.7),
    run_of("msra", 0, 0.5, seconds=8.0, best=0.8),
    run_of("msra", 1, 0.0, status="crashed"),
]
TIMED = [run_of("msra", 0, 0.4, budget="time", steps=2)]


def test_runs_are_summarized_over_their_seeds():
    full = summarize(RUNS, "full", "steps", higher_is_better=True)
    assert (full.mean, full.low, full.high, full.runs, full.failed) == (pytest.approx(0.8), 0.7, 0.9, 2, 0)
    assert full.deviation == pytest.approx(0.02**0.5)
    msra = summarize(RUNS, "msra", "steps", higher_is_better=True)
    assert (msra.mean, msra.deviation, msra.best, msra.failed, msra.seconds) == (0.5, None, 0.8, 1, 8.0)
    assert summarize(RUNS, "msra", "steps", higher_is_better=False).best == 0.0
    assert summarize(RUNS, "msra", "time", higher_is_better=True) is None
    assert summarize(RUNS, "full", "time", higher_is_better=True).mean == full.mean


def test_equal_time_is_that_of_full_attention():
    assert steps_in_equal_time(RUNS, "msra") == round(10 * 2 / 8)
    assert steps_in_equal_time(RUNS, "full") == 10
    assert steps_in_equal_time(RUNS[2:], "msra") is None
    assert steps_in_equal_time([RUNS[0], run_of("msra", 0, 0.5, seconds=1000.0)], "msra") == 1


def test_what_is_trained_again_is_what_differs_in_time(monkeypatch):
    trained = []

    def run_isolated(function, plans, *, jobs, told, done):
        for index, plan in enumerate(plans):
            trained.append((plan.label, plan.seed, plan.sizes.steps))
            told(index, Point(0, 0.5, 0.0))
            done(index, Outcome("finished", [Point(plan.sizes.steps, 0.5, 1.0)]))
        return []

    monkeypatch.setattr(measurement, "run_isolated", run_isolated)
    models = {label: matched(label, "mqar", SMALL, 64) for label in ("full", "msra")}
    setting, kept = Setting(MQAR(32, 4, 64), SMALL, range(2), 1, "cpu"), []
    train_all(models, setting, "steps", [], show=lambda *_: None, keep=kept.append)
    assert trained == [("full", 0, 10), ("full", 1, 10), ("msra", 0, 10), ("msra", 1, 10)]
    assert [run.parameters for run in kept] == [models[label].parameters for label in ("full", "full", "msra", "msra")]
    trained.clear()
    train_all(models, setting, "time", RUNS, show=lambda *_: None, keep=kept.append)
    assert trained == [("msra", 0, 2), ("msra", 1, 2)]


def test_tables_show_means_spreads_and_failures():
    text = rendered(*result_tables([*RUNS, *TIMED], "mqar"), *notes(RUNS))
    lines = [line.split() for line in text.splitlines()]
    assert ["full", "1,000", "10", "0.800", "±", "0.141", "0.700", "0.800", "2"] in lines
    assert ["msra", "1,000", "10", "0.500", "(1", "failed)", "0.500", "0.800", "8"] in lines
    assert "equal steps" in text and "equal time" in text and "accuracy" in text
    assert "msra, seed 1, 10 steps: crashed: ValueError: no" in text
    assert "Equal steps are not equal time" in text
    assert "Equal steps" not in rendered(*notes([*RUNS, *TIMED]))
    assert summary_line(RUNS, []) == "runs: 3 finished, 1 failed"
    assert "bits/byte" in rendered(*result_tables(RUNS, "text"))


def test_figures_are_exported_and_drawn(tmp_path):
    models = {label: matched(label, "mqar", SMALL, 64) for label in ("full", "msra")}
    content = json.loads(json.dumps(to_json({"seeds": 2}, {"torch": "2"}, models, [*RUNS, *TIMED], "mqar")))
    assert content["benchmark"] == "recall" and content["models"]["msra"]["config"]["block_size"] == 16
    assert [(s["label"], s["budget"]) for s in content["summaries"]] == [
        (label, budget) for budget in ("steps", "time") for label in ("full", "msra")
    ]
    assert content["runs"][0]["points"][-1] == {"step": 10, "figure": 0.9, "seconds": 2.0}
    assert any(line.startswith("msra ") and "MLP of" in line for line in parameter_lines(models))
    file = tmp_path / "plot.png"
    save_plot([*RUNS, *TIMED], "mqar", "a title", file)
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "explanation"),
    [
        (["--variants", "mrsa"], "argument --variants: there is no 'mrsa': choose from full, sliding_window"),
        (["--length", "30", "--pairs", "8"], "length=30 must be even and at least four times pairs=8"),
        (["--vocabulary", "10"], "vocabulary=10 must be even and at least 18 for pairs=8"),
        (["--heads", "3"], "hidden_size=64 must be a multiple of num_heads=3"),
        (["--first-seed", "-1"], "'-1' is not a whole number of at least 0"),
        (["--set", "msra=32"], "'msra=32' is not NAME.FIELD=VALUE, such as msra.block_size=32"),
        (["--set", "mrsa.block_size=32"], "there is no 'mrsa' to set 'block_size' of: choose from full, sliding"),
        (["--set", "msra.block=32"], "unexpected keyword argument 'block'"),
        (["--set", "msra.block_size=many"], "block_size='many'"),
        (["--heads", "1", "--length", "8k", "--variants", "msra"], "msra has +"),
    ],
)
def test_wrong_arguments_are_explained(arguments, explanation, capsys):
    with pytest.raises(SystemExit) as end:
        main(["recall", *arguments])
    assert end.value.code == 2
    assert explanation in capsys.readouterr().err


def test_help_names_everything_that_is_trained(capsys):
    with pytest.raises(SystemExit) as end:
        main(["recall", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "examples:" in text
    for label, setting in trained_settings().items():
        assert f"\n  {label} " in text and setting.description in text
