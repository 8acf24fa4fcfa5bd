"""Sequences in fewer cells, level by level too."""

import copy
import math

import pytest
import torch

from danon_lightning.attention.components import CompressedSequence, DynamicCompression, HierarchicalCompression
from danon_lightning.attention.components.cells import quantize_rows


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def smooth(length: int, width: int = 8, noise: float = 0.0) -> torch.Tensor:
    """Slow waves, one a channel, and noise on them."""
    time = torch.linspace(0, 2 * math.pi, length, dtype=torch.float64)[:, None]
    waves = torch.sin(time * torch.arange(1, width + 1) / 4 + torch.arange(width))
    return (waves + noise * tokens(length, width)).unsqueeze(0)


def fixed(dim: int = 8, **settings) -> DynamicCompression:
    """At a ratio of its own choice: 1/4 of the length unless told otherwise."""
    bounds = {"min_compression_ratio": 0.25, "max_compression_ratio": 0.25, "enable_adaptive_compression": False}
    return DynamicCompression(dim, **{**bounds, **settings}).double()


def scramble(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return module


# ---- the definition


@pytest.mark.parametrize("length", [1, 2, 3, 10, 57, 1000])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_the_length_of_the_result_is_as_defined(length, alpha):
    compression = DynamicCompression(8, alpha=alpha).double()
    factor = min(max(alpha * math.log(length), 1 / 0.9), 1 / 0.1)
    compressed = compression.eval().compress(tokens(2, length, 8))
    assert compressed.shape == (2, math.ceil(length / factor), 8)
    assert compression.num_cells(length) == compressed.shape[1]


def test_limits_of_the_ratio_hold():
    x = tokens(1, 1000, 8)
    for low, high in ((0.05, 0.05), (0.3, 0.5), (0.9, 1.0), (1.0, 1.0)):
        for alpha in (0.01, 100.0):
            compression = DynamicCompression(8, low, high, alpha=alpha).double().eval()
            _, stats = compression.compress(x, return_stats=True)
            assert stats.ratio == pytest.approx(high if alpha < 1 else low, abs=1e-3)
    torch.testing.assert_close(compression(x), x, rtol=0, atol=0)  # the last one keeps everything


@pytest.mark.parametrize("threshold", [None, 0.8])
def test_cells_are_softmax_means_and_expand_through_the_map(threshold):
    compression, x = scramble(fixed(importance_threshold=threshold)), tokens(2, 21, 8)
    compressed = compression.compress(x)
    assert compressed.shape == (2, 6, 8)
    expanded = compression.decompress(compressed, x.shape)
    for row in range(2):
        for cell in range(6):
            members = x[row, compressed.assignment[row] == cell]
            scores = (members / members.norm(dim=-1, keepdim=True)) @ compression.pool_query
            expected = torch.softmax(scores, dim=0) @ members
            torch.testing.assert_close(compressed.cells[row, cell], expected, rtol=0, atol=1e-12)
        middles = [(compressed.assignment[row] == cell).nonzero().double().mean().item() for cell in range(6)]
        assert middles == sorted(middles)
        for index in range(21):
            cell = compressed.assignment[row, index].item()
            before, after = max(0, cell - 1), min(5, cell + 1)
            tendency = compressed.cells[row, after] - compressed.cells[row, before]
            tendency = tendency * (index - middles[cell]) / max(1.0, middles[after] - middles[before])
            expected = compression.token_map @ compressed.cells[row, cell] + compression.tendency_map @ tendency
            torch.testing.assert_close(expanded[row, index], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(compression(x), expanded, rtol=0, atol=0)


def test_at_first_cells_are_means_of_neighbours():
    compression, x = fixed(), tokens(1, 16, 8)
    compressed = compression.compress(x)
    assert compressed.assignment[0].tolist() == [i // 4 for i in range(16)]
    torch.testing.assert_close(compressed.cells, x.unflatten(1, (4, 4)).mean(dim=2))
    # Cells alone, divided evenly, expand as well.
    torch.testing.assert_close(
        compression.decompress(compressed.cells, (1, 16, 8)), compressed.cells.repeat_interleave(4, dim=1)
    )


def test_statistics_are_measured():
    compression, x = scramble(fixed()), tokens(2, 20, 8)
    compressed, stats = compression.compress(x, return_stats=True)
    error = (x - compression.decompress(compressed, x.shape)).square().sum() / x.square().sum()
    assert stats.energy_retained == pytest.approx(1 - error.item(), abs=1e-12)
    assert stats.ratio == stats.bytes_ratio == 5 / 20
    constant = torch.ones(1, 20, 8, dtype=torch.float64)
    assert fixed().compress(constant, return_stats=True)[1].energy_retained == 1
    assert fixed().compress(0 * constant, return_stats=True)[1].energy_retained == 1


# ---- settings


def test_important_tokens_keep_a_cell_of_their_own():
    x = smooth(40).repeat(2, 1, 1)
    x[0, 7] += 20.0
    x[0, 8] -= 20.0
    even, apart = fixed(), fixed(importance_threshold=2.0)
    compressed, stats = apart.compress(x, return_stats=True)
    assert compressed.shape == (2, 10, 8)
    for index in (7, 8):
        assert (compressed.assignment[0] == compressed.assignment[0, index]).sum() == 1
    restored = apart.decompress(compressed, x.shape)
    torch.testing.assert_close(restored[0, 7:9], x[0, 7:9], rtol=0, atol=1e-12)
    assert stats.energy_retained > even.compress(x, return_stats=True)[1].energy_retained + 0.3
    for row in range(2):
        assert compressed.assignment[row].unique().tolist() == list(range(10))
    # A row whose tokens are all alike is divided as without a threshold.
    assert torch.equal(compressed.assignment[1], even.compress(x).assignment[1])


def test_at_most_half_of_the_cells_are_set_apart():
    x = tokens(3, 40, 8)
    assignment = fixed(importance_threshold=0.0).compress(x).assignment
    counts = torch.stack([torch.bincount(row, minlength=10) for row in assignment])
    assert ((counts == 1).sum(dim=1) == 5).all() and (counts > 0).all()
    assert fixed(importance_threshold=0.0).compress(x[:, :3]).assignment.tolist() == [[0, 0, 0]] * 3


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_quantization_is_bounded_and_small(scale):
    x = scale * tokens(2, 64, 8)
    compressed, stats = fixed(use_quantization=True).compress(x, return_stats=True)
    assert compressed.cells.dtype == torch.int8 and compressed.cells.abs().max() == 127
    exact = fixed().compress(x).cells
    error = (compressed.dequantized() - exact).abs()
    bound = exact.abs().amax(dim=-1, keepdim=True) / 254
    assert (error <= bound * (1 + 1e-9)).all() and (error > 0.1 * bound).any()
    assert stats.bytes_ratio == pytest.approx(0.25 * (8 + 8) / 64)  # one byte an element and a float64 a row
    zeros, scales = quantize_rows(torch.zeros(2, 3))
    assert torch.count_nonzero(zeros) == 0 and scales.isfinite().all()


def test_the_ratio_follows_the_energy():
    easy, hard = smooth(256), tokens(1, 256, 8)
    settings = {"alpha": 0.8, "energy_band": (0.6, 0.9)}
    for x, direction in ((easy, -1), (hard, 1)):
        compression = DynamicCompression(8, **settings).double()
        before = compression.num_cells(256)
        lengths = [compression.compress(x).shape[1] for _ in range(30)]
        assert lengths[0] == before
        steps = [direction * (b - a) for a, b in zip(lengths, lengths[1:], strict=False)]
        assert min(steps) >= 0 and max(steps) > 0, lengths
        # One step of a quarter of a doubling at a time.
        assert lengths[1] == math.ceil(256 / (0.8 * math.log(256) * 2 ** (-direction / 4)))
        _, stats = compression.compress(x, return_stats=True)
        assert 0.6 <= stats.energy_retained <= 0.9 or stats.ratio in (26 / 256, 231 / 256)
        # From a limit there is no long way back.
        towards = hard if direction < 0 else easy
        there = compression.num_cells(256)
        compression.compress(towards)
        assert compression.num_cells(256) != there
    kept = DynamicCompression(8, **settings).double()
    kept.load_state_dict(compression.state_dict())
    assert kept.num_cells(256) == compression.num_cells(256)


@pytest.mark.parametrize(("alpha", "x"), [(100.0, tokens(1, 256, 8)), (0.01, smooth(256))])
def test_the_first_step_from_a_limit_takes_effect(alpha, x):
    compression = DynamicCompression(8, alpha=alpha).double()
    lengths = [compression.compress(x).shape[1] for _ in range(2)]
    assert lengths[0] == {100.0: 26, 0.01: 231}[alpha] and lengths[1] != lengths[0]


def test_the_ratio_stays_without_adaptation_and_in_evaluation():
    for compression in (DynamicCompression(8).eval(), DynamicCompression(8, enable_adaptive_compression=False)):
        for _ in range(3):
            assert compression.compress(tokens(1, 100, 8).float()).shape[1] == math.ceil(100 / math.log(100))


def test_the_cache_remembers_inputs():
    compression, x = scramble(fixed(cache_size=2)).eval(), tokens(1, 20, 8)
    with torch.no_grad():
        first = CompressedSequence(*(tensor.clone() for tensor in compression.compress(x)[:2]))
        again = compression.compress(x.clone())
        assert compression.cache.stats()[:2] == (1, 1)
        torch.testing.assert_close(again.cells, first.cells, rtol=0, atol=0)
        again.cells.zero_()
        torch.testing.assert_close(compression.compress(x).cells, first.cells, rtol=0, atol=0)
        for other in (x + 1, x + 2):
            compression.compress(other)
        assert len(compression.cache) == 2
        compression.compress(x)
        assert compression.cache.stats().misses == 4  # two others have taken its place
        # Other parameters, other cells.
        compression.pool_query.add_(1.0)
        assert not torch.allclose(compression.compress(x).cells, first.cells)
    calls = compression.cache.stats().hits + compression.cache.stats().misses
    compression.compress(x)  # with gradients
    compression.train()
    with torch.no_grad():
        compression.compress(x)
    assert compression.cache.stats().hits + compression.cache.stats().misses == calls
    assert fixed().cache is None
    quantized = fixed(cache_size=1, use_quantization=True).eval()
    with torch.no_grad():
        assert torch.equal(quantized.compress(x).dequantized(), quantized.compress(x).dequantized())
    assert quantized.cache.stats().hits == 1
    assert copy.deepcopy(compression).cache.max_entries == 2


# ---- learning


def test_updates_lower_the_error():
    x = torch.cat([smooth(100, noise=0.05), -2 * smooth(100)], dim=0)
    compression = fixed()
    before = compression.compress(x, return_stats=True)[1].energy_retained
    errors = [compression.update_compression_params(x) for _ in range(100)]
    assert errors[0] == pytest.approx(1 - before)
    assert all(later <= earlier + 1e-12 for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.5 * errors[0]
    assert all(parameter.grad is None for parameter in compression.parameters())
    assert 1 - compression.compress(x, return_stats=True)[1].energy_retained <= errors[-1]


def test_updates_take_a_loss_along():
    x, target = smooth(64), 0.5
    plain, steered = fixed(), fixed()
    for _ in range(50):
        plain.update_compression_params(x)
        steered.update_compression_params(x, 10 * (steered(x).mean() - target).square(), learning_rate=0.05)
    assert abs(steered(x).mean() - target) < 0.5 * abs(plain(x).mean() - target)
    with pytest.raises(ValueError, match=r"loss has shape \[\] and requires_grad=False; it must be a scalar"):
        plain.update_compression_params(x, torch.zeros(()))
    with pytest.raises(ValueError, match="learning_rate=0 must be positive"):
        plain.update_compression_params(x, learning_rate=0)


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("settings", [{}, {"use_quantization": True}, {"importance_threshold": 0.5}])
@pytest.mark.parametrize("length", [1, 2, 30])
def test_every_parameter_receives_a_gradient(levels, settings, length):
    if levels is None:
        module = DynamicCompression(8, **settings)
    else:
        module = HierarchicalCompression(8, levels, **settings)
    x = tokens(2, length, 8).float().requires_grad_()
    (module(x) - 2 * x).square().sum().backward()
    grads = [x.grad, *(parameter.grad for parameter in module.parameters())]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    if length == 30:
        assert all(torch.count_nonzero(grad) > 0 for grad in grads), length


def test_gradients_are_those_of_the_definition():
    compression, x = scramble(fixed(3, importance_threshold=0.9)), tokens(2, 9, 3).requires_grad_()
    assert torch.autograd.gradcheck(compression, (x,))


def test_gradients_pass_quantization():
    plain, quantized, x = scramble(fixed()), scramble(fixed(use_quantization=True)), tokens(1, 40, 8)
    for module in (plain, quantized):
        module(x).sum().backward()
    torch.testing.assert_close(plain.pool_query.grad, quantized.pool_query.grad)


@pytest.mark.parametrize("module", [DynamicCompression(8), HierarchicalCompression(8, 2, importance_threshold=0.5)])
def test_bf16_runs_and_stays_close(module):
    x = smooth(100, noise=0.1).float()
    expected = module.eval()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(x)
        compressed = module.compress(x, return_stats=True)[0]
        module.decompress(compressed, x.shape)
    torch.testing.assert_close(mixed.float(), expected, rtol=0, atol=0.03)
    plain = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert plain.dtype == torch.bfloat16
    assert (plain.float() - x).square().sum() < 1.1 * (expected - x).square().sum()


def test_initial_values_also_after_the_meta_device():
    with torch.device("meta"):
        later = HierarchicalCompression(8, 2)
    later.to_empty(device="cpu")
    for module in later.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    expected = HierarchicalCompression(8, 2).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in later.state_dict().items())


# ---- level by level


def test_levels_compress_the_cells_below():
    hierarchy, x = scramble(HierarchicalCompression(8, 3, alpha=0.7).double()).eval(), tokens(2, 100, 8)
    compressed = hierarchy.compress(x)
    below = x
    for level, made in zip(hierarchy.levels, compressed, strict=True):
        torch.testing.assert_close(made.cells, level.compress(below).cells, rtol=0, atol=0)
        below = made.cells
    lengths = [100, *(made.shape[1] for made in compressed)]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < lengths[1]
    for level in range(3):
        expanded = compressed[level].cells
        for index in reversed(range(level + 1)):
            shape = (2, lengths[index], 8)
            here = CompressedSequence(expanded, compressed[index].assignment)
            expanded = hierarchy.levels[index].decompress(here, shape)
        torch.testing.assert_close(hierarchy.decompress(compressed, x.shape, level), expanded, rtol=0, atol=0)
        torch.testing.assert_close(hierarchy.decompress(compressed[: level + 1], x.shape), expanded, rtol=0, atol=0)
    torch.testing.assert_close(hierarchy(x), expanded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("use_quantization", [False, True])
def test_higher_levels_keep_less(use_quantization):
    x = smooth(300, noise=0.3)
    hierarchy = HierarchicalCompression(8, 3, use_quantization=use_quantization).double().eval()
    compressed, stats = hierarchy.compress(x, return_stats=True)
    for column in ("ratio", "energy_retained", "bytes_ratio"):
        values = [getattr(level, column) for level in stats]
        assert values == sorted(values, reverse=True) and values[0] > values[-1], column
    error = (x - hierarchy.decompress(compressed, x.shape, 1)).square().sum() / x.square().sum()
    assert stats[1].energy_retained == pytest.approx(1 - error.item(), abs=1e-12)
    assert compressed[2].cells.dtype == (torch.int8 if use_quantization else torch.float64)


# ---- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0 must be an integer of at least 1"),
        ({"cache_size": -1}, "cache_size=-1 must be an integer of at least 0"),
        ({"min_compression_ratio": 0.0}, "min_compression_ratio=0.0 and max_compression_ratio=0.9"),
        ({"min_compression_ratio": 0.95}, "the first not above the second"),
        ({"max_compression_ratio": 1.5}, "max_compression_ratio=1.5"),
        ({"importance_threshold": -1.0}, "importance_threshold=-1.0 must not be negative"),
        ({"alpha": 0.0}, "alpha=0.0 must be positive"),
        ({"energy_band": (0.9, 0.8)}, r"energy_band=\(0.9, 0.8\)"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicCompression(**{"dim": 8, **settings})
    with pytest.raises(ValueError, match=message):
        HierarchicalCompression(**{"dim": 8, **settings})


def test_invalid_inputs_are_named():
    compression, hierarchy, x = fixed(), HierarchicalCompression(8, 2).double(), tokens(2, 20, 8)
    with pytest.raises(ValueError, match=r"x has shape \[2, 20, 7\]; it must be \[batch, tokens, 8\]"):
        compression.compress(x[..., :7])
    with pytest.raises(ValueError, match=r"x has shape \[2, 0, 8\]"):
        compression(x[:, :0])
    with pytest.raises(ValueError, match="x has dtype torch.int64"):
        hierarchy.compress(x.long())
    with pytest.raises(ValueError, match=r"shape=\(2, 21, 8\) does not fit cells of shape \[2, 5, 8\] of 20 tokens"):
        compression.decompress(compression.compress(x), (2, 21, 8))
    with pytest.raises(ValueError, match="at most as many cells as there are tokens"):
        compression.decompress(x, (2, 5, 8))
    with pytest.raises(ValueError, match=r"level=2 must lie in \[-2, 1\]"):
        hierarchy.decompress(hierarchy.compress(x), x.shape, 2)
    with pytest.raises(ValueError, match=r"shape=\(2, 21, 8\) does not fit cells of shape .* of 20 tokens"):
        hierarchy.decompress(hierarchy.compress(x), (2, 21, 8))
    with pytest.raises(ValueError, match="num_levels=0 must be an integer of at least 1"):
        HierarchicalCompression(8, 0)
    with pytest.raises(ValueError, match="length=0"):
        compression.num_cells(0)
