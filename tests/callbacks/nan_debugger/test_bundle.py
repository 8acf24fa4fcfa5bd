"""A bundle holds what it takes to see the same fault again, elsewhere; and nothing but data."""

import json
import os
import pickle
import stat
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import fault_zoo
import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from danon_lightning.callbacks.nan_debugger import command_line
from danon_lightning.callbacks.nan_debugger.bundle import BundleError, Step, read_bundle, write_bundle
from danon_lightning.callbacks.nan_debugger.command_line import main
from danon_lightning.callbacks.nan_debugger.plain import NotPlainError, from_plain, to_plain
from danon_lightning.callbacks.nan_debugger.random_state import random_state
from danon_lightning.callbacks.nan_debugger.replay import replay_step


def failed(module, batch, **options):
    """A step, and the origin of what is bad in it."""
    step = Step(batch, 3, random_state(), global_step=7, **options)
    return step, replay_step(module, batch, 3, rng=step.rng, context=step.context).origin


def poisoned_boring():
    module = BoringModel()
    with torch.no_grad():
        module.layer.weight[1, 2] = torch.nan
    return module


def test_a_fresh_process_reproduces_the_operation_and_its_statistics(tmp_path):
    torch.manual_seed(4)
    module = fault_zoo.unlucky()
    step, origin = failed(module, fault_zoo.batch())
    assert origin.name == "div"
    torch.rand(5)
    path = write_bundle(tmp_path / "bundle", module, step, origin, include_data=True)
    command = [sys.executable, "-m", "danon_lightning.callbacks.nan_debugger.command_line", str(path)]
    command += ["--module", "fault_zoo:unlucky", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same operation, same statistics" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["reproduced"]
    assert found["origin"] == json.loads(json.dumps(origin.to_dict())) | {"location": found["origin"]["location"]}


def test_a_class_of_an_allowed_package_is_made_with_its_weights(tmp_path, capsys):
    module = poisoned_boring()
    step, origin = failed(module, torch.ones(2, 32))
    path = write_bundle(tmp_path / "bundle", module, step, origin, include_data=True)
    assert main([str(path)]) == 0
    assert "layer.weight" in capsys.readouterr().out


def test_another_outcome_is_told(tmp_path, capsys):
    module = poisoned_boring()
    step, origin = failed(module, torch.ones(2, 32))
    path = write_bundle(tmp_path / "bundle", BoringModel(), step, origin, include_data=True)
    assert main([str(path)]) == 1
    assert "nothing was reproduced" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("os:system", "--allow os"), ("torch.nn:Linear", "--allow torch"), ("lightning.pytorch:Trainer", "--allow")],
)
def test_a_bundle_does_not_choose_what_is_imported(tmp_path, capsys, name, remedy):
    module = poisoned_boring()
    step, origin = failed(module, torch.ones(2, 32))
    path = write_bundle(tmp_path / "bundle", module, step, origin, include_data=True)
    facts = json.loads((path / "bundle.json").read_text())
    facts["module"]["class"] = name
    (path / "bundle.json").write_text(json.dumps(facts))
    assert main([str(path)]) == 2
    assert remedy in capsys.readouterr().err


def test_data_are_left_out_unless_asked_for(tmp_path, capsys):
    module = poisoned_boring()
    step, origin = failed(module, torch.ones(2, 32))
    path = write_bundle(tmp_path / "bundle", module, step, origin)
    assert not (path / "batch.pt").exists()
    assert main([str(path)]) == 2
    assert "include_data=True" in capsys.readouterr().err


def test_nobody_else_may_read_it_and_names_are_never_taken_twice(tmp_path):
    module = poisoned_boring()
    step, origin = failed(module, torch.ones(2, 32))
    paths = [write_bundle(tmp_path / "bundle", module, step, origin, include_data=True) for _ in range(3)]
    assert [path.name for path in paths] == ["bundle", "bundle-2", "bundle-3"]
    assert sorted(os.listdir(tmp_path)) == ["bundle", "bundle-2", "bundle-3"]
    assert stat.S_IMODE(paths[0].stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in paths[0].iterdir()} == {0o600}


