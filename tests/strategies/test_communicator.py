"""The exchange on plain torch DDP, without Lightning: every body below runs on each rank."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from danon_lightning.strategies import GradientCommunicator, Mesh
from danon_lightning.testing import RankFailedError, run_distributed

WORLDS = [(1, 2), (1, 3), (2, 1), (2, 2), (1, 4)]


def build(dtype=torch.float32, **ddp_options):
    """Odd sizes, small and large tensors, several buckets."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, 157), nn.LayerNorm(157), nn.Linear(157, 211), nn.ReLU(), nn.Linear(211, 93), nn.Linear(93, 7)
    ).to(dtype)
    return DDP(model, bucket_cap_mb=0.1, gradient_as_bucket_view=True, **ddp_options)


def communicator_for(ddp, nodes, **options):
    communicator = GradientCommunicator(Mesh.from_world(dist.get_world_size(), nodes, dist.get_rank()), **options)
    ddp.register_comm_hook(communicator, communicator.hook)
    return communicator


def backward(ddp, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    x = torch.randn(8, 30, generator=generator, dtype=torch.float64).to(next(ddp.parameters()).dtype)
    (scale * ddp(x).square().mean()).backward()


def gradients(ddp):
    return torch.cat([p.grad.flatten() for p in ddp.parameters()])


def local_gradients(ddp, step):
    ddp.zero_grad()
    with ddp.no_sync():
        backward(ddp, step)
    local = gradients(ddp).clone()
    ddp.zero_grad()
    return local


def on_all_ranks(tensor):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return torch.stack(rows)


def identical_everywhere(tensor):
    rows = on_all_ranks(tensor.view(torch.uint8))
    return bool((rows == rows[0]).all())


def check_dense_mean(nodes, dtype, tolerance):
    ddp = build(dtype)
    communicator_for(ddp, nodes)
    for step in range(3):
        mean = on_all_ranks(local_gradients(ddp, step)).mean(dim=0)
        backward(ddp, step)
        torch.testing.assert_close(gradients(ddp), mean, rtol=tolerance, atol=tolerance * float(mean.abs().max()))
        assert identical_everywhere(gradients(ddp))


@pytest.mark.parametrize(("nodes", "ranks"), WORLDS)
def test_dense_exchange_gives_the_mean(nodes, ranks):
    run_distributed(check_dense_mean, nodes * ranks, nodes, torch.float32, 1e-6, ranks_per_node=ranks)


def test_dense_exchange_in_double_precision():
    run_distributed(check_dense_mean, 4, 2, torch.float64, 1e-14, ranks_per_node=2)


def test_dense_exchange_of_half_precision_gradients():
    run_distributed(check_dense_mean, 4, 2, torch.bfloat16, 1e-2, ranks_per_node=2)


def check_quantized_bound(nodes, hierarchical, name, block, levels):
    ddp = build()
    communicator = communicator_for(ddp, nodes, compression=name, hierarchical=hierarchical)
    for step in range(3):
        local = on_all_ranks(local_gradients(ddp, step)).double()
        backward(ddp, step)
        assert identical_everywhere(gradients(ddp))
        inner = dist.get_world_size() // nodes if nodes > 1 and hierarchical else 1
        groups = local.view(-1, inner, local.shape[1]).sum(dim=1) / len(local)  # what each group codes
        offset, differ = 0, False
        for parameter in ddp.parameters():
            mine = slice(offset, offset + parameter.numel())
            offset = mine.stop
            error = (parameter.grad.flatten().double() - groups[:, mine].sum(dim=0)).abs()
            if parameter.dim() < 2 or parameter.numel() < 4096:
                assert error.max() <= 1e-6 * groups.abs().max()
                continue
            blocks = torch.nn.functional.pad(groups[:, mine], (0, -parameter.numel() % block)).view(
                len(groups), -1, block
            )
            largest = blocks.abs().amax(dim=2).sum(dim=0)  # Σ_m max|x_m|
            steps = 2 * levels
            bound = (2 + 1 / steps) * largest.repeat_interleave(block)[: parameter.numel()] / steps
            assert (error <= bound * (1 + 1e-5)).all()
            differ |= bool(error.max() > 1e-3 * groups.abs().max())
        assert differ, "nothing was compressed"
    stats = communicator.stats()
    assert stats["steps"] == 3
    return stats


@pytest.mark.parametrize(
    ("nodes", "ranks", "hierarchical", "name", "block", "levels"),
    [
        (1, 2, "auto", "int8", 256, 127),
        (1, 3, "auto", "int8", 256, 127),
        (2, 2, "auto", "int8", 256, 127),
        (2, 2, False, "int8", 256, 127),
        (2, 2, "auto", "int4", 64, 7),
    ],
)
def test_quantized_exchange_stays_within_its_bound_and_ranks_stay_identical(
    nodes, ranks, hierarchical, name, block, levels
):
    arguments = nodes, hierarchical, name, block, levels
    run_distributed(check_quantized_bound, nodes * ranks, *arguments, ranks_per_node=ranks)


def check_cast():
    for name, relative in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
        ddp = build()
        communicator_for(ddp, 1, compression=name)
        local = on_all_ranks(local_gradients(ddp, 0)).double()
        backward(ddp, 0)
        assert identical_everywhere(gradients(ddp))
        error = (gradients(ddp).double() - local.mean(dim=0)).abs()
        # Each contribution is rounded once, and their sum once more.
        assert (error <= relative * (2 + relative) * local.abs().mean(dim=0) * (1 + 1e-3) + 1e-7).all()
        assert error.max() > 0


def test_casts_stay_within_their_bound_and_ranks_stay_identical():
    run_distributed(check_cast, 3)


def sent_bytes(nodes, compression, hierarchical):
    torch.manual_seed(0)
    ddp = DDP(nn.Linear(1024, 1024, bias=False), gradient_as_bucket_view=True)
    communicator = communicator_for(ddp, nodes, compression=compression, hierarchical=hierarchical)
    ddp(torch.ones(1, 1024)).sum().backward()
    return communicator.stats()


@pytest.mark.parametrize(
    ("compression", "hierarchical", "egress"),
    [
        (None, False, 8 * (4 - 1) / 4),
        (None, True, 8 * (2 - 1) / 2),
        ("fp16", True, 4 * (2 - 1) / 2),
        ("int8", True, 2 * (1 + 4 / 256) * (2 - 1) / 2),
        ("int4", True, (1 + 8 / 64) * (2 - 1) / 2),
    ],
)
def test_bytes_between_nodes_follow_the_formula(compression, hierarchical, egress):
    """Per element and node, two nodes of two ranks. Flat, 2/3 of what each of the two sends goes to the other node."""
    stats = run_distributed(sent_bytes, 4, 2, compression, hierarchical, ranks_per_node=2)
    between = sum(rank["inter_node_bytes"] for rank in stats[:2]) / 2**20
    flat_share = 1 if hierarchical else 2 * 2 / 3
    assert between == pytest.approx(egress * flat_share, rel=0.03)
    assert stats[0]["dense_bytes"] == 4 * 2**20


def check_buckets_do_not_matter(compression):
    """The same bits before and after DDP regroups its buckets, and for any size of them."""
    results = []
    for cap in (0.05, 0.2, 25):
        torch.manual_seed(0)
        ddp = DDP(nn.Sequential(nn.Linear(30, 300), nn.Linear(300, 301), nn.Linear(301, 5)), bucket_cap_mb=cap)
        communicator_for(ddp, 1, compression=compression)
        for _ in range(3):
            ddp.zero_grad()
            backward(ddp, 0)
            results.append(gradients(ddp).clone())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("compression", [None, "int8"])
def test_the_result_does_not_depend_on_buckets(compression):
    run_distributed(check_buckets_do_not_matter, 3, compression)


def check_non_finite_reaches_every_rank(compression):
    ddp = build()
    communicator_for(ddp, 1, compression=compression)
    backward(ddp, 0, scale=float("inf") if dist.get_rank() == 1 else 1.0)
    assert not torch.isfinite(gradients(ddp)).all()
    ddp.zero_grad()
    mean = on_all_ranks(local_gradients(ddp, 1)).mean(dim=0)
    backward(ddp, 1)
    assert (gradients(ddp) - mean).abs().max() <= 0.01 * mean.abs().max()


@pytest.mark.parametrize("compression", [None, "int8"])
def test_a_non_finite_gradient_is_seen_by_all_ranks_and_only_at_that_step(compression):
    run_distributed(check_non_finite_reaches_every_rank, 2, compression)


def check_accumulation_and_unused_parameters():
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(30, 30), "unused": nn.Linear(30, 30)})
    model.forward = lambda x: model["used"](x)
    ddp = DDP(model, find_unused_parameters=True)
    communicator = communicator_for(ddp, 1)
    local = torch.zeros(30 * 31)
    for step in range(2):
        ddp.zero_grad()
        with ddp.no_sync():
            backward(ddp, step)
        local += torch.cat([p.grad.flatten() for p in model["used"].parameters()])
    ddp.zero_grad()
    with ddp.no_sync():
        backward(ddp, 0)
    backward(ddp, 1)
    got = torch.cat([p.grad.flatten() for p in model["used"].parameters()])
    torch.testing.assert_close(got, on_all_ranks(local).mean(dim=0))
    assert communicator.stats()["steps"] == 1


