"""What checkpoints keep of the exchange: exactly, on the same layout; in sum, on any other."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from danon_lightning.strategies import ErrorFeedback, GradientCommunicator, Int4Compressor, Mesh, PowerSGDCompressor
from danon_lightning.strategies.communication import messages
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

LAYOUTS = [(2, 1), (1, 3), (2, 2)]
LIKE_OTHERS = {"fp16", "int8 stochastic", "topk warm-up"}
DGC = ErrorFeedback(momentum=0.7, flush_every=6)


def cases():
    ways = one_of_each()
    plain = {name: (compressor, True) for name, compressor in ways.items() if name not in LIKE_OTHERS}
    return {**plain, "topk, momentum": (ways["topk"], DGC), "int8, momentum": (ways["int8"], DGC)}


@pytest.fixture
def alone(tmp_path):
    """This process as the only rank of a job."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    return Mesh(1, 1, 0)


def read(file):
    return torch.load(file, weights_only=True)


# ---- to the bit


def run_and_save(folder):
    """Eight steps; the state after four of them, by rank 0, and the gradients of the last four, by every rank."""
    for nodes, ranks in LAYOUTS:
        with emulated_mesh(nodes, ranks, folder) as mesh:
            if mesh is None:
                continue
            for name, (compressor, feedback) in cases().items():
                with exchange(mesh, compressor, error_feedback=feedback) as (ddp, communicator):
                    for step in range(4):
                        give(ddp, given_gradients(step, mesh.rank))
                    state = communicator.state_dict(per_rank=True)
                    assert (state is None) == (mesh.rank != 0)
                    if state is not None:
                        torch.save(state, f"{folder}/{mesh}, {name}")
                    rest = [give(ddp, given_gradients(step, mesh.rank)) for step in range(4, 8)]
                torch.save(rest, f"{folder}/{mesh}, {name}, rest of {mesh.rank}")


def load_and_go_on(folder):
    """In new processes, with new buckets."""
    for nodes, ranks in LAYOUTS:
        with emulated_mesh(nodes, ranks, folder + "/again") as mesh:
            if mesh is None:
                continue
            for name, (compressor, feedback) in cases().items():
                label = f"{mesh}, {name}"
                with exchange(mesh, compressor, error_feedback=feedback) as (ddp, communicator):
                    assert communicator.load_state_dict(read(f"{folder}/{label}")) is True, label
                    for step, expected in enumerate(read(f"{folder}/{label}, rest of {mesh.rank}"), 4):
                        delivered = give(ddp, given_gradients(step, mesh.rank))
                        assert all(torch.equal(delivered[key], expected[key]) for key in SHAPES), f"{label}, {step}"


def test_the_per_rank_form_repeats_an_uninterrupted_run_to_the_bit(tmp_path):
    (tmp_path / "again").mkdir()
    run_distributed(run_and_save, 4, str(tmp_path), timeout=200)
    run_distributed(load_and_go_on, 4, str(tmp_path), timeout=200)


# ---- on another layout


def check_other_layouts(folder):
    moves = [((1, 2), (1, 3)), ((2, 2), (1, 2)), ((1, 4), (1, 2))]
    for index, (before, after) in enumerate(moves):
        per_rank = index % 2 == 1  # which is then summed up when it is loaded
        with emulated_mesh(*before, folder) as mesh:
            for name, (compressor, feedback) in cases().items() if mesh is not None else ():
                with exchange(mesh, compressor, error_feedback=feedback) as (ddp, communicator):
                    for step in range(4):
                        give(ddp, given_gradients(step, mesh.rank))
                    state, mean = communicator.state_dict(per_rank=per_rank), communicator.state_dict()
                    if mesh.rank == 0:
                        torch.save((state, mean), f"{folder}/{index} {name}")
        with emulated_mesh(*after, folder) as mesh:
            for name, (compressor, feedback) in cases().items() if mesh is not None else ():
                go_on_elsewhere(mesh, f"{before} to {mesh}, {name}", compressor, feedback, f"{folder}/{index} {name}")


