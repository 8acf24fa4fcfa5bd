"""The danon-train command, as a user runs it: in processes of its own."""

import csv
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import danon_lightning
from danon_lightning.train import ALLOWED_PACKAGES, check_targets

CONFIGS = Path(danon_lightning.__file__).parent / "configs"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One corpus for the tests of this file."""
    return tmp_path_factory.mktemp("cache")


def danon_train(folder: Path, *overrides: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "danon_lightning.train", *overrides],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def losses(folder: Path) -> dict[int, str]:
    """Training loss by step, to the last digit."""
    with open(folder / "metrics.csv") as file:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


def test_two_ranks_train_log_and_checkpoint(tmp_path, cache):
    done = danon_train(tmp_path, "experiment=smoke", f"data.cache_dir={cache}")
    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "standard library",
        "1 node × 2 ranks, 2 replicas",
        "dense, all to all",
        "MSRALightning",
        "global batch",
    ):
        assert said in done.stdout
    run = tmp_path / "runs/msra/version_0"
    assert re.search(r"tensorboard --logdir\s+(│\s+│ +)?runs/msra/version_0", done.stdout)
    assert (run / "checkpoints/last.ckpt").is_file()
    assert OmegaConf.load(run / "config.yaml").trainer.max_steps == 6
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}, "nothing is written beside the run"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/bits_per_byte", "val/loss", "val/bits_per_byte"} <= set(tags["scalars"])
    assert any(tag.startswith("train/learning_rate") for tag in tags["scalars"])
    assert "sample/text_summary" in tags["tensors"]
    assert [event.step for event in events.Scalars("val/bits_per_byte")] == [2, 5]
    sample = events.Tensors("sample/text_summary")[-1].tensor_proto.string_val[0]
    assert sample.startswith(b"    def ")


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(["hybrid"], marks=slow),
        pytest.param(["hybrid_int8"], marks=slow),
        ["hybrid_topk", "strategy.residual_checkpoint=per_rank"],
    ],
    ids=lambda strategy: strategy[0],
)
def test_a_resumed_run_repeats_an_uninterrupted_one_to_the_digit(tmp_path, cache, strategy):
    name, *settings = strategy
    common = [
        "experiment=smoke", f"strategy={name}", *settings, "logger=csv", "callbacks=quiet", f"data.cache_dir={cache}",
        "callbacks.checkpoint.save_top_k=-1", "model.config.dropout=0.0",
    ]  # fmt: skip
    whole = danon_train(tmp_path, *common, "name=whole")
    assert whole.returncode == 0, whole.stderr
    [middle] = (tmp_path / "runs/whole/version_0/checkpoints").glob("step3*.ckpt")
    rest = danon_train(tmp_path, *common, "name=rest", f"ckpt_path='{middle}'")
    assert rest.returncode == 0, rest.stderr
    expected = losses(tmp_path / "runs/whole/version_0")
    assert sorted(expected) == [0, 1, 2, 3, 4, 5]
    assert losses(tmp_path / "runs/rest/version_0") == {step: expected[step] for step in (3, 4, 5)}


WITHOUT_CLIPPING = "trainer.gradient_clip_val=null"


@pytest.mark.parametrize(
    ("strategy", "overrides"),
    [
        pytest.param("hybrid_powersgd", [], marks=slow),
        ("hybrid_sign", ["model.optimizer.name=onebit_adam", "model.optimizer.freeze_step=3", WITHOUT_CLIPPING]),
        pytest.param(
            "hybrid_dgc", ["model.optimizer.name=sgd", "model.optimizer.momentum=0", WITHOUT_CLIPPING], marks=slow
        ),
        pytest.param("pipeline", [], marks=slow),
        ("pipeline", ["strategy.schedule=interleaved_1f1b", "model.config.num_layers=4"]),
    ],
)
def test_presets_train(tmp_path, cache, strategy, overrides):
    quiet = ["logger=csv", "callbacks=quiet", f"data.cache_dir={cache}"]
    done = danon_train(tmp_path, "experiment=smoke", f"strategy={strategy}", *overrides, *quiet)
    assert done.returncode == 0, done.stderr
    loss = losses(tmp_path / "runs/msra/version_0")
    assert float(loss[5]) < float(loss[0])


def test_a_compression_that_would_spoil_training_is_refused(tmp_path, cache):
    done = danon_train(tmp_path, "experiment=smoke", "strategy=hybrid_sign", f"data.cache_dir={cache}")
    assert done.returncode != 0
    assert re.search("compression='sign' cannot be used with AdamW.*Use danon_lightning.optim.OneBitAdam", done.stderr)


OWN_STRATEGY = "defaults:\n  - hybrid\ncompression:\n  _target_: my_package.TernaryCompressor\n"


@pytest.mark.slow
def test_a_compressor_of_ones_own_is_allowed_by_its_package(tmp_path, cache, monkeypatch):
    page = Path(__file__).parents[1] / "docs/compressors.md"
    [example] = [b for b in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if "class Ternary" in b]
    assert OWN_STRATEGY in page.read_text()
    (tmp_path / "my_package.py").write_text(example)
    (tmp_path / "conf/strategy").mkdir(parents=True)
    (tmp_path / "conf/strategy/ternary.yaml").write_text(OWN_STRATEGY)
    common = ["--config-dir", "conf", "experiment=smoke", "strategy=ternary", f"data.cache_dir={cache}"]
    refused = danon_train(tmp_path, *common)
    assert refused.returncode != 0
    assert "_target_=my_package.TernaryCompressor is not a class of the allowed packages" in refused.stderr
    monkeypatch.setenv("DANON_ALLOWED_PACKAGES", "my_package")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = danon_train(tmp_path, *common)
    assert done.returncode == 0, done.stderr
    assert "ternary, all to all" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=fulll"], "Available options in 'model':\n\tdala\n\tfull\n\tinfinite\n\tmsra\n"),
        (["trainer.devics=2"], "trainer has: accelerator,"),
        pytest.param(["modle=msra"], "The config has: callbacks, ckpt_path,", marks=slow),
        pytest.param(["strategy.compression=zip"], "error in strategy: compression='zip' is not known", marks=slow),
        (["model.config.num_heads=3"], "error in model: hidden_size=128 must be a multiple of num_heads=3"),
        pytest.param(["data.global_batch_size=0"], "error in data: global_batch_size=0", marks=slow),
    ],
)
def test_a_mistyped_command_says_what_would_have_been_right(tmp_path, overrides, said):
    done = danon_train(tmp_path, *overrides)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.global_batch_size=5", "data.val_windows=5"], "global_batch_size=5"),
        pytest.param(
            ["data.context_length=50000000", "model.config.max_sequence_length=64"], "the training part has", marks=slow
        ),
        pytest.param(["data=files", "data.path={empty}"], "pattern='**' matches no file", marks=slow),
    ],
)
def test_data_that_does_not_fit_is_an_error_on_every_rank_and_no_hang(tmp_path, cache, overrides, said):
    (tmp_path / "empty").mkdir()
    start = time.monotonic()
    done = danon_train(
        tmp_path,
        "experiment=smoke",
        f"data.cache_dir={cache}",
        *(override.format(empty=tmp_path / "empty") for override in overrides),
    )
    assert done.returncode != 0
    assert done.stderr.count(said) >= 2, done.stderr  # once on each rank
    assert "Connection closed by peer" not in done.stderr
    assert time.monotonic() - start < 60


def test_help_explains_itself(tmp_path):
    done = danon_train(tmp_path, "--help")
    assert done.returncode == 0
    for said in ("model: ", "msra", "strategy: ", "hybrid_int8", "danon-train model=full", "torchrun --nnodes=2"):
        assert said in done.stdout


@pytest.mark.slow
def test_a_users_own_project_composes_with_the_configs(tmp_path, cache):
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - smoke\n  - override /model: full\nname: mine\ntrainer:\n  max_steps: 2\n"
        "  devices: 1\n  val_check_interval: 2\n"
    )
    done = danon_train(tmp_path, "--config-dir", "conf", "experiment=mine", f"data.cache_dir={cache}")
    assert done.returncode == 0, done.stderr
    assert "FullAttentionLightning" in done.stdout
    assert (tmp_path / "runs/mine/version_0/checkpoints/last.ckpt").is_file()


OWN_APPLICATION = """
import hydra
from danon_lightning.train import train

