"""What compression leaves out: nothing is lost, and momentum correction does what it says."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from danon_lightning.strategies import ErrorFeedback, Int8Compressor, Mesh, TopKCompressor
from danon_lightning.strategies.communication import get_compressor
from danon_lightning.strategies.communication.error_feedback import resolve_error_feedback
from danon_lightning.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbour with it
from plain_module import (  # noqa: E402
    SHAPES,
    Given,
    emulated_mesh,
    exchange,
    give,
    given_gradients,
    one_of_each,
)


@pytest.fixture
def alone(tmp_path):
    """This process as the only rank of a job."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    return Mesh(1, 1, 0)


# ---- conservation


def check_conservation(folder):
    """Σ delivered + what all ranks keep = Σ mean gradients."""
    for nodes, ranks, feedback in [
        (1, 2, ErrorFeedback()),
        (1, 3, ErrorFeedback(flush_every=8)),
        (2, 2, ErrorFeedback(flush_every=8)),
    ]:
        with emulated_mesh(nodes, ranks, folder) as mesh:
            if mesh is None:
                continue
            means = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
            for step in range(20):
                for rank in range(mesh.world_size):
                    for name, gradient in given_gradients(step, rank).items():
                        means[name] += gradient.double() / mesh.world_size
            for kind, compressor in one_of_each().items():
                label = f"{mesh}, {kind}, {feedback}"
                delivered = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
                with exchange(mesh, compressor, error_feedback=feedback) as (ddp, com):
                    for step in range(20):
                        for name, gradient in give(ddp, given_gradients(step, mesh.rank)).items():
                            delivered[name] += gradient
                    state = com.state_dict()
                if mesh.rank:
                    continue
                kept = state["mean"]["residual"]
                compressed = {name for name, shape in SHAPES.items() if math.prod(shape) >= 4096}
                assert kept.keys() == compressed - ({"deep"} if kind == "powersgd" else set()), label
                for name, mean in means.items():
                    total = delivered[name]
                    if name in kept:
                        assert kept[name].any(), f"{label}, {name}: nothing is kept"
                        total = total + kept[name].view_as(mean)
                    assert (total - mean).norm() <= 1e-5 * mean.norm(), f"{label}, {name}"


@pytest.mark.slow
def test_nothing_is_lost_over_twenty_steps(tmp_path):
    run_distributed(check_conservation, 4, str(tmp_path), timeout=200)


def test_a_flush_delivers_all_that_was_kept(alone):
    for name, compressor in one_of_each().items():
        with exchange(alone, compressor, error_feedback=ErrorFeedback(flush_every=3)) as (ddp, communicator):
            total = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
            norms = []
            for step in range(6):
                for key, gradient in give(ddp, given_gradients(step, 0)).items():
                    total[key] += gradient - given_gradients(step, 0)[key]
                norms.append(communicator.stats()["residual_norm"])
            assert [norm > 0 for norm in norms] == [True, True, False] * 2, f"{name}: {norms}"
            assert all(difference.abs().max() < 1e-4 for difference in total.values()), name


def test_old_errors_fade_with_a_decay(alone):
    norms = {}
    for decay in (1.0, 0.5, 0.0):
        with exchange(alone, TopKCompressor(0.01), error_feedback=ErrorFeedback(decay=decay)) as (ddp, communicator):
            for step in range(10):
                give(ddp, given_gradients(step, 0))
            norms[decay] = communicator.stats()["residual_norm"]
    assert norms[0.0] < norms[0.5] < 0.5 * norms[1.0]


def test_a_compressor_that_gives_up_its_state_starts_afresh(alone):
    """Top-K's threshold, where gradients get much smaller from one step to the next."""
    with exchange(alone, TopKCompressor(0.1), error_feedback=False) as (ddp, _):
        shares = []
        for scale in (1.0, 1.0, 1e-3, 1e-3, 1e-3):
            batch = {name: gradient * scale for name, gradient in given_gradients(0, 0).items()}
            shares.append(float((give(ddp, batch)["first"] != 0).float().mean()))
    assert shares[2] == 0  # nothing reaches the old one
    assert shares[3:] == pytest.approx([0.1, 0.1], rel=0.2)


