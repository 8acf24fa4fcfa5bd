"""The presets of the callbacks group: each composes, may be built, and is what its name says."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch import Callback
from omegaconf import OmegaConf

import danon_lightning
from danon_lightning.callbacks import NaNDebugger
from danon_lightning.train import ALLOWED_PACKAGES, check_targets

FOLDER = Path(danon_lightning.__file__).parent / "configs/callbacks"


def built(*overrides):
    """Callbacks by name; those that a preset switches off are null."""
    with initialize_config_module("danon_lightning.configs", version_base="1.3"):
        config = compose("train", overrides=["name=mine", *overrides])
    check_targets(OmegaConf.to_container(config.callbacks, resolve=True), ALLOWED_PACKAGES)
    return {name: instantiate(one) for name, one in config.callbacks.items() if one is not None}


@pytest.mark.parametrize("preset", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_a_preset_builds_callbacks(preset):
    assert all(isinstance(one, Callback) for one in built(f"callbacks={preset}").values())


def test_debug_is_the_usual_ones_and_a_debugger_that_writes_beside_the_run(tmp_path):
    made = built("callbacks=debug", f"output_dir={tmp_path}", "callbacks.nan_debugger.policy=skip")
    assert set(made) == {*built("callbacks=default"), "nan_debugger"}
    watching = made["nan_debugger"]
    assert isinstance(watching, NaNDebugger) and watching._response.policy == "skip"
    folder = tmp_path / "mine/nan_debugger"
    written = (watching._display.log_path, watching._display.plot_path, watching._bad._bundles.folder)
    assert [Path(one) for one in written] == [folder / "events.jsonl", folder / "norms.png", folder / "bundles"]
    assert watching._bad._bundles.include_data and watching._reader.weights_every == 100
    assert not list(tmp_path.iterdir())
