"""The exchange on plain torch DDP, without Lightning: bodies named ``check_…`` run on each rank."""

import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from danon_lightning.strategies import (
    ErrorFeedback,
    GradientCommunicator,
    Int8Compressor,
    Mesh,
    PowerSGDCompressor,
    TopKCompressor,
)
from danon_lightning.testing import RankFailedError, run_distributed

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbour with it
from plain_module import (  # noqa: E402
    SHAPES,
    Given,
    emulated_mesh,
    exchange,
    give,
    given_gradients,
    killed_job,
    one_of_each,
    same_on_all_ranks,
)


@pytest.fixture
def alone(tmp_path):
    """This process as the only rank of a job: enough for what does not depend on others, and quick."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    return Mesh(1, 1, 0)


def mean_gradients(step, world_size, dtype=torch.float32):
    """Of all ranks, in double precision."""
    ranks = [given_gradients(step, rank, dtype=dtype) for rank in range(world_size)]
    return {name: torch.stack([rank[name].double() for rank in ranks]).mean(dim=0) for name in SHAPES}


# ---- dense


def check_dense_mean(folder):
    for nodes, ranks in [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (2, 2)]:
        with emulated_mesh(nodes, ranks, folder) as mesh:
            if mesh is None:
                continue
            for dtype, tolerance in [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 2.0**-7)]:
                with exchange(mesh, model=Given(dtype=dtype)) as (ddp, communicator):
                    for step in range(3):
                        delivered = give(ddp, given_gradients(step, mesh.rank, dtype=dtype))
                        assert same_on_all_ranks(delivered), f"{mesh}, {dtype}: ranks differ"
                        for name, mean in mean_gradients(step, mesh.world_size, dtype).items():
                            error = (delivered[name].double() - mean).abs().max()
                            assert error <= tolerance * mean.abs().max(), f"{mesh}, {dtype}, {name}: {error}"
                    assert communicator.stats()["steps"] == communicator.steps == 3


def test_the_dense_exchange_gives_the_mean_for_every_layout_and_precision(tmp_path):
    run_distributed(check_dense_mean, 4, str(tmp_path), timeout=120)


def check_large_tensors(folder):
    """More than fits in a message, of odd size."""
    shapes = {"large": (1203, 1100), "bias": (1_500_001,)}
    for nodes, ranks in [(1, 3), (2, 2)]:
        with emulated_mesh(nodes, ranks, folder) as mesh:
            if mesh is None:
                continue
            gradients = [given_gradients(0, rank, shapes) for rank in range(mesh.world_size)]
            means = {name: sum(gradient[name] for gradient in gradients) / mesh.world_size for name in shapes}
            for compression in (None, "int8", TopKCompressor(0.05), "powersgd"):
                label = f"{mesh}, {compression}"
                with exchange(mesh, compression, model=Given(shapes), bucket_cap_mb=25) as (ddp, communicator):
                    delivered = give(ddp, gradients[mesh.rank])
                    assert same_on_all_ranks(delivered), label
                    torch.testing.assert_close(delivered["bias"], means["bias"])
                    state = communicator.state_dict()
                    if mesh.rank == 0:
                        whole = delivered["large"].clone()
                        if state is not None and state["mean"]["residual"]:
                            whole += state["mean"]["residual"]["large"].view_as(whole)
                        tolerance = 0.05 if compression == "int8" else 1e-5
                        torch.testing.assert_close(whole, means["large"], rtol=0, atol=tolerance, msg=label)


@pytest.mark.slow
def test_tensors_larger_than_a_message_travel_in_several(tmp_path):
    run_distributed(check_large_tensors, 4, str(tmp_path), timeout=120)


# ---- bounds


def check_quantized_bounds(folder):
    for nodes, ranks, hierarchical, name, block, levels in [
        (1, 3, "auto", "int8", 256, 127),
        (2, 2, "auto", "int8", 256, 127),
        (2, 2, False, "int8", 256, 127),
        (2, 2, "auto", "int4", 64, 7),
    ]:
        with emulated_mesh(nodes, ranks, folder) as mesh:
            if mesh is None:
                continue
            inner = ranks if nodes > 1 and hierarchical else 1
            with exchange(mesh, name, hierarchical=hierarchical) as (ddp, _):
                for step in range(3):
                    everybody = [given_gradients(step, rank) for rank in range(mesh.world_size)]
                    for key, tensor in give(ddp, everybody[mesh.rank]).items():
                        local = torch.stack([gradients[key].flatten().double() for gradients in everybody])
                        groups = local.view(-1, inner, local.shape[1]).sum(dim=1) / len(local)  # what each codes
                        error = (tensor.flatten().double() - groups.sum(dim=0)).abs()
                        if tensor.dim() < 2 or tensor.numel() < 4096:
                            assert error.max() <= 1e-6 * groups.abs().max()
                            continue
                        blocks = torch.nn.functional.pad(groups, (0, -tensor.numel() % block))
                        largest = blocks.view(len(groups), -1, block).abs().amax(dim=2).sum(dim=0)  # Σ_m max|x_m|
                        bound = (2 + 0.5 / levels) * largest.repeat_interleave(block)[: tensor.numel()] / (2 * levels)
                        assert (error <= bound * (1 + 1e-5)).all(), f"{mesh}, {name}, {key}"
                        assert error.max() > 1e-3 * groups.abs().max(), "nothing was compressed"


def test_quantized_gradients_stay_within_their_bound(tmp_path):
    run_distributed(check_quantized_bounds, 4, str(tmp_path), timeout=120)


def test_casts_stay_within_their_bound(alone):
    for name, relative in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
        with exchange(alone, name) as (ddp, _):
            gradients = given_gradients(0, 0)
            for key, tensor in give(ddp, gradients).items():
                error = (tensor - gradients[key]).abs()
                assert (error <= relative * gradients[key].abs() + 2.0**-25).all()
                assert error.any() == (tensor.numel() >= 4096)


def test_values_beyond_the_range_of_half_precision_are_not_taken_for_finite(alone):
    """Else the optimizer applies an infinite gradient, and error feedback keeps one for ever."""
    for feedback in (False, True):
        with exchange(alone, "fp16", error_feedback=feedback) as (ddp, communicator):
            large = given_gradients(0, 0)
            large["first"][3, 5] = 1e6
            delivered = give(ddp, large)
            assert torch.isfinite(delivered["first"]).all() or not communicator.finite
            following = give(ddp, given_gradients(1, 0))
            assert all(torch.isfinite(tensor).all() for tensor in following.values())


# ---- bytes and times


def per_element(nodes, ranks, compression, hierarchical, folder):
    """Bytes that leave a node for each of 2^20 elements in a matrix."""
    with emulated_mesh(nodes, ranks, folder) as mesh:
        if mesh is None:
            return None
        with exchange(mesh, compression, model=Given({"matrix": (1024, 1024)}), hierarchical=hierarchical) as (
            ddp, communicator,
        ):  # fmt: skip
            give(ddp, given_gradients(0, mesh.rank, {"matrix": (1024, 1024)}))
            stats = communicator.stats()
            assert stats["dense_bytes"] == 4 * 2**20
            return stats["inter_node_bytes"] / 2**20, stats["intra_node_bytes"] / 2**20, stats["compression_ratio"]


def check_bytes(folder, rows):
    return [per_element(*row[:4], folder) for row in rows]


@pytest.mark.slow
def test_bytes_between_nodes_follow_the_formulas(tmp_path):
    """Those of the table in the documentation, per element: M nodes × L ranks, N = M·L."""
    density, rank, scales = 0.01, 4, 1 + 4 / 256
    rows = [
        (4, 1, None, False, 8 * 3 / 4, 1),  # flat: (N − 1) / N
        (2, 2, None, False, 8 * 2 / 4 * 2, 1),  # of what a rank sends, (N − L) / N goes to other nodes
        (2, 2, None, True, 8 / 2, 1),
        (4, 1, None, "auto", 8 * 3 / 4, 1),
        (2, 2, "fp16", True, 4 / 2, 2),
        (2, 2, "int8", True, 2 * scales / 2, 4 / scales),
        (4, 1, "int8", "auto", 2 * scales * 3 / 4, 4 / scales),
        (2, 2, "int4", True, (1 + 8 / 64) / 2, 8 / (1 + 8 / 64)),
        (2, 2, TopKCompressor(density), True, 8 * density, 0.5 / density),
        (4, 1, TopKCompressor(density), "auto", 8 * density * 3, 0.25 / density),
        (2, 2, "sign", True, 1 / 4 / 2, 32),
        (2, 2, PowerSGDCompressor(rank), True, 8 * rank * 2048 / 2**20 / 2, 2**20 / 2048 / rank),
        (2, 2, "randomk", True, 8 * density / 2, 1 / density),
        (2, 2, TopKCompressor(0.3), True, 8 / 2, 1),  # denser than dense
    ]
    results = run_distributed(check_bytes, 4, str(tmp_path), [row[:4] for row in rows], timeout=120)
    for index, (nodes, ranks, compression, hierarchical, egress, ratio) in enumerate(rows):
        label = f"{nodes} × {ranks}, {compression}, hierarchical={hierarchical}"
        one_node = [results[rank][index] for rank in range(ranks)]
        assert sum(between for between, _, _ in one_node) == pytest.approx(egress, rel=0.03), label
        # With PowerSGD one rank has the matrix to itself; the other has sent nothing.
        assert max(r for _, _, r in one_node) == pytest.approx(ratio, rel=0.03), label
        two_levels = hierarchical is True
        assert (sum(inside for _, inside, _ in one_node) > 0) == (two_levels or ranks > 1), label


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(1.2)
        return gradient


class SlowInt8(Int8Compressor):
    def encode_sum(self, sources, scale, payload, context):
        time.sleep(0.2)
        return super().encode_sum(sources, scale, payload, context)

    def encode(self, values, payload, context):
        time.sleep(0.2)
        super().encode(values, payload, context)


def test_time_is_hidden_beside_the_backward_pass_and_exposed_after_it(alone):
    """The exchange of a matrix takes 0.4 s (it is coded twice); a second one is ready 1.2 s after the first.

    That is from the second step on: for the first one DDP puts all in one bucket.
    """
    torch.manual_seed(0)
    first, second = nn.Linear(80, 80), nn.Linear(80, 80)
    model = nn.ModuleList([first, second])
    model.forward = lambda x: second(Sleep.apply(first(x))).sum()
    with exchange(alone, SlowInt8(), model=model) as (ddp, communicator):
        ddp(torch.ones(1, 80)).backward()
        one = communicator.stats()
        assert one["exposed_seconds"] >= 0.8
        assert one["hidden_seconds"] < 0.1
        ddp(torch.ones(1, 80)).backward()
        two = communicator.stats()
        assert 0.4 <= two["exposed_seconds"] - one["exposed_seconds"] < 1.2
        assert two["hidden_seconds"] - one["hidden_seconds"] >= 0.3


def test_what_a_step_has_left_is_in_place_when_backward_returns(alone, monkeypatch):
    """Whoever writes a checkpoint right after ``backward()`` must not get the state before it."""
    from danon_lightning.strategies.communication.memory import Memory

    commit = Memory.commit

    def late_commit(self):
        time.sleep(0.3)
        commit(self)

    monkeypatch.setattr(Memory, "commit", late_commit)
    with exchange(alone, "topk") as (ddp, communicator):
        delivered = give(ddp, given_gradients(0, 0))
        state = communicator.state_dict()
        assert state["step"] == 1
        residual = state["mean"]["residual"]["first"].view(SHAPES["first"])
        assert torch.equal(residual, given_gradients(0, 0)["first"] - delivered["first"])


def test_the_residual_norm_is_that_of_what_was_left_out(alone):
    with exchange(alone, "topk") as (ddp, communicator):
        assert communicator.stats()["residual_norm"] == 0
        delivered = give(ddp, given_gradients(0, 0))
        left = torch.cat([(given_gradients(0, 0)[name] - delivered[name]).flatten() for name in SHAPES])
        assert communicator.stats()["residual_norm"] == pytest.approx(float(left.norm()), rel=1e-6)


# ---- buckets


def check_buckets_do_not_matter(folder):
    """The same bits before and after DDP regroups its buckets, and for any size of them."""
    with emulated_mesh(1, 3, folder) as mesh:
        for name, compressor in {"dense": None, **one_of_each()}.items():
            results = []
            for cap in (0.001, 0.05, 25):
                feedback = "auto" if compressor is None else True
                with exchange(mesh, compressor, bucket_cap_mb=cap, error_feedback=feedback) as (ddp, _):
                    results.append([give(ddp, given_gradients(0, mesh.rank)) for _ in range(3)])
            for steps in zip(*results, strict=True):
                for other in steps[1:]:
                    assert all(torch.equal(other[key], steps[0][key]) for key in SHAPES), name
            if name == "dense":
                assert all(torch.equal(step[key], results[0][0][key]) for step in results[0] for key in SHAPES)


@pytest.mark.slow
def test_the_result_does_not_depend_on_buckets(tmp_path):
    run_distributed(check_buckets_do_not_matter, 3, str(tmp_path), timeout=120)


# ---- what is not finite


def check_bad_steps(folder):
    for nodes, ranks, feedback in [(1, 2, True), (2, 2, ErrorFeedback(momentum=0.5, flush_every=4))]:
        with emulated_mesh(nodes, ranks, folder) as mesh:
            if mesh is None:
                continue
            for name, compressor in one_of_each().items():
                compare_with_bad_steps(mesh, f"{mesh}, {name}, {feedback}", compressor, feedback)


def compare_with_bad_steps(mesh, label, compressor, feedback):
    """With and without bad steps in between: everything else is the same to the bit."""
    with exchange(mesh, compressor, error_feedback=feedback) as (ddp, communicator):
        undisturbed = [give(ddp, given_gradients(step, mesh.rank)) for step in range(3)]
    bad = [torch.inf, torch.nan, -torch.inf]
    with exchange(mesh, compressor, error_feedback=feedback) as (ddp, communicator):
        skipped = 0
        for step, expected in enumerate(undisturbed):
            # One element on one rank: in a matrix of the first, the middle and the last bucket, and where all is dense.
            for place, parameter in enumerate(list(SHAPES)[step::3]):
                before = communicator.state_dict(per_rank=True) if step else None
                gradients = given_gradients(100 + step, mesh.rank)
                if mesh.rank == (step + place) % mesh.world_size:
                    gradients[parameter].view(-1)[-2] = bad[(step + place) % 3]
                delivered = give(ddp, gradients)
                skipped += 1
                assert not communicator.finite, f"{label}: a bad {parameter} goes unnoticed"
                # For a gradient scaler, which does not ask the communicator.
                assert not all(torch.isfinite(tensor).all() for tensor in delivered.values()), f"{label}: it is hidden"
                if step:  # before the first step there are no zeros yet
                    assert same_states(communicator.state_dict(per_rank=True), before), f"{label}, {parameter}"
            delivered = give(ddp, given_gradients(step, mesh.rank))
            assert communicator.finite, label
            assert all(torch.equal(delivered[key], expected[key]) for key in SHAPES), f"{label}, step {step}"
        assert communicator.stats()["skipped_steps"] == skipped


def same_states(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_states(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_states, one, other))
    return one == other


@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_no_trace_on_any_rank(tmp_path):
    run_distributed(check_bad_steps, 4, str(tmp_path), timeout=200)


def test_a_step_that_is_not_finite_is_noticed_on_a_single_rank(alone):
    for name, compressor in one_of_each().items():
        for feedback in (False, True):
            compare_with_bad_steps(alone, f"{name}, {feedback}", compressor, feedback)


def check_dense_non_finite():
    mesh = Mesh(1, 2, dist.get_rank())
    with exchange(mesh) as (ddp, _):
        gradients = given_gradients(0, mesh.rank)
        gradients["bias"][mesh.rank] = torch.nan
        delivered = give(ddp, gradients)
        assert delivered["bias"].isnan().nonzero().flatten().tolist() == [0, 1]
        assert all(torch.isfinite(tensor).all() for tensor in give(ddp, given_gradients(1, mesh.rank)).values())


# ---- with all that DDP offers


def check_ddp_options():
    mesh = Mesh(1, 2, dist.get_rank())
    check_dense_non_finite()
    for compression in (None, "int8"):
        check_accumulation_clipping_and_unused_parameters(mesh, compression)
        for options in ({"view": False}, {"view": True}, {"ddp_options": {"static_graph": True}}):
            with exchange(mesh, compression, **options) as (ddp, communicator):
                for step in range(4):
                    delivered = give(ddp, given_gradients(step, mesh.rank))
                    assert same_on_all_ranks(delivered)
                    for name, mean in mean_gradients(step, 2).items():
                        error = (delivered[name] - mean).abs().max()
                        assert error <= (1e-6 if compression is None else 0.02) * mean.abs().max(), (options, name)
                assert communicator.steps == 4, options
        check_complex_and_empty_parameters(mesh, compression)
    check_two_models(mesh)
    check_refusal_after_closing(mesh)


def check_accumulation_clipping_and_unused_parameters(mesh, compression):
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(80, 80), "unused": nn.Linear(80, 80)})
    model.forward = lambda x: model["used"](x).square().sum()
    batches = [[torch.full((1, 80), float(step + rank)) for step in range(2)] for rank in range(2)]
    expected = torch.zeros(80, 80)
    for batch in [x for rank in batches for x in rank]:
        expected += torch.autograd.grad(model["used"](batch).square().sum(), model["used"].weight)[0] / 2
    with exchange(mesh, compression, model=model, ddp_options={"find_unused_parameters": True}) as (ddp, communicator):
        for _ in range(2):
            ddp.zero_grad()
            with ddp.no_sync():
                ddp(batches[mesh.rank][0]).backward()
            ddp(batches[mesh.rank][1]).backward()
        assert communicator.steps == 2
        gradient = model["used"].weight.grad
        tolerance = 1e-6 if compression is None else 0.01
        assert (gradient - expected).abs().max() <= tolerance * expected.abs().max()
        assert model["unused"].weight.grad is None
        before = gradient.clone()
        norm = nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        torch.testing.assert_close(gradient, before / norm)
        assert same_on_all_ranks({"weight": gradient})


def check_complex_and_empty_parameters(mesh, compression):
    torch.manual_seed(0)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(80, 80, dtype=torch.complex64))
    model.empty = nn.Parameter(torch.empty(0, dtype=torch.float64))
    model.forward = lambda x: (model.weight @ x).abs().square().mean() + model.empty.sum()
    inputs = [torch.randn(80, generator=torch.Generator().manual_seed(rank)).to(torch.complex64) for rank in range(2)]
    mean = sum(torch.autograd.grad(model.forward(x), model.weight)[0] for x in inputs) / 2
    with exchange(mesh, compression, model=model) as (ddp, _):
        for _ in range(3):
            ddp.zero_grad()
            ddp(inputs[mesh.rank]).backward()
            torch.testing.assert_close(model.weight.grad, mean)  # complex numbers go dense


def check_two_models(mesh):
    """Their exchanges do not meet."""
    with exchange(mesh) as (dense, _), exchange(mesh, "topk") as (sparse, communicator):
        for step in range(3):
            (sparse(given_gradients(step, mesh.rank)) + dense(given_gradients(step, mesh.rank))).backward()
        mean = sum(mean_gradients(step, 2)["first"] for step in range(3))
        torch.testing.assert_close(dense.module.first.grad.double(), mean, rtol=1e-5, atol=1e-5)
        assert same_on_all_ranks({"sparse": sparse.module.first.grad})
        assert communicator.steps == 3


def check_refusal_after_closing(mesh):
    with exchange(mesh) as (ddp, communicator):
        give(ddp, given_gradients(0, mesh.rank))
        communicator.close()
        communicator.close()
        with pytest.raises(RuntimeError, match="the gradient communicator is closed"):
            give(ddp, given_gradients(1, mesh.rank))


@pytest.mark.slow
def test_all_that_ddp_offers_goes_together_with_the_exchange():
    run_distributed(check_ddp_options, 2, timeout=120)


# ---- many runs


def check_many_runs(folder):
    """A hundred fresh models and communicators, five buckets each, in every order of compressors and layouts."""
    ways = list({"dense": None, **one_of_each()}.items())
    completed = 0
    for index, (nodes, ranks, runs) in enumerate([(1, 2, 25), (1, 3, 25), (2, 2, 25), (4, 1, 25)]):
        with emulated_mesh(nodes, ranks, folder) as mesh:
            completed += runs
            if mesh is None:
                continue
            for run in range(runs):
                name, compressor = ways[(run + index) % len(ways)]
                with exchange(mesh, compressor) as (ddp, communicator):
                    buckets = count_buckets(communicator)
                    for step in range(2):  # for the first one DDP puts all in one bucket
                        buckets.clear()
                        delivered = give(ddp, given_gradients(step, mesh.rank))
                    assert len(buckets) >= 5, f"{name}: only {len(buckets)} buckets"
                    assert communicator.steps == 2 and communicator.error is None
                    assert all(torch.isfinite(tensor).all() for tensor in delivered.values())
    return completed


def count_buckets(communicator):
    submit, buckets = communicator._submit, []
    communicator._submit = lambda bucket: (buckets.append(bucket.index()), submit(bucket))[1]
    return buckets


@pytest.mark.slow
def test_a_hundred_of_a_hundred_runs_with_several_buckets_complete(tmp_path):
    assert run_distributed(check_many_runs, 4, str(tmp_path), timeout=200) == [100] * 4


# ---- failures


class Broken(Int8Compressor):
    def encode(self, values, payload, context):
        if context.step == 1:
            raise ArithmeticError("these values cannot be coded")
        super().encode(values, payload, context)


def test_an_error_in_the_exchange_is_raised_by_this_and_every_later_backward_pass(alone):
    with exchange(alone, Broken(), error_feedback=False) as (ddp, communicator):
        give(ddp, given_gradients(0, 0))
        assert communicator.error is None
        for _ in range(3):
            message = r"rank 0: the gradient exchange has failed \(ArithmeticError: these values cannot be coded\)"
            with pytest.raises(RuntimeError, match=message):
                give(ddp, given_gradients(1, 0))
            assert isinstance(communicator.error.__cause__, ArithmeticError)
        communicator.close()


def die_in_mid_run():
    with exchange(Mesh(1, 2, dist.get_rank())) as (ddp, _):
        give(ddp, given_gradients(0, dist.get_rank()))
        if dist.get_rank() == 1:
            raise ArithmeticError("rank 1 gives up here")
        start = time.monotonic()
        try:
            give(ddp, given_gradients(1, dist.get_rank()))
        except RuntimeError as error:
            assert time.monotonic() - start < 20
            assert "rank 1, on this node, has" in str(error)
            assert "the cause is the first error in that rank's output" in str(error)
            time.sleep(5)  # rank 1 is the one to be named
            raise


def test_a_dead_rank_ends_the_job_in_seconds_with_its_own_error():
    start = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1 gives up here") as failure:
        run_distributed(die_in_mid_run, 2)
    assert failure.value.rank == 1
    assert time.monotonic() - start < 40


@pytest.mark.parametrize("compression", [None, pytest.param("topk", marks=pytest.mark.slow)])
def test_killing_a_rank_in_mid_exchange_ends_all_others_with_an_error(compression):
    for survivor in killed_job(nodes=1, ranks=3, compression=compression, victim=1):
        if compression is None:  # in shared memory
            assert "rank 1, on this node, has" in survivor.stderr or "has closed its connection" in survivor.stderr


# ---- CUDA


def check_on_cuda(name):
    torch.manual_seed(0)
    compressor = {"dense": None, **one_of_each()}[name]
    ddp = DDP(nn.Linear(300, 300).cuda(), device_ids=[0])
    communicator = GradientCommunicator(
        ddp, Mesh(1, 1, 0), compression=compressor, error_feedback=compressor is not None or "auto", device="cuda:0"
    )
    ddp.register_comm_hook(communicator, communicator.hook)
    x = torch.randn(64, 300, device="cuda")
    (gradient,) = torch.autograd.grad(ddp.module(x).square().mean(), [ddp.module.weight])
    total = torch.zeros_like(gradient)
    for _ in range(3):
        ddp.zero_grad()
        ddp(x).square().mean().backward()
        total += ddp.module.weight.grad
    state = communicator.state_dict()
    if state is not None:
        total += state["mean"]["residual"]["weight"].view(300, 300).cuda()
    assert (total - 3 * gradient).abs().max() <= 1e-5 * gradient.abs().max()
    if compressor is not None:
        ddp.zero_grad()
        (ddp(x).square().mean() * torch.inf).backward()
        torch.cuda.synchronize()
        assert not communicator.finite
        assert same_states(communicator.state_dict(), state)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["dense", *one_of_each()])
def test_the_exchange_runs_on_a_stream_of_its_own(name):
    run_distributed(check_on_cuda, 1, name)
