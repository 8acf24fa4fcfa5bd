"""What attention attends to: numbers, maps, and that training is the same with and without them."""

import math
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from small_models import language_model

from danon_lightning.callbacks import AttentionMonitor, MeasuresAttention
from danon_lightning.callbacks.attention_monitor import byte_tokens, draw_map
from danon_lightning.callbacks.attention_monitor.protocol import summarise
from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import run_distributed

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")

LENGTH = 40
VARIANTS = ["full", "msra", "dala", "ucsa", "infinite", "super_hybrid"]


def batches(count=6, size=3):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(torch.randint(97, 123, (count * size, LENGTH + 1), generator=generator), batch_size=size)


def fit(module, *callbacks, folder=None, steps=2, loader=None, **settings):
    logger = TensorBoardLogger(folder, name="", version="log") if folder else False
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": False, "max_steps": steps, "max_epochs": -1, "log_every_n_steps": 1}
    trainer = pl.Trainer(logger=logger, callbacks=list(callbacks), **{**options, **settings})
    pl.seed_everything(1, verbose=False)
    trainer.fit(module, loader or batches())
    return trainer


def events(folder):
    return EventAccumulator(str(folder / "log"), size_guidance={"images": 0, "tensors": 0}).Reload()


# What numbers are made of


def test_full_attention_has_the_entropy_that_is_computed_by_hand():
    weights = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0.25, 0, 0.75]]]])
    numbers = summarise({"weights": weights})
    last = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert numbers["entropy"] == pytest.approx((0 + math.log(2) + last) / 3)
    assert numbers["entropy_normalised"] == pytest.approx((1 + last / math.log(3)) / 2)  # the first has no choice
    assert numbers["sparsity"] == pytest.approx(1 / 6)
    everything = summarise({"weights": weights.flip(-1)})
    assert everything["sparsity"] == pytest.approx(4 / 9)  # there is weight on later keys, so all are visible


def test_queries_that_are_padding_do_not_count():
    weights = torch.eye(4)[None, None]
    visible = torch.tensor([[[1, 2, 0, 0]]])
    numbers = summarise({"weights": weights, "visible_keys": visible, "route/a": torch.tensor([0.2, 0.4, 9, 9])})
    assert numbers["sparsity"] == pytest.approx(1 / 3)
    assert numbers["share/a"] == pytest.approx(0.3)
    assert "load/a" not in numbers  # there is no choice


def test_routes_have_shares_loads_and_an_imbalance():
    near = torch.tensor([[[0.9, 0.8, 0.6, 0.1]]])
    numbers = summarise({"route/near": near, "route/far": 1 - near, "surprise": 3, "part": {"route/x": near}})
    assert numbers["share/near"] == pytest.approx(0.6)
    assert (numbers["load/near"], numbers["load/far"]) == (0.75, 0.25)
    assert numbers["imbalance"] == pytest.approx(0.75 / 0.5)
    assert numbers["surprise"] == 3 and numbers["part/share/x"] == pytest.approx(0.6)


def test_counts_give_sparsity_and_compression():
    found = {
        "visible_keys": torch.tensor([[[1, 2, 3, 4]]]),
        "tokens_read": torch.tensor([[[1, 2, 2, 2], [1, 1, 1, 1]]]),
        "keys_read": torch.tensor([[[1, 2, 3, 3]]]),
    }
    numbers = summarise(found)
    assert numbers["sparsity"] == pytest.approx(1 - 11 / 20)
    assert numbers["compression_ratio"] == pytest.approx(9 / 10)


def test_bytes_are_named_by_what_can_be_seen():
    assert byte_tokens([72, 105, 32, 10, 0, 200, 300]) == ["H", "i", "␣", "\\n", "00", "c8", "300"]


# Fitting


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_watched(tmp_path, variant):
    monitor = AttentionMonitor(every_n_steps=1, figures_every_n_steps=2, heads=(0,), max_tokens=24)
    fit(language_model(variant).float(), monitor, folder=tmp_path)
    log = events(tmp_path)
    scalars = set(log.Tags()["scalars"])
    expected = {"sparsity", "entropy", "entropy_normalised", "compression_ratio"}
    if variant == "super_hybrid":  # one layer of three components, one of infinite alone
        expected = {"dala/sparsity", "msra/entropy", "entropy", "share/ucsa", "load/infinite"} - {"load/infinite"}
    if variant == "ucsa":
        expected -= {"compression_ratio"}  # a tree
    for what in expected:
        assert {f"attention/{what}", f"attention/model.layers.0.core/{what}"} <= scalars
        assert [event.step for event in log.Scalars(f"attention/{what}")] == [0, 1]
    assert log.Tags()["images"] == ["attention/model.layers.1.core/head_0"]
    assert [event.step for event in log.Images("attention/model.layers.1.core/head_0")] == [1]
    for name, numbers in monitor.statistics.items():
        assert all(math.isfinite(value) for value in numbers.values()), name
        assert 0 <= numbers.get("sparsity", 0) <= 1 and 0 <= numbers.get("entropy_normalised", 0) <= 1 + 1e-6
    if variant == "full":
        assert monitor.statistics["model.layers.0.core"]["sparsity"] == 0
    assert not monitor.findings() or all("ways" in finding.text for finding in monitor.findings())


