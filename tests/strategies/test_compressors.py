import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danon_lightning.strategies.communication import kernels
from danon_lightning.strategies.communication.compressors import (
    Bf16Compressor,
    Compressor,
    Fp16Compressor,
    Int4Compressor,
    Int8Compressor,
    LinearCompressor,
    SignCompressor,
    TopKCompressor,
    available_compressors,
    get_compressor,
)
from danon_lightning.strategies.communication.compressors.base import Context
from danon_lightning.strategies.communication.kernels import loading

SIZES = [1, 2, 7, 31, 64, 255, 256, 257, 2049, 5000, 40_000]
LEVELS = [(Int8Compressor, 127), (Int4Compressor, 7)]
CODECS = {
    "bf16": Bf16Compressor(),
    "fp16": Fp16Compressor(),
    "int8": Int8Compressor(),
    "int8, blocks of 4": Int8Compressor(4),
    "int8, stochastic": Int8Compressor(stochastic=True),
    "int4": Int4Compressor(),
    "int4, blocks of 8": Int4Compressor(8),
    "int4, stochastic": Int4Compressor(stochastic=True),
    "sign": SignCompressor(),
    "sign, blocks of 32": SignCompressor(32),
    "topk": TopKCompressor(),
    "topk 30 %": TopKCompressor(0.3),
    "topk 100 %": TopKCompressor(1.0),
}


@pytest.fixture(params=["kernels", "eager"], autouse=True)
def implementation(request, monkeypatch):
    """Each test holds compiled kernels and eager torch to the same."""
    if request.param == "eager":
        monkeypatch.setattr(loading, "library", lambda: None)
    elif not kernels.available():
        pytest.skip("the kernels cannot be built here")


@pytest.fixture(params=CODECS)
def compressor(request):
    return CODECS[request.param]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encode(compressor, values, context=None):
    """Into memory that holds something else."""
    context = context or Context()
    payload = torch.full((compressor.payload_bytes(values.numel(), context.step),), 0xAA, dtype=torch.uint8)
    before = values.clone()
    compressor.encode(values, payload, context)
    assert torch.equal(values.view(torch.int32), before.view(torch.int32))
    return payload


def decode(compressor, payload, numel):
    out = torch.full((numel,), torch.nan)
    compressor.decode(payload, out)
    return out


def roundtrip(compressor, values, context=None):
    return decode(compressor, encode(compressor, values, context), values.numel())


