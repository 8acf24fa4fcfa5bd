import pytest
import torch

from danon_lightning.strategies.communication import Int8Compressor, available_compressors, get_compressor

BLOCK = 256


def roundtrip(values: torch.Tensor, block_size: int = BLOCK) -> torch.Tensor:
    compressor = Int8Compressor(block_size)
    blocks = values.view(-1, block_size)
    payload = compressor.encode(blocks)
    assert payload.shape == (len(blocks), compressor.block_bytes)
    assert payload.dtype == torch.uint8
    return compressor.decode(payload)


def samples() -> dict[str, torch.Tensor]:
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
@pytest.mark.parametrize("block_size", [4, 64, 256])
def test_error_stays_within_the_stated_bound(name, block_size):
    values = samples()[name].view(-1, block_size)
    decoded = roundtrip(values, block_size)
    bound = values.abs().amax(dim=1, keepdim=True).double() / 254 * (1 + 1e-5) + 1.5e-36
    assert torch.isfinite(decoded).all()
    assert ((decoded.double() - values.double()).abs() <= bound).all()


def test_the_bound_is_reached():
    """Half a code step off: a tighter bound would be false."""
    values = torch.zeros(1, BLOCK)
    values[0, 0], values[0, 1] = 127.0, 0.5
    error = (roundtrip(values) - values).abs().max()
    assert error == pytest.approx(127 / 254)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_value_spoils_its_block_and_no_other(bad):
    values = torch.randn(3, BLOCK)
    values[1, 17] = bad
    decoded = roundtrip(values)
    assert not torch.isfinite(decoded[1]).any()
    assert torch.isfinite(decoded[[0, 2]]).all()


def test_what_is_decoded_is_a_fixed_point():
    decoded = roundtrip(torch.randn(8, BLOCK))
    torch.testing.assert_close(roundtrip(decoded), decoded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("block_size", [0, -4, 6])
def test_a_bad_block_size_is_refused(block_size):
    with pytest.raises(ValueError, match=f"block_size={block_size}"):
        Int8Compressor(block_size)


def test_compressors_are_found_by_name():
    assert get_compressor(None) is None
    assert isinstance(get_compressor("int8"), Int8Compressor)
    own = Int8Compressor(64)
    assert get_compressor(own) is own
    assert available_compressors() == ["int8"]


def test_an_unknown_compression_lists_the_valid_ones():
    with pytest.raises(ValueError, match="compression='int9' is not known; choose None .* 'int8'"):
        get_compressor("int9")
    with pytest.raises(TypeError, match="got int: 8"):
        get_compressor(8)
