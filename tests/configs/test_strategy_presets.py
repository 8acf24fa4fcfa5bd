"""The presets of the strategy group: each composes, may be built, and is what its name says."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

import danon_lightning
from danon_lightning.strategies import DanonHybridStrategy, available_compressors
from danon_lightning.train import ALLOWED_PACKAGES, check_targets

FOLDER = Path(danon_lightning.__file__).parent / "configs/strategy"
PRESETS = sorted(path.stem for path in FOLDER.glob("hybrid*.yaml"))
# Those that are named otherwise than what they compress with.
COMPRESSORS = {
    "hybrid": None,
    "hybrid_auto": None,
    "hybrid_dgc": "topk",
    "hybrid_async": None,
    "hybrid_periodic": "int8",
}


def composed(*overrides):
    with initialize_config_module("danon_lightning.configs", version_base="1.3"):
        return compose("train", overrides=list(overrides)).strategy


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_builds_the_strategy_with_its_compression(preset):
    config = composed(f"strategy={preset}")
    check_targets(OmegaConf.to_container(config), ALLOWED_PACKAGES)
    strategy = instantiate(config)
    assert isinstance(strategy, DanonHybridStrategy)
    compressor = strategy._compressor
    expected = COMPRESSORS.get(preset, preset.removeprefix("hybrid_"))
    assert (compressor.name if compressor is not None else None) == expected


def test_each_compression_has_a_preset():
    assert set(PRESETS) == {f"hybrid_{name}" for name in available_compressors()} | set(COMPRESSORS)


def test_settings_can_be_overridden():
    strategy = instantiate(composed("strategy=hybrid_topk", "strategy.compression.density=0.05"))
    assert strategy._compressor.density == 0.05
    assert instantiate(composed("strategy=hybrid_topk", "strategy.compression=int8"))._compressor.name == "int8"
    assert instantiate(composed("strategy=hybrid_dgc"))._error_feedback.momentum == 0.9
    assert instantiate(composed("strategy=hybrid_int4", "strategy.error_feedback=true"))._error_feedback is not None


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_first_line_says_what_it_is_for(path):
    first, *_ = path.read_text().splitlines()
    assert re.fullmatch(r"# .{20,}\.", first)


def test_the_documentation_lists_the_presets():
    page = Path(__file__).parents[2] / "docs/configs.md"
    listed = set(re.findall(r"`(hybrid\w*)`", page.read_text()))
    assert listed == set(PRESETS)
