"""What is measured of a module, against what can be counted."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from planned_models import CLASSES, LAYERS, WIDTH, Single, Stack, batch

from danon_lightning.planner import measure
from danon_lightning.planner.profile import Affine
from danon_lightning.planner.profiling import resized
from danon_lightning.strategies.pipeline.recording import Cuts

ROW = WIDTH * 4  # bytes of a sample's activation


@pytest.fixture(scope="module")
def profile():
    return measure(Stack(), batch(), (4, 16), runs=1)


def test_a_line_goes_through_its_points():
    line = Affine.through((2, 10.0), (6, 18.0))
    assert line(2) == 10 and line(6) == 18 and line(0) == 6
    assert Affine.through((2, 10.0), (6, 8.0))(100) == 8  # only noise falls
    assert Affine(-5.0, 1.0)(2) == 0


@pytest.mark.parametrize("samples", [4, 10, 16])
def test_kept_activations_are_those_that_can_be_counted(profile, samples):
    head, *blocks, tail = profile.parts
    assert len(blocks) == LAYERS
    assert head.kept(samples) == samples * ROW  # what the first block gets
    for block in blocks:
        assert block.kept(samples) == 2 * samples * ROW or block.kept(samples) == samples * ROW
        assert block.entering(samples) == block.returned(samples) == samples * ROW
        assert block.is_block and block.obstacle is None
    # The log-probabilities at least.
    assert tail.kept(samples) >= samples * CLASSES * 4
    # A gradient enters, one leaves, and that of the weight is added to what is there.
    assert blocks[1].backward_peak(samples) >= blocks[1].kept(samples) + samples * ROW


def test_the_state_of_the_optimizer_is_counted(profile):
    assert profile.optimizer.name == "Adam"
    assert profile.optimizer.state_bytes_per_element == pytest.approx(8, rel=0.02)
    assert profile.optimizer.seconds_per_element > 0


def test_times_are_there_for_all_parts(profile):
    assert all(part.forward(16) > 0 for part in profile.parts)
    assert all(part.backward(16) > 0 for part in profile.parts)
    assert profile.stage_seconds >= 0 and profile.count_seconds > 0


def test_parts_and_parameters_of_stages(profile):
    cuts = Cuts((0, 1, LAYERS))
    assert list(profile.parts_of(cuts, 0)) == [0, 1]
    assert list(profile.parts_of(cuts, 1)) == [2, 3, 4, 5]
    first, last = ([name for name, _ in held] for held in profile.parameters_of(cuts))
    assert first == ["entrance.weight", "entrance.bias", "layers.0.0.weight", "layers.0.0.bias"]
    assert last[-1] == "head.bias" and len(last) == 2 * LAYERS
    assert [profile.part_of(name) for name in ("entrance.bias", "layers.0.0.weight", "head.weight")] == [0, 1, 5]


def test_the_module_stays_as_it_is():
    module = Stack()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    measure(module, batch(8), (2, 4), runs=1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert module._trainer is None
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_cut_says_why():
    profile = measure(Single(), batch(8), (2, 4), runs=1)
    assert profile.blocks is None and len(profile.parts) == 1
    assert "pipeline_layers" in profile.no_pipeline
    assert profile.parts[0].forward(4) > 0 and profile.parts[0].backward(4) > 0
    with pytest.raises(ValueError, match="'nowhere' is not a module"):
        measure(Stack(), batch(8), (2, 4), pipeline_layers="nowhere", runs=1)
    with pytest.raises(ValueError, match="second the greater"):
        measure(Stack(), batch(8), (4, 4))


def test_batches_are_cut_and_repeated():
    x, labels = resized(batch(4), 6)
    assert len(x) == len(labels) == 6
    assert torch.equal(x[4:], x[:2])
    assert len(resized(batch(4), 3)[0]) == 3