def test_gradient_accumulation_exchanges_once_and_unused_parameters_are_no_obstacle():
    run_distributed(check_accumulation_and_unused_parameters, 2)


def check_complex_and_empty_parameters(compression):
    torch.manual_seed(0)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(80, 80, dtype=torch.complex64))
    model.empty = nn.Parameter(torch.empty(0, dtype=torch.float64))
    model.forward = lambda x: (model.weight @ x).abs().square().mean() + model.empty.sum()
    ddp = DDP(model)
    communicator_for(ddp, 1, compression=compression)
    x = torch.randn(80, generator=torch.Generator().manual_seed(dist.get_rank())).to(torch.complex64)
    with ddp.no_sync():
        ddp(x).backward()
    mean = on_all_ranks(torch.view_as_real(model.weight.grad).clone()).mean(dim=0)
    ddp.zero_grad()
    ddp(x).backward()
    torch.testing.assert_close(torch.view_as_real(model.weight.grad), mean)


@pytest.mark.parametrize("compression", [None, "int8"])
def test_complex_parameters_go_dense_and_empty_ones_are_no_obstacle(compression):
    run_distributed(check_complex_and_empty_parameters, 2, compression)


def use_after_closing():
    ddp = build()
    communicator = communicator_for(ddp, 1)
    backward(ddp, 0)
    communicator.close()
    communicator.close()
    with pytest.raises(RuntimeError, match="the gradient communicator is closed"):
        backward(ddp, 1)