def go_on_elsewhere(mesh, label, compressor, feedback, file, first_step=4):
    state, mean = read(file)
    mean = mean["mean"]
    assert mean["residual"].keys() >= {"first", "table", "last"}, label
    with exchange(mesh, compressor, error_feedback=feedback) as (ddp, communicator):
        assert communicator.load_state_dict(state) is False, label
        total = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in SHAPES.items()}
        due = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in SHAPES.items()}
        for step in range(first_step, first_step + 3):
            delivered = give(ddp, given_gradients(step, mesh.rank))
            for key in SHAPES:
                total[key] += delivered[key]
                for rank in range(mesh.world_size):
                    due[key] += given_gradients(step, rank)[key].double() / mesh.world_size
            if feedback is DGC:
                break  # step 5 flushes: see below
        after = communicator.state_dict()
    if mesh.rank:
        return
    for key, owed in mean["residual"].items():
        kept = after["mean"]["residual"][key].view(SHAPES[key])
        expected = owed.double().view(SHAPES[key]) + due[key]
        if feedback is DGC:
            expected += 0.7 * mean["momentum"][key].double().view(SHAPES[key])
        assert (total[key] + kept - expected).norm() <= 1e-6 * expected.norm(), f"{label}, {key}"
    if feedback is DGC:
        for key, momentum in mean["dense_momentum"].items():
            expected = 0.7 * momentum.view(SHAPES[key]) + due[key]
            torch.testing.assert_close(total[key], expected, rtol=1e-5, atol=1e-5, msg=f"{label}, {key}")


@pytest.mark.slow
def test_on_another_layout_the_sum_of_all_residuals_is_preserved(tmp_path):
    run_distributed(check_other_layouts, 4, str(tmp_path), timeout=200)


@pytest.mark.parametrize("name", ["int8", "topk, momentum"])
def test_regions_of_another_size_preserve_the_sum_too(alone, name, monkeypatch, tmp_path):
    """As where a run that began on CPUs goes on on GPUs, whose regions are larger."""
    compressor, feedback = cases()[name]
    with exchange(alone, compressor, error_feedback=feedback) as (ddp, communicator):
        for step in range(4):
            give(ddp, given_gradients(step, 0))
        torch.save((communicator.state_dict(per_rank=True), communicator.state_dict()), tmp_path / "state")
    monkeypatch.setattr(messages, "_CPU_REGION_NUMEL", 2048)
    go_on_elsewhere(alone, name, compressor, feedback, tmp_path / "state")


def test_a_complex_parameter_keeps_its_momentum(alone):
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3, dtype=torch.complex64))
        communicator = GradientCommunicator(ddp, alone, compression="topk", error_feedback=DGC)
        ddp.register_comm_hook(communicator, communicator.hook)
        if states:
            communicator.load_state_dict(states[0])
        ddp(torch.ones(2, 3, dtype=torch.complex64)).abs().sum().backward()
        states.append(communicator.state_dict())
        communicator.close()
    first, second = (state["mean"]["dense_momentum"]["weight"] for state in states)
    assert first.numel() == 18
    torch.testing.assert_close(second, 1.7 * first)


def test_the_mean_form_has_one_copy_of_the_model(alone):
    for name, (compressor, feedback) in cases().items():
        with exchange(alone, compressor, error_feedback=feedback) as (ddp, communicator):
            for step in range(2):
                give(ddp, given_gradients(step, 0))
            mean = communicator.state_dict()["mean"]
        for kind in ("residual", "momentum"):
            assert all(tensor.numel() == torch.Size(SHAPES[key]).numel() for key, tensor in mean[kind].items()), name


def test_what_was_loaded_is_kept_if_it_is_saved_again_before_a_step(alone):
    """Where a run is resumed only to be stopped at once, or its first step is not finite."""
    for name, (compressor, feedback) in cases().items():
        with exchange(alone, compressor, error_feedback=feedback) as (ddp, communicator):
            give(ddp, given_gradients(0, 0))
            state = communicator.state_dict()
        with exchange(alone, compressor, error_feedback=feedback) as (ddp, communicator):
            communicator.load_state_dict(state)
            again = communicator.state_dict()
            assert same_tensors(again["mean"]["residual"], state["mean"]["residual"]), name
            assert same_tensors(again["mean"]["momentum"], state["mean"]["momentum"]), name
            bad = given_gradients(1, 0)
            bad["first"][0, 0] = torch.nan
            give(ddp, bad)
            assert not communicator.finite
            assert same_tensors(communicator.state_dict()["mean"]["residual"], state["mean"]["residual"]), name


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def check_warm_start(folder):
    """After a change of layout, the next checkpoint has the warm start that is in use, not that of the last one."""
    with emulated_mesh(1, 2, folder) as mesh:
        if mesh is not None:
            with exchange(mesh, PowerSGDCompressor(2)) as (ddp, communicator):
                give(ddp, given_gradients(0, mesh.rank))
                if (state := communicator.state_dict()) is not None:
                    torch.save(state, f"{folder}/warm")
    with emulated_mesh(2, 2, folder) as mesh, exchange(mesh, PowerSGDCompressor(2)) as (ddp, communicator):
        old = read(f"{folder}/warm")
        communicator.load_state_dict(old)
        give(ddp, given_gradients(1, mesh.rank))
        if (new := communicator.state_dict()) is not None:
            assert new["mean"]["state"].keys() == old["mean"]["state"].keys()
            for key, state in new["mean"]["state"].items():
                assert not torch.equal(state["q"], old["mean"]["state"][key]["q"]), key

    check_other_blocks(folder)