def test_what_does_not_fit_is_left_out_and_said_so(tmp_path):
    module = poisoned_boring()
    step, origin = failed(module, torch.ones(2, 32))
    module.register_buffer("large", torch.zeros(2**20))
    path = write_bundle(tmp_path / "bundle", module, step, origin, include_data=True, max_bytes=2**20)
    bundle = read_bundle(path)
    assert bundle.weights is None and bundle.batch is not None
    assert "do not fit" in bundle.facts["left_out"]["weights"]
    assert sum(file.stat().st_size for file in path.iterdir()) < 2**20


def test_nothing_is_left_of_a_bundle_that_cannot_be_written(tmp_path, monkeypatch):
    module = poisoned_boring()
    step, origin = failed(module, torch.ones(2, 32))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_bundle(tmp_path / "bundle", module, step, origin)
    assert not os.listdir(tmp_path)


def test_a_pickle_is_refused(tmp_path):
    module = poisoned_boring()
    step, origin = failed(module, torch.ones(2, 32))
    path = write_bundle(tmp_path / "bundle", module, step, origin, include_data=True)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    (path / "batch.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BundleError, match="cannot be read"):
        read_bundle(path)
    assert not (tmp_path / "run").exists()
    assert main([str(tmp_path / "absent")]) == 2


def test_optimizer_precision_modes_and_settings_are_kept(tmp_path):
    class Own(BoringModel):
        def __init__(self, width: int, function=torch.relu):
            super().__init__()
            self.save_hyperparameters()
            self.norm = nn.BatchNorm1d(width)

    module = Own(2)
    module.norm.eval()
    module.layer.bias.requires_grad_(False)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 32)).sum().backward()
    optimizer.step()
    context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    step, origin = failed(module, torch.ones(2, 32), context=context)
    path = write_bundle(tmp_path / "bundle", module, step, origin, optimizers=[optimizer])
    bundle = read_bundle(path)
    described = bundle.facts["module"]
    assert bundle.facts["precision"] == {"autocast": "bfloat16", "default_dtype": "float32"}
    assert described["hparams"] == {"width": 2} and described["hparams_omitted"] == ["function"]
    assert described["evaluating"] == ["norm"] and described["frozen"] == ["layer.bias"]
    assert torch.equal(bundle.optimizer[0]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Example:
    x: torch.Tensor
    name: str


def test_batches_keep_their_shape_without_their_classes(tmp_path):
    base = torch.arange(1000.0)
    tree = {
        "pair": Pair(base[:3], [1, 2.5, None, "text", True]),
        "example": Example(torch.ones(2, dtype=torch.float64), "name"),
        7: (numpy.arange(3), torch.float16, torch.zeros(2, 2).t().to_sparse()),
    }
    torch.save(to_plain(tree), tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < 6000, "not what the tensor is a view of"
    found = from_plain(torch.load(tmp_path / "file", weights_only=True))
    first, second = found["pair"]
    assert first is found["pair"].first and torch.equal(first, base[:3]) and second == tree["pair"].second
    assert found["example"].name == "name" and found["example"].x.dtype == torch.float64
    assert isinstance(found[7], tuple) and found[7][0].tolist() == [0, 1, 2] and found[7][1] is torch.float16
    assert found[7][2].is_sparse


def test_what_is_no_data_is_refused_by_its_place(tmp_path):
    with pytest.raises(NotPlainError, match=r"batch\['model'\] is of lightning"):
        to_plain({"x": torch.ones(1), "model": BoringModel()})
    module = poisoned_boring()
    step, origin = failed(module, torch.ones(2, 32))
    path = write_bundle(tmp_path / "bundle", module, Step([object()], 0, step.rng), origin, include_data=True)
    assert "batch[0] is of builtins.object" in read_bundle(path).facts["left_out"]["batch"]


def test_a_step_may_ask_its_trainer(tmp_path):
    module = poisoned_boring()
    step, origin = failed(module, torch.ones(2, 32), epoch=2)
    path = write_bundle(tmp_path / "bundle", module, step, origin, include_data=True)
    made = command_line.build_module(read_bundle(path), None, ("lightning.pytorch",), torch.device("cpu"))
    assert isinstance(made.trainer, pl.Trainer)
    assert (made.global_step, made.current_epoch) == (7, 2)
