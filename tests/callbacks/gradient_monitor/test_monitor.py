"""When it measures, what it writes, and what it leaves behind."""

import copy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

sys.path.insert(0, str(Path(__file__).parent))
from monitored import Network, Remember, fit, hooks_of, loader, trainer_with

import danon_lightning
from danon_lightning.callbacks import GradientMonitor
from danon_lightning.callbacks.gradient_monitor import tags
from danon_lightning.callbacks.gradient_monitor.placement import Placement, check_strategy, layer_of
from danon_lightning.callbacks.health.finding import ReportsFindings


def test_the_largest_layers_have_charts_of_their_own():
    for by, row in (("norm", "norm"), ("update_ratio", "update_ratio")):
        everything = fit(GradientMonitor(1, top_k=None, top_by=by))
        for step, values in fit(GradientMonitor(1, top_k=2, top_by=by)).items():
            own = {tag.split("/")[2] for tag in values if tag.startswith(f"grad/{row}/")}
            assert len(own) == 2
            if step == 0:  # no average of earlier steps yet
                of_all = {t.split("/")[2]: v for t, v in everything[0].items() if t.startswith(f"grad/{row}/")}
                assert own == set(sorted(of_all, key=of_all.get)[-2:])
    assert {t for step in fit(GradientMonitor(1, top_k=0)).values() for t in step} == {
        "grad/total/norm", "grad/total/clipped_norm", "grad/total/update_ratio", "grad/total/zeros",
        "grad/total/nonfinite",
    }  # fmt: skip


def test_patterns_choose_what_is_watched():
    (values, *_) = fit(GradientMonitor(1, include=["first*", "last*"], exclude=["*bias"])).values()
    layers = {tag.split("/")[2] for tag in values if tag.startswith("grad/norm/")}
    assert layers == {"first", "last"}
    module = Network()
    placement = Placement.find(trainer_with(), module, ["first*"], ["*bias"])
    assert placement.layers == ("first",) and list(placement.places) == ["first.weight"]
    squares = sum(values[f"grad/norm/{layer}"] ** 2 for layer in layers)
    assert values["grad/total/norm"] == pytest.approx(squares**0.5)  # of what is watched
    with pytest.raises(ValueError, match=r"no parameter matches include=\['nothing'\].*such as 'first.weight'"):
        fit(GradientMonitor(include=["nothing"]))


def test_layers_go_by_the_names_of_modules():
    assert [layer_of(name) for name in ("a.b.weight", "weight", "_orig_mod.a._orig_mod.weight")] == [
        "a.b",
        "weight",
        "a",
    ]


@pytest.mark.filterwarnings("ignore:`isinstance.treespec")
def test_tensorboard_opens_tidy(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    plot = tmp_path / "plots" / "norms.png"
    monitor = GradientMonitor(2, plot_path=plot, draw_every_n_steps=4, histogram_every_n_steps=4)
    trainer_with(monitor, gradient_clip_val=0.5, logger=logger).fit(Network(), loader())
    events = EventAccumulator(
        str(tmp_path / "run"), size_guidance={"images": 0, "tensors": 0, "histograms": 0}
    ).Reload()
    assert [event.step for event in events.Scalars("grad/total/norm")] == [1, 3, 5, 7]
    # Every four steps, and at the end if there is something new.
    assert [event.step for event in events.Images("grad/heat_map")] == [3, 7]
    assert [event.step for event in events.Histograms("grad/histogram/first")] == [3, 7]
    assert plot.read_bytes().startswith(b"\x89PNG")
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}
    assert charts == tags.LAYOUT


def test_a_table_gets_all_numbers(tmp_path):
    trainer = trainer_with(GradientMonitor(2), logger=CSVLogger(tmp_path, "", "table"))
    trainer.fit(Network(), loader())
    head, *rows = (tmp_path / "table/metrics.csv").read_text().splitlines()
    columns = head.split(",")
    assert "grad/total/norm" in columns and "grad/update_ratio/first" in columns
    steps = [row.split(",")[columns.index("step")] for row in rows if row.split(",")[columns.index("grad/total/norm")]]
    assert steps == ["1", "3", "5", "7"]