# ---- loss scaling


def test_the_loss_scale_changes_nothing_and_residuals_are_kept_without_it(alone):
    """To the bit for powers of two, also where it changes from step to step."""
    for name, compressor in one_of_each().items():
        for feedback in (True, ErrorFeedback(momentum=0.5)):
            (steps, norm), (other_steps, other_norm) = [
                train_with_loss_scales(alone, compressor, feedback, scales)
                for scales in ([1.0] * 5, [2.0**8, 2.0**12, 2.0**3, 2.0**9, 1.0])
            ]
            assert norm == other_norm > 0, name
            for step, (one, other) in enumerate(zip(steps, other_steps, strict=True)):
                for key in SHAPES:
                    assert torch.equal(one[key], other[key]), f"{name}, {feedback}, step {step}, {key}"


def train_with_loss_scales(mesh, compressor, feedback, scales):
    """What was delivered, without the scale, and the norm of what is kept."""
    current, steps = [], []
    with exchange(mesh, compressor, error_feedback=feedback, loss_scale=lambda: current[-1]) as (ddp, communicator):
        for step, scale in enumerate(scales):
            current.append(scale)
            delivered = give(ddp, given_gradients(step, mesh.rank), scale)
            steps.append({key: tensor / scale for key, tensor in delivered.items()})
        return steps, communicator.stats()["residual_norm"]


# ---- momentum correction


def check_momentum_correction(folder):
    for nodes, ranks in [(1, 2), (2, 2)]:
        with emulated_mesh(nodes, ranks, folder) as mesh:
            if mesh is None:
                continue
            check_full_density(mesh)
            check_clipping(mesh)


def check_full_density(mesh):
    """With all elements sent it is SGD with momentum."""
    momentum = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    with exchange(mesh, TopKCompressor(1.0), error_feedback=ErrorFeedback(momentum=0.9)) as (ddp, _):
        for step in range(10):
            gradients = [given_gradients(step, rank) for rank in range(mesh.world_size)]
            for name, delivered in give(ddp, gradients[mesh.rank]).items():
                mean = torch.stack([g[name].double() for g in gradients]).mean(dim=0)
                momentum[name] = 0.9 * momentum[name] + mean
                error = (delivered - momentum[name]).abs().max()
                assert error <= 1e-6 * momentum[name].abs().max(), f"{mesh}, step {step}, {name}"


def check_clipping(mesh):
    """Ranks have the same gradient here, so that the clipped shares c/√M of M nodes sum to c·√M."""
    clip, nodes = 0.5, mesh.num_nodes if mesh.num_nodes > 1 else mesh.world_size
    for compressor in (TopKCompressor(1.0), TopKCompressor(0.1), Int8Compressor(), "powersgd"):
        with exchange(mesh, compressor, error_feedback=ErrorFeedback(clip_norm=clip)) as (ddp, communicator):
            delivered = give(ddp, given_gradients(0, 0))
            state = communicator.state_dict()
        if mesh.rank:
            continue
        assert delivered["norm"].norm() == pytest.approx(clip, rel=1e-4)  # dense: the mean itself is clipped
        for name, residual in state["mean"]["residual"].items():
            norm = (delivered[name].flatten() + residual).norm()  # what was left of it before it was coded
            limit = clip * math.sqrt(nodes)
            label = f"{mesh}, {get_compressor(compressor).name}, {name}: {norm}"
            assert 0.95 * limit < norm < limit * 1.0001, label


@pytest.mark.slow
def test_momentum_correction_without_sparsity_is_momentum_and_clips_each_parameter(tmp_path):
    run_distributed(check_momentum_correction, 4, str(tmp_path), timeout=120)


