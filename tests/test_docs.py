"""What the documentation shows is run."""

import importlib.util
import inspect
import math
import re
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch

from danon_lightning.testing import launch_ranks, run_distributed

DOCS = Path(__file__).parents[1] / "docs"


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def python_block(page: str, containing: str) -> str:
    [block] = [block for block in python_blocks(page) if containing in block]
    return block


def run_block(page: str, containing: str, names: dict[str, object] | None = None) -> dict[str, object]:
    """Run a block after others whose ``names`` it goes on from; returns the names that there are then."""
    names = {"__name__": "docs_example"} if names is None else names
    exec(compile(python_block(page, containing), page, "exec", dont_inherit=True), names)
    return names


def tables(page: str) -> list[list[list[str]]]:
    """All tables of a page, as rows of cells; without the line under the head."""
    found = re.findall(r"(?:^\|.*\|\n)+", (DOCS / page).read_text(), flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if "---" not in row]
        for table in found
    ]


def test_the_example_of_a_variant_is_causal_and_streams_like_its_parallel_form(monkeypatch):
    from danon_lightning.attention import available_variants, registry

    monkeypatch.setattr(registry, "_variants", dict(registry._variants))
    names = run_block("attention.md", "register_variant(")
    assert "mean" in available_variants()
    model = names["model"]
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = model(tokens).last_hidden_state
    changed = tokens.clone()
    changed[:, 12] += 1
    torch.testing.assert_close(model(changed % 256).last_hidden_state[:, :12], whole[:, :12])
    state, parts = model.init_state(2), []
    for chunk in tokens.split([7, 1, 12], dim=1):
        output = model(chunk, state=state)
        state = output.state
        parts.append(output.last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    # Padding on the left changes nothing, in streams too.
    padded, mask = torch.cat([tokens[:, :5], tokens], dim=1), torch.ones(2, 25, dtype=torch.int64)
    mask[:, :5] = 0
    for state in (None, model.init_state(2)):
        output = model(padded, mask, state=state).last_hidden_state
        torch.testing.assert_close(output[:, 5:], whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="causal=False is not possible with mean"):
        names["MeanConfig"](causal=False)
    module = run_block("attention.md", "class MeanLightning", names)["module"]
    module.loss(tokens).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


# The pages of attention variants, and the name of each.
VARIANT_PAGES = {f"attention/{variant}.md": variant for variant in ("msra", "dala", "ucsa", "infinite", "super_hybrid")}


def run_page(page: str) -> dict[str, object]:
    """Run all examples of a page one after another; what they take for granted is there."""
    torch.manual_seed(0)
    input_ids = torch.randint(0, 256, (2, 300))
    names: dict[str, object] = {
        "__name__": "docs_example",
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.roll(-1, dims=1),
        "chunks": input_ids[:1].split(120, dim=1),
        "hidden": torch.randn(2, 50, 256),
    }
    for block in python_blocks(page):
        exec(compile(block, page, "exec", dont_inherit=True), names)
    return names


def test_the_examples_of_attention_run_in_order(monkeypatch):
    from danon_lightning.attention import registry

    monkeypatch.setattr(registry, "_variants", dict(registry._variants))
    names = run_page("attention.md")
    assert names["hidden"].shape == (2, 300, 256) and names["output"].last_hidden_state.shape == (1, 60, 256)
    assert [text[:11] for text in names["texts"]][1] == "class Model" and len(names["first"]) == 1
    assert names["efficiency"].information_retention < 1


def test_the_examples_of_parts_run():
    names = run_page("attention/components.md")
    assert names["restored"].shape == (2, 50, 256) and 0 < names["error"] < 1
    assert names["cells"].shape == (2, round(50 * names["stats"].ratio), 256)
    assert names["level_stats"][1].ratio < names["level_stats"][0].ratio and names["coarse"].shape == (2, 50, 256)
    assert torch.equal(names["found"][0], names["hidden"])
    assert torch.equal(names["calm"], names["hidden"]), "nothing is changed before the warm-up is over"
    assert names["fused"].shape == names["hidden"].shape
    torch.testing.assert_close(names["part"], names["read"][:, :, :20])


def test_the_examples_of_variants_run():
    names = run_page("attention/msra.md")
    assert names["first_layer"].sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(names["weights"].sum(dim=-1), torch.ones(2, 4, 300))
    assert 0 < names["stats"]["compression_ratio"] < 1
    names = run_page("attention/dala.md")
    assert names["output"].router_logits[0].shape == (2, 2, 4, 300) and names["added"].shape == (4, 2, 4)
    assert names["scores"].shape == (4, 2, 300) and (names["scores"] == 0.5).all(), "one half at the start"
    names = run_page("attention/ucsa.md")
    assert names["blocks"].shape[:3] == (2, 4, 300) and names["blocks"].max() >= 0
    assert names["compressed"].shape[1] <= 150 and names["restored"].shape == (2, 300, 256)
    names = run_page("attention/infinite.md")
    assert names["share"].item() == pytest.approx(0.12, abs=0.005) and len(names["first"]) == 1
    names = run_page("attention/super_hybrid.md")
    torch.testing.assert_close(names["shares"], torch.full((3,), 1 / 3))
    assert names["stats"].passes == 1 and names["importance"].shape == (2, 300)


def default_of(field) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def test_all_settings_of_attention_are_listed_with_their_defaults():
    from danon_lightning.attention import AttentionConfig, get_variant

    shared = {field.name: default_of(field) for field in fields(AttentionConfig)}
    configs = {"attention.md": AttentionConfig}
    configs |= {page: get_variant(variant).config_class for page, variant in VARIANT_PAGES.items()}
    for page, config in configs.items():
        expected = {field.name: default_of(field) for field in fields(config)}
        if config is not AttentionConfig:
            assert "../attention.md#shared-settings" in (DOCS / page).read_text()
        [(_, *rows)] = [table for table in tables(page) if table[0][0] == "Setting"]
        listed = {row[0].strip("`"): eval(row[1].strip("`")) for row in rows}
        own = {name: x for name, x in expected.items() if config is AttentionConfig or shared.get(name, ...) != x}
        assert listed == own, page
        assert all(len(row[2]) > 5 for row in rows), page
        for table in tables(page):
            if table[0][0] == "Called elsewhere":
                for _, there, here, default in table[1:]:
                    name = re.match(r"`(\w+)`", here)
                    if default:
                        assert name and eval(default.strip("`")) == expected[name[1]], (page, here)
                        assert there, (page, here)


def test_all_arguments_of_parts_are_listed_with_their_defaults():
    from danon_lightning.attention import components

    page = (DOCS / "attention/components.md").read_text()
    for section in page.split("\n## ")[1:-1]:
        name, text = section.split("\n", 1)
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", text, flags=re.MULTILINE)
        listed = {argument: default.strip("`") for argument, default, _ in rows}
        expected = {}
        for argument in inspect.signature(getattr(components, name)).parameters.values():
            required = "none" if argument.kind is argument.VAR_KEYWORD else "required"
            expected[argument.name] = required if argument.default is argument.empty else argument.default
        assert listed.keys() == expected.keys(), name
        for argument, default in expected.items():
            written = listed[argument]
            assert written == default or eval(written, {"time": time}) == default, (name, argument)
        assert f"[`{name}`](#{name.lower()})" in page
    for name in components.__all__:
        assert name in page, f"components.md does not tell of {name}"


@pytest.mark.parametrize("variant", ["msra", "dala", "ucsa", "infinite", "super_hybrid"])
def test_pages_of_variants_and_the_page_of_benchmarks_tell_the_same_figures(variant):
    """Each figure of a page is in a row, or a sentence, of the benchmarks that names the variant, or full attention."""
    [table] = [
        table for table in tables(f"attention/{variant}.md") if table[0] == ["", f"`{variant}`", "full attention"]
    ]
    text = (DOCS / "attention_benchmarks.md").read_text()
    names = {1: f"`{variant}`", 2: r"full attention|`sdpa`"}
    for column, name in names.items():
        known = set(re.findall(r"\d+\.?\d*", " ".join(re.findall(rf"^.*(?:{name}).*$", text, flags=re.MULTILINE))))
        told = [number for row in table[1:] for number in re.findall(r"\d+\.?\d*", row[column])]
        assert told and set(told) <= known, sorted(set(told) - known)


def test_the_details_and_methods_of_models_are_listed():
    from danon_lightning import attention

    for page, variant in VARIANT_PAGES.items():
        config_class, text = attention.get_variant(variant).config_class, (DOCS / page).read_text()
        [model] = [cls for cls in attention.AttentionModel.__subclasses__() if cls.config_class is config_class]
        names = [name for name in vars(model) if not name.startswith("_") and callable(getattr(model, name))]
        names = [name for name in names if name not in ("config_class", "output_class")]
        for name in [*names, *model.output_class.all_details(), model.__name__]:
            assert re.search(rf"\b{name}\b", text), f"{page} does not tell of {name}"


# ---- pictures of what attention reads


@pytest.fixture(scope="module")
def draw():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    spec = importlib.util.spec_from_file_location("docs_draw", DOCS / "attention" / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_drawn_and_shown(draw, tmp_path):
    drawn = {path.name for path in draw.main(tmp_path)}
    shown = {name for page in DOCS.glob("attention/*.md") for name in re.findall(r"!\[.+\]\((.*)\)", page.read_text())}
    assert drawn == shown == {path.name for path in DOCS.glob("attention/*.png")}
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("variant", ["msra", "ucsa", "dala", "infinite"])
def test_pictures_show_every_past_token_once(draw, variant):
    """As the pages say; of DALA and infinite attention only what is not in the state as well."""
    routes = draw.routes_of(variant)
    past = torch.ones(draw.LENGTH, draw.LENGTH).tril()
    count = sum(route.read.int() for route in routes if route.span)
    if variant in ("msra", "ucsa"):
        assert torch.equal(count.float(), past)
    else:
        assert count.max() == 1 and (count <= past).all()
        [state] = [route for route in routes if not route.span]
        assert torch.equal(state.read.float(), past)
    assert all(route.read[draw.QUERY].any() for route in routes), "the chosen query shows every route"


# ---- a compressor of one's own


def ternary():
    return run_block("compressors.md", "class TernaryCompressor")["TernaryCompressor"]()


def test_the_example_of_a_compressor_is_as_short_as_the_page_says():
    assert len(python_block("compressors.md", "class TernaryCompressor").splitlines()) < 40


@pytest.mark.parametrize("numel", [1, 255, 256, 257, 5000])
def test_the_example_of_a_compressor_keeps_to_the_rules(numel):
    from danon_lightning.strategies.communication.compressors.base import Context

    compressor, generator = ternary(), torch.Generator().manual_seed(0)
    payload = torch.full((compressor.payload_bytes(numel, 0),), 0xAA, dtype=torch.uint8)
    other, out = torch.zeros_like(payload), torch.full((numel,), torch.nan)
    assert payload.numel() <= 4 * numel + 64
    values = torch.randn(numel, generator=generator)
    for target in (payload, other):
        compressor.encode(values, target, Context())
    assert torch.equal(payload, other), "all of the payload is written"
    compressor.decode(payload, out)
    assert (out - values).square().sum() < 0.5 * values.square().sum()
    onto = torch.ones(numel)
    compressor.decode(payload, onto, add=True)
    assert torch.equal(onto, out + 1)
    for bad in (math.nan, math.inf, -math.inf):
        values[numel // 2] = bad
        compressor.encode(values, payload, Context())
        compressor.decode(payload, out)
        assert not out[numel // 2].isfinite()
        assert (~out.isfinite()).sum() <= 256


def train_with_the_example_of_a_compressor():
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from danon_lightning.strategies import GradientCommunicator, Mesh

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1))
    weight = model[0].weight
    ddp = DistributedDataParallel(model)
    mesh = Mesh.from_world(dist.get_world_size(), 1, dist.get_rank())
    communicator = GradientCommunicator(ddp, mesh, compression=ternary())
    ddp.register_comm_hook(communicator, communicator.hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses, due, applied = [], torch.zeros(weight.shape), torch.zeros(weight.shape)
    for _ in range(150):
        x = torch.randn(32, 64, generator=generator)
        y = x[:, :1] - x[:, 1:2]
        due += torch.autograd.grad((model(x) - y).square().mean(), weight)[0] / dist.get_world_size()
        optimizer.zero_grad()
        loss = (ddp(x) - y).square().mean()
        loss.backward()
        assert communicator.finite
        applied += weight.grad
        optimizer.step()
        losses.append(loss.item())
    memory, stats = communicator.state_dict(), communicator.stats()
    communicator.close()
    return losses, due, applied, memory, stats, [p.detach().clone() for p in model.parameters()]


def test_the_example_of_a_compressor_trains_with_error_feedback():
    first, second = run_distributed(train_with_the_example_of_a_compressor, 2)
    for one, other in zip(first[-1], second[-1], strict=True):
        assert torch.equal(one, other)
    for losses, _, _, _, stats, _ in (first, second):
        assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
        assert stats["compression_ratio"] > 8
        assert stats["residual_norm"] > 0
    due, applied = first[1] + second[1], first[2]
    kept = first[3]["mean"]["residual"]["0.weight"].view(due.shape)
    torch.testing.assert_close(applied + kept, due, rtol=0, atol=1e-5 * float(due.abs().max()))
    assert kept.norm() > 1e-3 * due.norm()


# ---- "My network is slow"


def run_the_lightning_examples():
    names, losses = {"__name__": "docs_example"}, []
    for containing in ("class ExchangeReport", "class RegressionSGD", "class RegressionOneBit"):
        run_block("slow_network.md", containing, names)
        trainer = names["trainer"]
        losses.append(float(trainer.callback_metrics["loss"]))
        assert trainer.strategy.communication_stats()["compression_ratio"] > 1.5
    return losses


@pytest.mark.slow
def test_the_lightning_examples_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for losses in run_distributed(run_the_lightning_examples, 2, timeout=200):
        assert all(loss < 0.3 for loss in losses), losses  # of 1.06 for a model that answers 0


def test_the_example_of_a_prediction_prints_times_and_bytes(capsys):
    run_block("slow_network.md", "predict_exchange")
    found = dict(re.findall(r"(\w+) [\d.]+ s, ([\d.]+) MB leave a node", capsys.readouterr().out))
    weights = 6 * 2048 * (2048 + 1)
    assert float(found["None"]) == pytest.approx(4 * weights / 1e6, rel=0.01)
    assert float(found["int8"]) == pytest.approx((1 + 4 / 256) * weights / 1e6, rel=0.01)


def test_the_script_without_lightning_trains_and_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(python_block("slow_network.md", "# train.py"))
    environment = {"GROUP_WORLD_SIZE": "1"}
    reached = []
    for _ in range(2):
        for rank in launch_ranks([sys.executable, "train.py"], ranks_per_node=2, env=environment):
            assert rank.returncode == 0, rank.stderr
            reached += re.findall(r"step (\d+), loss ([\d.]+)", rank.stdout)
    assert [int(step) for step, _ in reached] == [100, 200]
    assert float(reached[1][1]) < 0.2


# ---- "My model does not fit one device"


def test_the_example_of_a_pipeline_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(python_block("pipeline.md", "# train.py"))
    ranks = launch_ranks([sys.executable, "train.py"], ranks_per_node=2, env={"GROUP_WORLD_SIZE": "1"})
    for rank in ranks:
        assert rank.returncode == 0, rank.stderr
        [loss] = re.findall(r"^loss ([\d.]+)$", rank.stdout, flags=re.MULTILINE)
        assert float(loss) < 1.0  # of 4.2 for a model that knows nothing
    assert "pipeline stages of layers" in ranks[0].stdout
    assert torch.load("whole.ckpt", weights_only=True)["state_dict"]["head.weight"].shape == (64, 32)


def bytes_from_a_node(compression, nodes, shape):
    """For each element."""
    from danon_lightning.strategies import LinearCompressor
    from danon_lightning.strategies.communication import get_compressor

    compressor, numel, reduced = get_compressor(compression), shape.numel(), 2 * (nodes - 1) / nodes
    if compressor is None:
        return reduced * 4
    if isinstance(compressor, LinearCompressor):
        return reduced * 4 * compressor.code_numel(shape) / numel
    code = compressor.payload_bytes(numel, 0) / numel
    return code * (nodes - 1) if compressor.exchange == "gather" else reduced * code


def test_the_table_of_bytes_is_what_compressors_send():
    from danon_lightning.strategies import TopKCompressor, available_compressors

    [(head, *rows)] = [table for table in tables("slow_network.md") if "2 nodes" in table[0]]
    listed = set()
    for label, *cells in rows:
        for name in re.findall(r"`(\w+)`", label):
            compression = {"None": None}.get(name, TopKCompressor(0.001) if "0.1 %" in label else name)
            listed.add(name)
            for nodes, cell in zip(head[1:], cells, strict=True):
                expected = bytes_from_a_node(compression, int(nodes.split()[0]), torch.Size([1024, 1024]))
                assert float(cell) == pytest.approx(expected, rel=0.005), (label, nodes)
    assert listed == {"None", *available_compressors()}


# ---- what is listed


def test_the_catalogue_of_compressors_is_complete_and_its_defaults_are_true():
    from danon_lightning.strategies import available_compressors
    from danon_lightning.strategies.communication import get_compressor

    [(_, *rows)] = [table for table in tables("compressors.md") if table[0][0] == "`compression=`"]
    assert {row[0].strip('`"') for row in rows} == set(available_compressors())
    for name, call, _, _, feedback, _ in rows:
        compressor = get_compressor(name.strip('`"'))
        arguments = inspect.signature(type(compressor)).parameters.values()
        assert call == f"`{type(compressor).__name__}({', '.join(f'{a.name}={a.default!r}' for a in arguments)})`"
        assert feedback == ("on" if compressor.needs_error_feedback else "off")


def test_all_statistics_are_listed():
    from danon_lightning.strategies.communication.stats import CommunicationStats

    [(_, *rows)] = [table for table in tables("strategy.md") if table[0][0] == "Field"]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert listed == {field.name for field in fields(CommunicationStats)}


PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_links_lead_somewhere(page):
    text = (DOCS / page).read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        found = (DOCS / page).parent / target if target else DOCS / page
        assert found.exists(), f"{page} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
            # As GitHub makes them.
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{page} links to {target}#{anchor}, which has {anchors}"