class Watchful(Network):
    """Looks for hooks in every step."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.seen, self.fails_at = [], fails_at

    def training_step(self, batch, batch_idx):
        self.seen.append(bool(self.first.weight._backward_hooks))
        if batch_idx == self.fails_at:
            raise KeyError("broken")
        return super().training_step(batch, batch_idx)


def test_hooks_are_there_for_logged_steps_only():
    module, trainer = Watchful(), trainer_with(GradientMonitor(2), accumulate_grad_batches=2)
    trainer.fit(module, loader())
    assert module.seen == [False, False, True, True] * 2
    assert not hooks_of(trainer, module)
    # Nothing to compare, nothing to watch.
    module, trainer = Watchful(), trainer_with(GradientMonitor(1))
    trainer.fit(module, loader())
    assert not any(module.seen) and not hooks_of(trainer, module)


def test_an_error_of_the_module_leaves_no_hook():
    module, trainer = Watchful(fails_at=3), trainer_with(GradientMonitor(2), accumulate_grad_batches=2)
    with pytest.raises(KeyError, match="broken"):
        trainer.fit(module, loader())
    assert module.seen[-1] and not hooks_of(trainer, module)


@pytest.mark.parametrize(
    "what",
    [
        "measurement.nonzero_counts",
        "measurement.sums",
        "measurement.Measured.norms",
        "local_norms.LocalNorms.squares",
        "local_norms.values_of",
    ],
)
def test_what_cannot_be_measured_does_not_end_the_run(monkeypatch, what):
    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    monitor = GradientMonitor(1)
    monkeypatch.setattr(f"danon_lightning.callbacks.gradient_monitor.{what}", fail)
    with pytest.warns(UserWarning, match="could not measure gradients .RuntimeError: out of luck.: training goes on"):
        assert not fit(monitor, accumulate_grad_batches=2)
    monkeypatch.undo()
    assert len(fit(monitor, accumulate_grad_batches=2)) == 4


class Full(Remember):
    def log_metrics(self, metrics, step=None):
        raise OSError(28, "No space left on device")


def test_a_full_disk_does_not_end_the_run():
    monitor = GradientMonitor(2)
    with pytest.warns(UserWarning, match="GradientMonitor could not write .*No space left"):
        trainer_with(monitor, logger=Full()).fit(Network(), loader())
    assert monitor.history.logged == 4


def test_averages_survive_a_checkpoint(tmp_path):
    def run(epochs, path=None):
        monitor = GradientMonitor(1)
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = trainer_with(
            monitor, saver, accumulate_grad_batches=2, max_epochs=epochs, enable_checkpointing=True,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Network(), loader(), ckpt_path=path, weights_only=True if path else None)
        return monitor, trainer.logger.steps

    through, steps = run(2)
    resumed, rest = run(2, tmp_path / "epoch=0.ckpt")
    assert list(rest) == [4, 5, 6, 7]
    assert rest == {step: pytest.approx(steps[step]) for step in rest}
    assert resumed.state_dict() == through.state_dict()
    assert resumed.noise.updates == 8


def test_it_can_be_used_again_and_copied():
    monitor = GradientMonitor(4)
    assert list(fit(monitor)) == list(fit(monitor)) == [3, 7]
    copy.deepcopy(monitor)


def test_it_has_something_to_say_in_the_end():
    monitor = GradientMonitor(1)
    assert isinstance(monitor, ReportsFindings)
    assert monitor.findings() == []
    fit(monitor, Network(learning_rate=10.0))
    assert "learning rate" in [finding.subject for finding in monitor.findings()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 must be at least 1"),
        ({"draw_every_n_steps": 0}, "draw_every_n_steps=0 must be at least 1"),
        ({"histogram_every_n_steps": -1}, "histogram_every_n_steps=-1 must be at least 1"),
        ({"include": "layers.*"}, r"include='layers.\*' must be a list of patterns: \['layers.\*'\]"),
        ({"exclude": "head"}, "exclude='head' must be a list"),
        ({"top_k": -1}, "top_k=-1 must not be negative"),
        ({"top_by": "size"}, "top_by='size' must be 'norm' or 'update_ratio'"),
        ({"top_by": "update_ratio", "update_ratio": False}, "needs update_ratio=True"),
        ({"noise_decay": 1.0}, "noise_decay=1.0 must be at least 0 and less than 1"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientMonitor(**arguments)


def test_without_matplotlib_there_are_no_pictures(monkeypatch):
    def none(name, package=None):
        return None if name == "matplotlib" else ModuleSpec(name, None)

    monkeypatch.setattr("danon_lightning.callbacks.gradient_monitor.monitor.find_spec", none)
    for wanted in ({"heat_map": True}, {"plot_path": "norms.png"}):
        with pytest.raises(ModuleNotFoundError, match="needs matplotlib: pip install matplotlib, or leave it out"):
            GradientMonitor(**wanted)
    assert GradientMonitor().heat_map is False


def test_the_config_makes_one():
    folder = Path(danon_lightning.__file__).parent / "configs" / "callbacks"
    config = OmegaConf.load(folder / "monitor.yaml")
    assert isinstance(instantiate(config.gradient_monitor), GradientMonitor)


def test_sharded_gradients_are_refused():
    class Sharded:
        strategy = FSDPStrategy.__new__(FSDPStrategy)

    with pytest.raises(TypeError, match="needs whole gradients, but FSDPStrategy leaves each rank with shards"):
        check_strategy(Sharded())


def test_layers_without_gradient_are_left_out():
    class Frozen(Network):
        def on_fit_start(self):
            self.first.requires_grad_(False)

    steps = fit(GradientMonitor(1, top_k=None), Frozen(), accumulate_grad_batches=2)
    assert "grad/norm/second.1" in steps[1] and "grad/norm/first" not in steps[1]