def check_other_blocks(folder):
    """Per-rank residuals are of no use where parameters are cut elsewhere, and must be shared out anew."""
    with emulated_mesh(1, 2, folder) as mesh:
        if mesh is None:
            return
        with exchange(mesh, Int4Compressor(64), error_feedback=True) as (ddp, communicator):
            give(ddp, given_gradients(0, mesh.rank))
            state, mean = communicator.state_dict(per_rank=True), communicator.state_dict()
            if mesh.rank == 0:
                torch.save((state, mean), f"{folder}/blocks")
        dist.barrier()
        go_on_elsewhere(mesh, "other blocks", Int4Compressor(96), True, f"{folder}/blocks", first_step=1)


def test_memory_follows_its_region_to_another_rank(tmp_path):
    run_distributed(check_warm_start, 4, str(tmp_path))


# ---- what does not fit


def state_after_a_step(mesh, compressor, per_rank, model=None, shapes=SHAPES):
    with exchange(mesh, compressor, error_feedback=True, model=model) as (ddp, communicator):
        give(ddp, given_gradients(0, mesh.rank, shapes))
        return communicator.state_dict(per_rank=per_rank)


@pytest.mark.parametrize("per_rank", [False, True])
def test_the_state_of_another_model_is_refused(alone, per_rank):
    for shapes, message in [
        ({**SHAPES, "first": (97, 130)}, "has 12610 elements for first, but the model has 12480.*another model"),
        ({**SHAPES, "other": (80, 90)}, "has 7200 elements for other, but the model has no such parameter"),
    ]:
        state = state_after_a_step(alone, "int4", per_rank, Given(shapes), shapes)
        with exchange(alone, "int4", error_feedback=True) as (_, communicator):
            with pytest.raises(ValueError, match=message):
                communicator.load_state_dict(state)


def test_the_state_of_another_version_is_refused_with_the_remedy(alone):
    for version in (None, 0, 99):
        state = {**state_after_a_step(alone, "int4", False), "version": version}
        with exchange(alone, "int4", error_feedback=True) as (_, communicator):
            with pytest.raises(ValueError, match=f"has version {version}, expected 1: delete its entry to start with"):
                communicator.load_state_dict(state)


@pytest.mark.parametrize("per_rank", [False, True])
def test_residuals_survive_a_change_of_the_compressor(alone, per_rank):
    """Also one that cuts parameters elsewhere: it cannot go on to the bit, but nothing may be lost."""
    state = state_after_a_step(alone, Int4Compressor(64), per_rank)
    owed = state_after_a_step(alone, Int4Compressor(64), False)["mean"]["residual"]
    for other in (Int4Compressor(96), "topk", "powersgd", "int8"):
        with exchange(alone, other, error_feedback=True) as (ddp, communicator):
            exact = communicator.load_state_dict(state)
            assert not exact or isinstance(other, Int4Compressor)
            delivered = give(ddp, given_gradients(1, 0))
            kept = communicator.state_dict()["mean"]["residual"]
        for key in ("first", "table", "last", "deep"):
            total = delivered[key].flatten() + kept.get(key, 0)  # low rank is no saving for one of them: it goes dense
            due = given_gradients(1, 0)[key].flatten() + owed[key]
            torch.testing.assert_close(total, due, rtol=0, atol=1e-5, msg=f"{other}, {key}")


def test_without_compression_there_is_no_state_and_what_was_kept_is_lost_with_a_warning(alone):
    state = state_after_a_step(alone, "topk", False)
    with exchange(alone) as (ddp, communicator):
        give(ddp, given_gradients(0, 0))
        assert communicator.state_dict() is None
        with pytest.warns(UserWarning, match="gradients are no longer compressed: .* is lost"):
            assert communicator.load_state_dict(state) is False


def test_without_error_feedback_what_was_kept_is_lost_with_a_warning(alone):
    state = state_after_a_step(alone, "int8", False)
    with exchange(alone, "int8", error_feedback=False) as (ddp, communicator):
        with pytest.warns(UserWarning, match="error feedback is off.*is lost: error_feedback=True keeps it"):
            communicator.load_state_dict(state)
        give(ddp, given_gradients(1, 0))


def test_a_state_is_a_copy(alone):
    with exchange(alone, "topk") as (ddp, communicator):
        give(ddp, given_gradients(0, 0))
        for per_rank in (False, True):
            state = communicator.state_dict(per_rank=per_rank)
            residuals = state["ranks"][0]["residual"] if per_rank else state["mean"]["residual"]
            before = {key: tensor.clone() for key, tensor in residuals.items()}
            give(ddp, given_gradients(1, 0))
            give(ddp, given_gradients(2, 0))
            assert same_tensors(residuals, before)