def told(module, batch):
    """What the first layer tells of a batch."""
    core, inputs = module.model.layers[0].core, []
    with torch.no_grad():
        hook = lambda _, args, kwargs: inputs.append((args, kwargs))  # noqa: E731
        handle = core.register_forward_pre_hook(hook, with_kwargs=True)
        module.model(batch[:, :-1])
        handle.remove()
        ((args, kwargs),) = inputs
        return {name: float(value) for name, value in summarise(core.attention_statistics(*args, **kwargs)).items()}


class Probe(pl.Callback):
    """What the core tells of the batch of the step, before the weights move on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.expected = told(pl_module, batch[:2])


def test_the_numbers_are_those_of_the_training_step():
    monitor, probe = AttentionMonitor(every_n_steps=1, figures_every_n_steps=None), Probe()
    fit(language_model("dala").float(), monitor, probe, steps=2)
    numbers = monitor.statistics["model.layers.0.core"]
    assert numbers == pytest.approx(probe.expected, rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"memory_efficient": True}])
def test_training_is_the_same_with_and_without(settings):
    def train(*callbacks):
        module = language_model("ucsa", dropout=0.2, attention_dropout=0.2, error_compensation=0.5, **settings)
        fit(module, *callbacks, steps=3)
        return module

    monitor = AttentionMonitor(every_n_steps=1, figures_every_n_steps=1)
    plain, watched = train(), train(monitor)
    assert monitor.statistics and not monitor._errors
    for (name, one), (_, two) in zip(plain.state_dict().items(), watched.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert not any(module._forward_pre_hooks for module in watched.modules())


def test_accumulated_batches_are_measured_once_and_mixed_precision_is_that_of_the_step(tmp_path):
    monitor = AttentionMonitor(every_n_steps=2, figures_every_n_steps=None)
    module = language_model("msra").float()
    fit(module, monitor, folder=tmp_path, steps=4, accumulate_grad_batches=3, precision="bf16-mixed", max_epochs=9)
    assert [event.step for event in events(tmp_path).Scalars("attention/entropy")] == [1, 3]
    assert not monitor._errors


def test_streams_tell_of_their_cache():
    monitor = AttentionMonitor(every_n_steps=1, figures_every_n_steps=None)
    fit(language_model("ucsa", chunk_length=20, max_cache_size=8).float(), monitor, steps=1)
    numbers = monitor.statistics["model.layers.0.core"]
    assert 0 < numbers["cache_hit_rate"] < 1
    assert "sparsity" in numbers  # of the first chunk


class TheirAttention(nn.Module):
    """A third party's: one method more than it has anyway."""

    def __init__(self):
        super().__init__()
        self.embedding, self.qkv = nn.Embedding(256, 8), nn.Linear(8, 24)

    def _split(self, ids):
        return self.qkv(self.embedding(ids)).chunk(3, dim=-1)

    def forward(self, ids, scale=1.0):
        q, k, v = self._split(ids)
        return F.scaled_dot_product_attention(q * scale, k, v, is_causal=True)

    def attention_statistics(self, ids, scale=1.0):
        q, k, _ = self._split(ids)
        hidden = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
        weights = (q * scale @ k.mT / 8**0.5).masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return {"weights": weights.unsqueeze(1), "temperature": 1 / scale}