def test_momentum_correction_of_a_sparse_gradient_follows_the_published_algorithm(alone):
    """u ← m·u + g; v ← v + u; where an element is sent, u and v are cleared (Lin et al. 2018, algorithm 1)."""
    with exchange(alone, TopKCompressor(0.05), error_feedback=ErrorFeedback(momentum=0.9)) as (ddp, communicator):
        u = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        v = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for step in range(12):
            for name, delivered in give(ddp, given_gradients(step, 0)).items():
                u[name] = 0.9 * u[name] + given_gradients(step, 0)[name]
                if name not in ("first", "table", "deep", "last"):
                    torch.testing.assert_close(delivered, u[name], rtol=1e-6, atol=1e-6)
                    continue
                v[name] += u[name]
                sent = delivered != 0
                assert 0.03 < sent.float().mean() <= 0.051, f"step {step}, {name}"
                torch.testing.assert_close(delivered[sent], v[name][sent], rtol=1e-6, atol=1e-6)
                u[name][sent] = v[name][sent] = 0
        kept = communicator.state_dict()["mean"]
        for kind, values in (("residual", v), ("momentum", u)):
            for name, tensor in kept[kind].items():
                torch.testing.assert_close(tensor.view_as(values[name]), values[name], rtol=1e-5, atol=1e-5)


def test_momentum_correction_of_quantized_gradients_keeps_the_largest_elements_momentum(alone):
    """All elements are sent at every step, so no momentum is stale; that a code is exact here and there is chance."""
    for compressor in ("int8", "int4", "fp16"):
        with exchange(alone, compressor, error_feedback=ErrorFeedback(momentum=0.9)) as (ddp, _):
            momentum = total = torch.zeros(SHAPES["first"])
            expected = torch.zeros(SHAPES["first"])
            for _ in range(60):
                momentum = 0.9 * momentum + given_gradients(0, 0)["first"]
                expected = expected + momentum
                total = total + give(ddp, given_gradients(0, 0))["first"]
        worst = (total - expected).abs().max() / expected.abs().max()
        assert worst < 0.2, f"{compressor}: {worst}"


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.5}, r"decay=1.5 must lie in \[0, 1\]; 1 keeps errors in full"),
        ({"decay": -0.1}, r"decay=-0.1 must lie in \[0, 1\]"),
        ({"decay": math.nan}, r"decay=nan must lie in \[0, 1\]"),
        ({"flush_every": 0}, r"flush_every=0 must be at least 1 step, or None for never"),
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\), or be None for no momentum correction"),
        ({"momentum": -0.5}, r"momentum=-0.5 must lie in \[0, 1\)"),
        ({"clip_norm": 0.0}, r"clip_norm=0.0 must be positive, or None for no clipping"),
        ({"clip_norm": -1.0}, r"clip_norm=-1.0 must be positive"),
        ({"clip_norm": math.nan}, r"clip_norm=nan must be positive"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        ErrorFeedback(**arguments)


@pytest.mark.parametrize("value", ["yes", None, 1, 0.9, "True"])
def test_anything_else_is_no_error_feedback(value):
    with pytest.raises(ValueError, match=r"error_feedback=.* must be True, False, 'auto' or an ErrorFeedback"):
        resolve_error_feedback(value, get_compressor("int8"))


def test_auto_means_what_the_compressor_needs():
    needs = {"fp16": False, "bf16": False, "int8": False, "int4": False, "sign": True, "topk": True, "randomk": True}
    for name, needed in {**needs, "powersgd": True}.items():
        resolved = resolve_error_feedback("auto", get_compressor(name))
        assert resolved == (ErrorFeedback() if needed else None), name
    own = ErrorFeedback(decay=0.5)
    assert resolve_error_feedback(own, get_compressor("int8")) is own
    assert resolve_error_feedback(True, get_compressor("int8")) == ErrorFeedback()
    assert resolve_error_feedback(False, get_compressor("topk")) is None


def test_dense_gradients_have_no_error():
    assert resolve_error_feedback("auto", None) is resolve_error_feedback(False, None) is None
    for asked in (True, ErrorFeedback()):
        with pytest.raises(ValueError, match="error_feedback needs a compression: dense gradients have no error"):
            resolve_error_feedback(asked, None)


def test_dense_parameters_of_any_float_type_get_the_same_momentum(alone):
    shapes = {"bias": (50,)}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = Given(shapes, dtype)
        with exchange(alone, "topk", model=model, error_feedback=ErrorFeedback(momentum=0.5)) as (ddp, _):
            gradient = torch.full((50,), 2.0, dtype=dtype)
            given = [float(give(ddp, {"bias": gradient})["bias"][0]) for _ in range(3)]
        assert given == [2.0, 3.0, 3.5]
