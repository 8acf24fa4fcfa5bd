"""Tensors without data."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from danon_lightning.strategies.pipeline.absent import Absent, find_absent
from danon_lightning.strategies.pipeline.errors import AbsentDataError


def absent(*shape, requires_grad=False, dtype=torch.float32):
    return Absent.like(torch.empty(*shape, dtype=dtype, requires_grad=requires_grad))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: (x @ x.transpose(-1, -2)).softmax(-1),
        lambda x: x.view(6, 4).t(),
        lambda x: torch.cat([x, torch.zeros(2, 3, 1)], -1),
        lambda x: F.layer_norm(x, (4,)),
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: x.half().to(torch.float64),
        lambda x: x[:, torch.tensor([True, False, True])],
        lambda x: x.masked_select(torch.tensor([True, False, False, True])),
        lambda x: x[torch.tensor([1, 0, 1])],
        lambda x: x.split(2, dim=-1)[1],
        lambda x: torch.where(torch.ones(4, dtype=torch.bool), x, 0.0),
        lambda x: x.max(-1)[1],
        lambda x: F.dropout(x, 0.5),
        lambda x: x.clone().add_(x),
    ],
)
def test_results_have_shape_and_dtype_of_the_true_ones_and_no_storage(operation):
    true, shape_only = operation(torch.randn(2, 3, 4)), operation(absent(2, 3, 4))

    assert isinstance(shape_only, Absent)
    assert (shape_only.shape, shape_only.dtype, shape_only.stride()) == (true.shape, true.dtype, true.stride())
    assert shape_only.device == true.device


def test_gradients_are_asked_for_as_of_true_tensors():
    x, weight = absent(2, 3), absent(3, 3, requires_grad=True)

    assert (x @ weight).requires_grad and not (x @ x.t()).requires_grad
    assert not (x @ weight).detach().requires_grad
    with torch.no_grad():
        assert not (x @ weight).requires_grad


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (torch.zeros_like, 0),
        (torch.ones_like, 1),
        (lambda x: torch.full_like(x, 7), 7),
        (lambda x: x.new_zeros(3), 0),
        (lambda x: x.new_full((2,), 5), 5),
        (lambda x: torch.ones(x.shape), 1),
    ],
)
def test_constants_made_like_it_are_real(make, value):
    made = make(absent(2, 3))
    assert type(made) is torch.Tensor and (made == value).all()


def test_random_numbers_made_like_it_are_those_of_a_true_tensor():
    torch.manual_seed(0)
    expected = torch.rand_like(torch.empty(3)), torch.randn_like(torch.empty(4))
    torch.manual_seed(0)
    made = torch.rand_like(absent(3)), torch.randn_like(absent(4))

    assert all(torch.equal(a, b) for a, b in zip(expected, made, strict=True))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.3),
        lambda x: F.dropout1d(x, 0.3),
        lambda x: torch.bernoulli(x),
        lambda x: torch.normal(x, 1.0),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        lambda x: x.clone().uniform_(),
        lambda x: F.gumbel_softmax(x),
    ],
)
def test_random_operations_advance_the_generator_as_if_the_data_were_there(draw):
    torch.manual_seed(0)
    draw(torch.full((2, 3, 4), 0.5))
    expected = torch.rand(())
    torch.manual_seed(0)
    draw(absent(2, 3, 4))

    assert torch.rand(()) == expected


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: int(x[0, 0]),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: f"{x.sum():.3f}",
        lambda x: torch.equal(x, x + 1),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.poisson(x),
        lambda x: F.rrelu(x, training=True),
    ],
)
def test_what_needs_data_is_refused_with_the_line(read):
    with pytest.raises(AbsentDataError, match=rf"{__file__}:{read.__code__.co_firstlineno} in <lambda>"):
        read(absent(2, 3))


@pytest.mark.parametrize(
    "write",
    [
        lambda x: torch.zeros(2, 3).add_(x),
        lambda x: torch.zeros(3, 3).__setitem__(slice(0, 2), x),
        lambda x: torch.zeros(2, 3).copy_(x),
        lambda x: torch.add(x, x, out=torch.zeros(2, 3)),
    ],
)
def test_writing_it_into_an_ordinary_tensor_is_refused_with_the_line(write):
    with pytest.raises(AbsentDataError, match=rf"into an ordinary tensor in place, at {__file__}:\d+ in <lambda>"):
        write(absent(2, 3))


def test_once_its_value_has_come_it_is_used():
    x = absent(2, 2, requires_grad=True)
    value = torch.tensor([[1.0, 2], [3, 4]], requires_grad=True)
    x.arrive(value)

    assert x.sum().item() == 10
    assert torch.cat([x, torch.ones(1, 2)]).shape == (3, 2)
    (x * 3).sum().backward()
    assert torch.equal(value.grad, torch.full((2, 2), 3.0))
    assert find_absent({"a": [x]}) is None


def test_copies_have_no_data_either_and_saving_is_refused():
    parameter = Absent.like(nn.Parameter(torch.ones(2)), name="body.weight")
    copied = copy.deepcopy(parameter)

    assert isinstance(copied, nn.Parameter) and isinstance(copied, Absent) and copied.requires_grad
    assert repr(copied) == "Absent(body.weight, shape=(2,), dtype=torch.float32)"
    with pytest.raises(AbsentDataError, match="body.weight.*cannot be saved"):
        pickle.dumps(parameter)
