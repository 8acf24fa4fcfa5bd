import pytest
import torch

from danon_lightning.strategies.communication import (
    Bf16Compressor,
    Fp16Compressor,
    Int4Compressor,
    Int8Compressor,
    available_compressors,
    get_compressor,
)

BLOCK = 256
LEVELS = [(Int8Compressor, 127), (Int4Compressor, 7)]


def roundtrip(values, compressor):
    blocks = values.view(-1, compressor.block_size)
    payload = compressor.encode(blocks)
    assert payload.shape == (len(blocks), compressor.block_bytes)
    assert payload.dtype == torch.uint8
    return compressor.decode(payload).view(values.shape)


def samples():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(40, BLOCK, generator=generator)
    return {
        "normal": normal,
        "heavy-tailed": normal / torch.rand(40, BLOCK, generator=generator),
        "scales from 1e-30 to 1e30": normal * torch.logspace(-30, 30, 40)[:, None],
        "constant": torch.full((3, BLOCK), -2.5),
        "zero": torch.zeros(3, BLOCK),
        "one spike": torch.eye(BLOCK)[:5] * 1e4,
        "subnormal": normal * 1e-41,
        "near the largest float": torch.full((2, BLOCK), 0.999 * torch.finfo(torch.float32).max),
    }


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("block_size", [8, 64, 256])
@pytest.mark.parametrize(("kind", "levels"), LEVELS)
def test_quantization_stays_within_the_stated_bound(kind, levels, name, block_size):
    values = samples()[name].view(-1, block_size)
    decoded = roundtrip(values, kind(block_size))
    bound = values.abs().amax(dim=1, keepdim=True).double() / (2 * levels) * (1 + 1e-5) + levels * 1.18e-38
    assert torch.isfinite(decoded).all()
    assert ((decoded.double() - values.double()).abs() <= bound).all()


@pytest.mark.parametrize(("kind", "levels"), LEVELS)
def test_the_bound_is_reached(kind, levels):
    """Half a code step off: a tighter bound would be false."""
    values = torch.zeros(1, BLOCK)
    values[0, 0], values[0, 1] = levels, 0.5
    error = (roundtrip(values, kind(BLOCK)) - values).abs().max()
    assert error == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "relative", "absolute"), [(Fp16Compressor, 2.0**-11, 2.0**-25), (Bf16Compressor, 2.0**-8, 1e-40)]
)
def test_casts_stay_within_the_stated_bound(kind, relative, absolute):
    for name in ("normal", "constant", "zero", "one spike"):
        values = samples()[name].double()
        error = (roundtrip(values.float(), kind()).double() - values).abs()
        assert (error <= relative * values.abs() * (1 + 1e-6) + absolute).all()


def test_half_precision_overflows_visibly_and_bf16_does_not():
    values = torch.full((4, 1), 1e6)
    assert torch.isinf(roundtrip(values, Fp16Compressor())).all()
    assert torch.isfinite(roundtrip(values, Bf16Compressor())).all()


@pytest.mark.parametrize("name", available_compressors())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_value_spoils_its_block_and_no_other(name, bad):
    compressor = get_compressor(name)
    values = torch.randn(3, compressor.block_size)
    values[1, compressor.block_size // 2] = bad
    decoded = roundtrip(values, compressor)
    assert not torch.isfinite(decoded[1]).any()
    assert torch.isfinite(decoded[[0, 2]]).all()


@pytest.mark.parametrize("name", available_compressors())
def test_what_is_decoded_is_a_fixed_point(name):
    decoded = roundtrip(torch.randn(8, BLOCK), get_compressor(name))
    torch.testing.assert_close(roundtrip(decoded, get_compressor(name)), decoded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", available_compressors())
def test_the_name_is_the_one_it_is_found_by(name):
    assert get_compressor(name).name == name


@pytest.mark.parametrize(("kind", "block_size"), [(Int8Compressor, 0), (Int8Compressor, 6), (Int4Compressor, 4)])
def test_a_bad_block_size_is_refused(kind, block_size):
    with pytest.raises(ValueError, match=f"block_size={block_size}"):
        kind(block_size)


def test_compressors_are_found_by_name():
    assert get_compressor(None) is None
    assert isinstance(get_compressor("int8"), Int8Compressor)
    own = Int8Compressor(64)
    assert get_compressor(own) is own
    assert available_compressors() == ["bf16", "fp16", "int4", "int8"]


def test_an_unknown_compression_lists_the_valid_ones():
    with pytest.raises(ValueError, match="compression='int9' is not known; choose None .* 'int8'"):
        get_compressor("int9")
    with pytest.raises(TypeError, match="got int: 8"):
        get_compressor(8)