@hydra.main(version_base="1.3", config_path="conf", config_name="main")
def main(config):
    train(config)

main()
"""
OWN_CONFIG = """
defaults:
  - data: stdlib
  - model: full
  - strategy: hybrid
  - trainer: cpu
  - callbacks: quiet
  - logger: csv
  - experiment: smoke
  - _self_
name: own
output_dir: out
seed: 1
ckpt_path: null
trainer:
  devices: 1
  max_steps: 2
  val_check_interval: 2
hydra:
  searchpath: [pkg://danon_lightning.configs]
"""


@pytest.mark.slow
def test_a_users_own_application_composes_with_the_groups(tmp_path, cache):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/main.yaml").write_text(OWN_CONFIG)
    (tmp_path / "app.py").write_text(OWN_APPLICATION)
    done = subprocess.run(
        [sys.executable, "app.py", f"data.cache_dir={cache}"], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    [checkpoint] = tmp_path.rglob("last.ckpt")
    assert checkpoint.is_relative_to(tmp_path / "out/own")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "danon_lightning_evil.x",
        "lightning.pytorch.trainer.trainer.torch.load",  # leads through an allowed package, but is not of it
        "danon_lightning.train.os.system",
        "danon_lightning.models.MSRALightning.load_from_checkpoint",  # no class
        "danon_lightning.testing.processes.subprocess.Popen",
        5,
        None,
    ],
)
def test_configs_may_only_name_classes_of_allowed_packages(target):
    config = {"a": {"_target_": "danon_lightning.models.MSRALightning"}, "b": [{"_target_": target}]}
    with pytest.raises(ValueError, match=rf"_target_={target} is not a class of.*DANON_ALLOWED_PACKAGES"):
        check_targets(config, ALLOWED_PACKAGES)


@pytest.mark.parametrize("variant", ["msra", "dala", "ucsa", "infinite", "super_hybrid", "full"])
def test_every_model_can_be_chosen(variant):
    """Also with the settings of the experiment that goes with it."""
    experiments = [variant + "_text"] if variant != "full" else []
    for overrides in ([f"model={variant}"], *([f"experiment={name}"] for name in experiments)):
        with initialize_config_dir(str(CONFIGS), version_base=None):
            config = compose("train", overrides=["name=test", *overrides])
        module = instantiate(config.model)
        assert module.config == type(module)(OmegaConf.to_container(config.model.config, resolve=True)).config
        assert module.model(torch.zeros(1, 40, dtype=torch.int64)).last_hidden_state.isfinite().all()
        if overrides[0].startswith("experiment"):
            assert module.config.hidden_size == 96 and module.config.max_sequence_length == 512
        # Checkpoints hold plain values only.
        file = io.BytesIO()
        torch.save(dict(module.hparams), file)
        file.seek(0)
        assert torch.load(file, weights_only=True)["config"]["num_layers"] == module.config.num_layers


def test_every_shipped_config_is_allowed_and_more_can_be():
    for file in CONFIGS.glob("*/*.yaml"):
        if file.parent.name != "experiment":
            check_targets(OmegaConf.to_container(OmegaConf.load(file)), ALLOWED_PACKAGES)
    config = {"_target_": "fractions.Fraction"}
    with pytest.raises(ValueError):
        check_targets(config, ALLOWED_PACKAGES)
    check_targets(config, (*ALLOWED_PACKAGES, "fractions"))