def by_block(values, block_size):
    """Rows of ``block_size``, the last filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.numel() % block_size)).view(-1, block_size)


def samples():
    normal = randn(40, 256)
    return {
        "normal": normal,
        "heavy-tailed": normal / torch.rand(40, 256, generator=torch.Generator().manual_seed(0)),
        "scales from 1e-30 to 1e30": normal * torch.logspace(-30, 30, 40)[:, None],
        "constant": torch.full((3, 256), -2.5),
        "zero": torch.zeros(3, 256),
        "one spike": torch.eye(256)[:5] * 1e4,
        "subnormal": normal * 1e-41,
        "near the largest float": torch.full((2, 256), 0.999 * torch.finfo(torch.float32).max),
        "odd size": randn(5000 + 37),
        "one element": torch.tensor([-3.0]),
    }


# ---- all compressors


@pytest.mark.parametrize("numel", SIZES)
def test_payloads_are_no_longer_than_promised_and_written_throughout(compressor, numel):
    values = randn(numel)
    assert compressor.payload_bytes(numel, 0) <= 4 * numel + 64
    payload, other = encode(compressor, values), torch.zeros(compressor.payload_bytes(numel, 0), dtype=torch.uint8)
    compressor.encode(values, other, Context())
    assert torch.equal(payload, other)


@pytest.mark.parametrize(
    ("codec", "numel", "size"),
    [
        ("fp16", 7, 14),
        ("int8", 257, 2 * 4 + 260),
        ("int4", 67, 2 * 4 + 36),
        ("sign", 2049, 2 * 4 + 260),
        ("topk", 5001, 8 + 8 * 51),
        ("topk 100 %", 10, 8 + 40),
    ],
)
def test_payload_sizes(codec, numel, size):
    assert CODECS[codec].payload_bytes(numel, 0) == size


@pytest.mark.parametrize("numel", SIZES)
def test_decoding_can_add(compressor, numel):
    payload, onto = encode(compressor, randn(numel)), randn(numel, seed=1)
    expected = onto + decode(compressor, payload, numel)
    compressor.decode(payload, onto, add=True)
    assert torch.equal(onto, expected)


@pytest.mark.parametrize("numel", SIZES)
def test_fused_feedback_is_the_plain_one(compressor, numel):
    """Equal to the bit: the payload, the new residual and the state."""
    values, residual = randn(numel), randn(numel, seed=1)
    results = []
    for encode_with_feedback in (type(compressor).encode_with_feedback, Compressor.encode_with_feedback):
        context = Context(seed=3)
        payload = torch.full((compressor.payload_bytes(numel, 0),), 0xAA, dtype=torch.uint8)
        new_residual = torch.full((numel,), torch.nan)
        encode_with_feedback(compressor, values, residual, 0.75, new_residual, payload, context)
        results.append((payload, new_residual, context.new_state))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


@pytest.mark.parametrize("numel", [1, 7, 257, 5000, 40_000])
def test_nothing_is_lost_under_feedback(compressor, numel):
    """What was sent and what is left add up to what came in."""
    residual, state = torch.zeros(numel), {}
    given_, sent = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    largest = 0.0
    for step in range(40):
        values = randn(numel, seed=step) + 0.1
        context = Context(step=step, seed=step, state=state)
        payload = torch.empty(compressor.payload_bytes(numel, step), dtype=torch.uint8)
        new_residual = torch.full((numel,), torch.nan)
        compressor.encode_with_feedback(values, residual, 1.0, new_residual, payload, context)
        given_ += values
        sent += decode(compressor, payload, numel)
        residual, state = new_residual, context.new_state
        largest = max(largest, float(given_.abs().max()), float(residual.abs().max()))
    assert (sent + residual - given_).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("numel", [1, 300, 5000])
def test_a_non_finite_value_spoils_its_block_and_no_other(compressor, numel, bad):
    values, place = randn(numel), numel * 2 // 3
    values[place] = bad
    finite = torch.isfinite(roundtrip(compressor, values))
    if compressor.exchange == "gather":
        assert not finite.any()
    else:
        spoilt = torch.arange(numel) // compressor.alignment == place // compressor.alignment
        assert torch.equal(finite, ~spoilt)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_in_the_residual_is_not_hidden(compressor, bad):
    residual = torch.zeros(300)
    residual[200] = bad
    payload = torch.empty(compressor.payload_bytes(300, 0), dtype=torch.uint8)
    context = Context()
    compressor.encode_with_feedback(randn(300), residual, 1.0, torch.empty(300), payload, context)
    assert not torch.isfinite(decode(compressor, payload, 300)[200])
    assert not context.new_state


@pytest.mark.parametrize("codec", [name for name in CODECS if "stochastic" not in name])
@pytest.mark.parametrize("numel", [1, 257, 5000])
def test_what_is_decoded_is_a_fixed_point(codec, numel):
    decoded = roundtrip(CODECS[codec], randn(numel))
    torch.testing.assert_close(roundtrip(CODECS[codec], decoded), decoded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["zero", "subnormal", "constant", "one element"])
def test_special_tensors_stay_finite(compressor, name):
    values = samples()[name].flatten()
    decoded = roundtrip(compressor, values)
    assert torch.isfinite(decoded).all()
    assert decoded.abs().max() <= values.abs().max() * (1 + 1e-5)


# ---- quantization


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("block_size", [8, 64, 256, 264])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("kind", "levels"), LEVELS)
def test_quantization_stays_within_the_stated_bound(kind, levels, stochastic, name, block_size):
    values = samples()[name].flatten()
    decoded = roundtrip(kind(block_size, stochastic), values)
    assert torch.isfinite(decoded).all()
    blocks, error = by_block(values, block_size).double(), by_block(decoded.double() - values.double(), block_size)
    bound = blocks.abs().amax(dim=1, keepdim=True) / (levels if stochastic else 2 * levels)
    assert (error.abs() <= bound * (1 + 1e-5) + levels * 1.18e-38).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70))
@pytest.mark.parametrize(("kind", "levels"), LEVELS)
def test_quantization_stays_within_the_stated_bound_on_any_floats(kind, levels, values):
    values = torch.tensor(values).clamp(-3e38, 3e38)
    error = by_block(roundtrip(kind(16), values).double() - values.double(), 16)
    bound = by_block(values.double(), 16).abs().amax(dim=1, keepdim=True) / (2 * levels)
    assert (error.abs() <= bound * (1 + 1e-5) + levels * 1.18e-38).all()


@pytest.mark.parametrize(("kind", "levels"), LEVELS)
def test_the_bound_is_reached(kind, levels):
    """Half a code step off: a tighter bound would be false."""
    values = torch.zeros(256)
    values[0], values[1] = levels, 0.5
    error = (roundtrip(kind(256), values) - values).abs().max()
    assert error == pytest.approx(0.5)


@pytest.mark.parametrize(("kind", "levels"), LEVELS)
def test_the_last_block_has_a_scale_of_its_own(kind, levels):
    values = torch.full((257,), 1000.0)
    values[256] = 1e-3
    assert roundtrip(kind(256), values)[256] == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize(("kind", "levels"), LEVELS)
def test_stochastic_rounding_is_right_on_average(kind, levels):
    draws, values = 900, torch.linspace(-levels, levels, 256)  # a step of the code is 1
    compressor = kind(256, stochastic=True)
    mean = torch.stack([roundtrip(compressor, values, Context(seed=seed)) for seed in range(draws)]).double().mean(0)
    # Five standard deviations of at most 1/2 for a draw: 0.083, where rounding to nearest is off by up to 0.5.
    assert (mean - values).abs().max() <= 5 * 0.5 / math.sqrt(draws)
    assert (roundtrip(kind(256), values) - values).abs().max() > 0.4


def test_stochastic_rounding_is_repeated_with_the_seed():
    compressor, values = Int8Compressor(stochastic=True), randn(1000)
    payload = encode(compressor, values, Context(seed=1))
    assert torch.equal(payload, encode(compressor, values, Context(seed=1)))
    assert not torch.equal(payload, encode(compressor, values, Context(seed=2)))


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize(
    ("codec", "delta"),
    [("int8", 1 - 256 / 254**2), ("int4", 1 - 64 / 14**2), ("sign", 1 / 2048), ("sign, blocks of 32", 1 / 32)],
)
def test_dense_codes_contract(codec, delta, name):
    values = samples()[name].flatten()
    if name == "subnormal":  # sent as zeros
        delta = 0.0
    error = roundtrip(CODECS[codec], values).double() - values.double()
    blocks, errors = (by_block(x.double(), CODECS[codec].block_size).square().sum(1) for x in (values, error))
    assert (errors <= (1 - delta) * blocks * (1 + 1e-6)).all()


# ---- casts


@pytest.mark.parametrize(
    ("kind", "relative", "absolute"), [(Fp16Compressor, 2.0**-11, 2.0**-25), (Bf16Compressor, 2.0**-8, 1e-40)]
)
def test_casts_stay_within_the_stated_bound(kind, relative, absolute):
    for name in ("normal", "constant", "zero", "one spike"):
        values = samples()[name].flatten().double()
        error = (roundtrip(kind(), values.float()).double() - values).abs()
        assert (error <= relative * values.abs() * (1 + 1e-6) + absolute).all()


@pytest.mark.parametrize(("kind", "delta"), [(Fp16Compressor, 1 - 2.0**-22), (Bf16Compressor, 1 - 2.0**-16)])
def test_casts_contract(kind, delta):
    values = randn(5000).sign() * (randn(5000, seed=1).abs() + 1e-4)
    error = (roundtrip(kind(), values).double() - values.double()).square().sum()
    assert 0 < error <= (1 - delta) * values.double().square().sum()


def test_half_precision_overflows_visibly_and_bf16_does_not():
    values = torch.full((4,), 1e6)
    assert torch.isinf(roundtrip(Fp16Compressor(), values)).all()
    assert torch.isfinite(roundtrip(Bf16Compressor(), values)).all()


# ---- signs


@pytest.mark.parametrize("numel", SIZES)
def test_signs_are_kept_and_scaled_by_the_mean(numel):
    values = randn(numel)
    decoded = roundtrip(SignCompressor(32), values)
    assert torch.equal(torch.signbit(decoded), torch.signbit(values))
    for start in range(0, numel, 32):
        mean = values[start : start + 32].double().abs().mean()
        torch.testing.assert_close(decoded[start : start + 32].abs().double(), mean.expand(min(32, numel - start)))


def test_signs_reach_their_contraction():
    """The error is ‖x‖² − ‖x‖₁²/d exactly: 1/d with one element, 2/π for a normal distribution, 1 for a constant."""
    spike = torch.eye(2048)[5]
    for values, delta, tolerance in (
        (spike, 1 / 2048, 1e-6),
        (randn(1 << 18), 2 / math.pi, 0.005),
        (spike + 1, 1, 1e-3),
    ):
        error = (roundtrip(SignCompressor(), values).double() - values.double()).square().sum()
        assert 1 - error / values.double().square().sum() == pytest.approx(delta, abs=tolerance)


def test_the_bit_order_of_signs():
    values = torch.ones(35)
    values[[0, 3, 9, 34]] = -1
    payload = encode(SignCompressor(64), values)
    assert payload[:4].view(torch.float32) == 1
    assert payload[4:].tolist() == [0b1001, 0b10, 0, 0, 0b100, 0, 0, 0]


# ---- Top-K


def test_topk_without_ties_in_a_small_region_is_exact():
    for numel in (7, 100, 5000, 8192):
        values, compressor = randn(numel), TopKCompressor(0.05)
        k = math.ceil(0.05 * numel)
        expected = torch.zeros(numel)
        chosen = values.abs().topk(k).indices
        expected[chosen] = values[chosen]
        decoded = roundtrip(compressor, values)
        assert torch.equal(decoded, expected)
        error = (decoded - values).double().square().sum()
        assert error <= (1 - k / numel) * values.double().square().sum()


def run_topk(compressor, numel, steps, make):
    """Feedback over some steps; yields step, total, payload, residual and state."""
    residual, state = torch.zeros(numel), {}
    for step in range(steps):
        values, context = make(step), Context(step=step, state=state)
        payload = torch.empty(compressor.payload_bytes(numel, step), dtype=torch.uint8)
        new_residual = torch.empty(numel)
        compressor.encode_with_feedback(values, residual, 1.0, new_residual, payload, context)
        total = values + residual
        residual, state = new_residual, context.new_state
        yield step, total, payload, residual, state


def test_topk_contracts_by_what_it_sends_when_all_that_passed_was_sent():
    compressor, numel, held = TopKCompressor(0.01), 100_000, 0
    k = math.ceil(0.01 * numel)
    for _, total, payload, residual, _ in run_topk(compressor, numel, 200, lambda step: randn(numel, seed=step)):
        count = int(payload[:4].view(torch.int32))
        if count == k:
            continue  # more may have passed
        held += 1
        error, energy = residual.double().square().sum(), total.double().square().sum()
        assert error <= (1 - count / numel) * energy
    assert held >= 10


@pytest.mark.parametrize("persistent", [False, True])
def test_topk_reuses_and_corrects_its_threshold(persistent):
    """Once settled. Gradients that persist make elements reach the threshold in waves, and some waves cost a sample."""
    compressor, numel = TopKCompressor(0.01), 100_000
    k, gradient = math.ceil(0.01 * numel), randn(numel, seed=-1) * persistent
    fills, reused = [], []
    steps = run_topk(compressor, numel, 200, lambda step: gradient + randn(numel, seed=step))
    for step, _, payload, _, state in steps:
        if step >= 100:
            fills.append(int(payload[:4].view(torch.int32)) / k)
            reused.append("threshold" in state)
    assert sum(fills) / len(fills) > (0.85 if persistent else 0.95)
    assert min(fills) > (0.4 if persistent else 0.8)
    assert sum(reused) / len(reused) > (0.6 if persistent else 0.99)


def test_topk_keeps_no_threshold_that_missed():
    compressor, values = TopKCompressor(0.01), randn(50_000)
    for threshold, kept in ((1e3, False), (1e-3, False), (float(values.abs().kthvalue(49_500).values), True)):
        context = Context(state={"threshold": threshold})
        encode(compressor, values, context)
        assert ("threshold" in context.new_state) == kept


def test_topk_moves_its_threshold_towards_the_density():
    values = randn(50_000)
    for rank, rises in ((400, False), (600, True)):
        threshold = float(values.abs().topk(rank).values[-1])
        context = Context(state={"threshold": threshold})
        encode(TopKCompressor(0.01), values, context)
        assert (context.new_state["threshold"] > threshold) == rises


def test_topk_starves_no_element_where_all_pass():
    compressor, numel = TopKCompressor(0.01), 20_000
    sent = torch.zeros(numel)
    for *_, payload, _, _ in run_topk(compressor, numel, 400, lambda step: torch.ones(numel)):
        sent += decode(compressor, payload, numel) != 0
    assert sent.min() > 0


@pytest.mark.parametrize("numel", [1, 2, 7, 255, 5000])
@pytest.mark.parametrize("density", [0.5, 0.9999, 1.0])
def test_topk_sends_everything_where_that_is_shorter(numel, density):
    values = randn(numel)
    assert torch.equal(roundtrip(TopKCompressor(density), values), values)


def test_topk_fills_its_message_with_constants():
    decoded = roundtrip(TopKCompressor(0.01), torch.full((5000,), -2.5))
    assert (decoded == -2.5).sum() == 50
    assert (decoded == 0).sum() == 4950


def test_topk_does_not_send_zeros():
    assert int(encode(TopKCompressor(0.01), torch.zeros(5000))[:4].view(torch.int32)) == 0


def test_topk_warms_up_exponentially():
    compressor = TopKCompressor(0.01, warmup_steps=4, warmup_density=0.16)
    densities = [compressor.density_at(step) for step in range(7)]
    assert densities == pytest.approx([0.16, 0.08, 0.04, 0.02, 0.01, 0.01, 0.01])
    assert compressor.payload_bytes(1000, 1) == 8 + 8 * 80
    assert TopKCompressor(0.01).density_at(0) == 0.01
    decoded = roundtrip(compressor, randn(1000), Context(step=1))
    assert (decoded != 0).sum() == 80


def test_topk_prefers_dense_past_the_crossover():
    compressor = TopKCompressor(0.01, warmup_steps=10)
    assert compressor.prefers_dense(0, 2)
    assert not compressor.prefers_dense(10, 2)
    assert not compressor.prefers_dense(10, 25)
    assert compressor.prefers_dense(10, 26)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, "density=0.0"),
        ({"density": 1.5}, "density=1.5"),
        ({"density": math.nan}, "density=nan"),
        ({"warmup_density": 0}, "warmup_density=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"density": 0.5, "warmup_steps": 3}, "warmup_density=0.25 must be at least density=0.5"),
    ],
)
def test_topk_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopKCompressor(**arguments)


@pytest.mark.parametrize(("position", "value"), [(0, 51), (0, -2), (2, 5000), (2, -1)])
def test_topk_refuses_damaged_messages(position, value):
    compressor = TopKCompressor(0.01)
    payload = encode(compressor, randn(5000))
    payload.view(torch.int32)[position] = value
    with pytest.raises(ValueError, match="damaged Top-K message"):
        decode(compressor, payload, 5000)


# ---- the registry


@pytest.mark.parametrize("name", available_compressors())
def test_the_name_is_the_one_it_is_found_by(name):
    assert get_compressor(name).name == name


@pytest.mark.parametrize(
    ("kind", "block_size"),
    [(Int8Compressor, 0), (Int8Compressor, 6), (Int4Compressor, 4), (SignCompressor, 16), (SignCompressor, 96)],
)
def test_a_bad_block_size_is_refused(kind, block_size):
    with pytest.raises(ValueError, match=f"block_size={block_size}"):
        kind(block_size)


def test_compressors_are_found_by_name():
    assert get_compressor(None) is None
    assert isinstance(get_compressor("int8"), Int8Compressor)
    own = Int8Compressor(64)
    assert get_compressor(own) is own
    assert available_compressors() == ["bf16", "fp16", "int4", "int8", "powersgd", "randomk", "sign", "topk"]
    assert isinstance(get_compressor("powersgd"), LinearCompressor)


def test_an_unknown_compression_lists_the_valid_ones():
    with pytest.raises(ValueError, match="compression='int2' is not known; choose None .* 'int8'"):
        get_compressor("int2")
    with pytest.raises(TypeError, match="got int: 8"):
        get_compressor(8)