class Theirs(pl.LightningModule):
    """With several optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.attention, self.head = TheirAttention(), nn.Linear(8, 256)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = F.cross_entropy(self.head(self.attention(batch[:, :-1], scale=0.5)).mT, batch[:, 1:])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.attention, self.head)]


def test_a_module_of_a_third_party_is_watched(tmp_path):
    monitor = AttentionMonitor(every_n_steps=2, figures_every_n_steps=2, heads="mean")
    module = Theirs()
    assert isinstance(module.attention, MeasuresAttention)
    fit(module, monitor, folder=tmp_path, steps=8)
    log = events(tmp_path)
    assert [event.step for event in log.Scalars("attention/attention/temperature")] == [1, 3]
    assert log.Scalars("attention/attention/temperature")[0].value == 2
    assert 0 < log.Scalars("attention/attention/entropy")[0].value < math.log(LENGTH)
    assert log.Scalars("attention/sparsity")[0].value == 0
    assert log.Tags()["images"] == ["attention/attention/head_mean"]


class Broken(TheirAttention):
    def attention_statistics(self, ids, scale=1.0):
        raise RuntimeError("no memory for so many weights")


def test_what_cannot_be_measured_is_left_out_and_said():
    module = Theirs()
    module.attention = Broken()
    monitor = AttentionMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="leaves attention out from now on: RuntimeError: no memory") as warned:
        fit(module, monitor, steps=6)
    assert sum("leaves attention out" in str(one.message) for one in warned) == 1
    assert [finding.text for finding in monitor.findings()] == [
        "not measured: RuntimeError: no memory for so many weights"
    ]


def test_writing_that_fails_does_not_end_training(tmp_path):
    class Full(TensorBoardLogger):
        def log_metrics(self, metrics, step=None):
            if any(name.startswith("attention/") for name in metrics):
                raise OSError("No space left on device")

    monitor = AttentionMonitor(every_n_steps=1, figures_every_n_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=Full(tmp_path), callbacks=[monitor], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=100,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="could not write what it has measured"):
        trainer.fit(language_model("full").float(), batches())
    assert trainer.global_step == 2 and monitor.statistics


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_models_are_measured_without_compiling_anew(how):
    module = language_model("msra").float()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    if how == "wrapped":
        module.model = torch.compile(module.model, backend=backend, dynamic=False)
    else:
        module.model.compile(backend=backend, dynamic=False)
    monitor = AttentionMonitor(every_n_steps=2, figures_every_n_steps=None)
    counts = []

    class Count(pl.Callback):
        def on_train_batch_end(self, *args):
            counts.append(len(compiled))

    fit(module, monitor, Count(), steps=4)
    assert counts[0] > 0 and counts[0] == counts[-1]
    assert list(monitor.statistics) == ["model.layers.0.core", "model.layers.1.core"]
    assert not monitor.findings()
    torch._dynamo.reset()


def pipelined(folder):
    strategy = DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=3, process_group_backend="gloo")
    monitor = AttentionMonitor(every_n_steps=1, figures_every_n_steps=1, layers="all")
    seen = []

    class Probe(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch)

    fit(language_model("dala"), monitor, Probe(), strategy=strategy, devices=2, folder=folder, steps=1)
    return monitor.statistics, [finding.text for finding in monitor.findings()], seen[0]


def test_a_stage_shows_its_own_layers_and_says_what_is_missing(tmp_path):
    (first, said, batch), (second, silent, _) = run_distributed(pipelined, 2, str(tmp_path), timeout=120)
    # The last micro-batch, in a model that has all layers.
    expected = told(language_model("dala"), batch[2:])
    assert list(first) == ["model.layers.0.core"]
    assert first["model.layers.0.core"] == pytest.approx(expected)
    assert "model.layers.1.core" in said[0] and "not shown" in said[0]
    assert (second, silent) == ({}, [])
    assert events(tmp_path).Tags()["images"] == [f"attention/model.layers.0.core/head_{head}" for head in (0, 1)]


def test_maps_show_tokens_and_routes():
    tokens = list("abcd")
    figure = draw_map(torch.eye(4), {"near": torch.full((4,), 0.25), "far": torch.full((4,), 0.75)}, tokens, "a title")
    image, bars = figure.axes[0], figure.axes[1]
    assert [label.get_text() for label in image.get_yticklabels()] == tokens
    assert [label.get_text() for label in image.get_xticklabels()] == tokens
    assert image.images[0].get_array().tolist() == torch.eye(4).tolist()
    assert sorted({patch.get_width() for patch in bars.patches}) == [0.25, 0.75]
    assert len(draw_map(None, {"near": torch.ones(4)}).axes) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"every_n_steps": 10, "figures_every_n_steps": 25}, "figures_every_n_steps=25"),
        ({"layers": "first"}, "layers='first'"),
        ({"heads": "all"}, "heads='all'"),
        ({"max_tokens": 1}, "max_tokens=1"),
        ({"sequences": 0}, "sequences=0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionMonitor(**settings)


def test_models_that_tell_nothing_are_refused():
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[:, :1].float()).mean()

    with pytest.raises(TypeError, match="no module in Plain with a method attention_statistics"):
        fit(Plain(), AttentionMonitor())
    with pytest.raises(ValueError, match=r"layers=\[0, 5\] names \[5\], but there are 2 layers"):
        fit(language_model("full").float(), AttentionMonitor(layers=[0, 5]))
