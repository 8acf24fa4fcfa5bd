"""Inverses of triangular matrices against the solver of linear systems."""

import pytest
import torch
import torch.nn.functional as F

from danon_lightning.attention.functional import gated_delta_rule, gated_delta_rule_reference
from danon_lightning.attention.linear.inverse import unit_lower_inverse


def unit_lower(matrix):
    return matrix.tril(-1) + torch.eye(matrix.shape[-1], dtype=matrix.dtype)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 32, 48, 63, 64, 100, 128])
def test_inverse_times_matrix_is_the_identity(size):
    torch.manual_seed(size)
    matrix = torch.randn(3, size, size, dtype=torch.float64) / size**0.5
    inverse = unit_lower_inverse(matrix)
    expected = torch.eye(size, dtype=torch.float64).expand_as(matrix)
    torch.testing.assert_close(inverse @ unit_lower(matrix), expected, rtol=0, atol=1e-11)
    assert torch.count_nonzero(inverse.triu(1)) == 0


def test_the_upper_part_is_not_read():
    torch.manual_seed(0)
    matrix = torch.randn(2, 64, 64, dtype=torch.float64) / 8
    spoilt = torch.where(torch.ones(64, 64, dtype=torch.bool).tril(-1), matrix, float("nan"))
    torch.testing.assert_close(unit_lower_inverse(spoilt), unit_lower_inverse(matrix), rtol=0, atol=0)


@pytest.mark.parametrize("sign", [1.0, -0.1])
def test_matrices_whose_powers_are_astronomic_are_inverted_accurately(sign):
    # What a token that repeats 64 times gives: the powers have entries of up to 1e18, the inverse of at most 40.
    matrix = torch.full((1, 64, 64), sign)
    expected = torch.linalg.inv(unit_lower(matrix.double()))
    found = unit_lower_inverse(matrix).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_a_token_that_repeats_leaves_the_delta_rule_accurate_in_float32():
    torch.manual_seed(0)
    key = F.normalize(torch.randn(1, 2, 1, 16), dim=-1).expand(-1, -1, 150, -1)
    values, nothing = torch.randn(1, 2, 150, 16), torch.zeros(1, 2, 150)
    ours = gated_delta_rule(key, key, values, nothing, torch.ones(1, 2, 150))
    exact = gated_delta_rule_reference(*(x.double() for x in (key, key, values, nothing, torch.ones(1, 2, 150))))
    for mine, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[0], values, rtol=0, atol=1e-5)


def test_there_is_no_second_derivative_and_it_says_so():
    tensors = [torch.randn(1, 1, 20, 4, requires_grad=True) for _ in range(3)]
    output, _ = gated_delta_rule(*tensors, torch.zeros(1, 1, 20), torch.ones(1, 1, 20))
    [grad] = torch.autograd.grad(output.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