def test_a_closed_communicator_refuses_and_does_not_hang():
    run_distributed(use_after_closing, 2)


def die_in_mid_run():
    ddp = build()
    communicator_for(ddp, 1)
    backward(ddp, 0)
    if dist.get_rank() == 1:
        raise ArithmeticError("rank 1 gives up here")
    start = time.monotonic()
    try:
        backward(ddp, 1)
    except RuntimeError as error:
        assert time.monotonic() - start < 20
        assert "the cause is the first error in that rank's output" in str(error)
        time.sleep(5)  # rank 1 is the one to be named
        raise


def test_a_dead_rank_ends_the_job_in_seconds_with_its_own_error():
    start = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1 gives up here") as failure:
        run_distributed(die_in_mid_run, 2)
    assert failure.value.rank == 1
    assert time.monotonic() - start < 30


def refuse_two_levels():
    with pytest.raises(ValueError, match="hierarchical=True needs several nodes.*1 node × 2 ranks"):
        GradientCommunicator(Mesh(1, 2, dist.get_rank()), hierarchical=True)
    with pytest.raises(ValueError, match="hierarchical='no' must be True, False or 'auto'"):
        GradientCommunicator(Mesh(1, 2, dist.get_rank()), hierarchical="no")


def test_two_levels_need_two_levels():
    run_distributed(refuse_two_levels, 2)


def check_on_cuda(compression):
    torch.manual_seed(0)
    ddp = DDP(nn.Linear(300, 300).cuda(), device_ids=[0])
    communicator = GradientCommunicator(Mesh(1, 1, 0), compression=compression, device="cuda:0")
    ddp.register_comm_hook(communicator, communicator.hook)
    x = torch.randn(64, 300, device="cuda")
    for _ in range(3):
        ddp.zero_grad()
        ddp(x).square().mean().backward()
    (expected,) = torch.autograd.grad(ddp.module(x).square().mean(), [ddp.module.weight])
    tolerance = 1e-6 if compression is None else expected.abs().max() / 254 * 1.01
    assert (ddp.module.weight.grad - expected).abs().max() <= tolerance


@pytest.mark.cuda
@pytest.mark.parametrize("compression", [None, "int8"])
def test_the_exchange_runs_on_a_stream_of_its_own(compression):
    run_distributed(check_on_cuda, 1, compression)
