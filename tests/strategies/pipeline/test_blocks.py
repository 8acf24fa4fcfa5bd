"""Finding the body of a module."""

import pytest
from staged_models import GPT, SequentialNet, VisionTransformer
from torch import nn

from danon_lightning.strategies.pipeline.blocks import find_blocks


def linear_list(width, count=2):
    return nn.ModuleList([nn.Linear(width, width) for _ in range(count)])


@pytest.mark.parametrize(
    ("make", "name"), [(GPT, "transformer.h"), (SequentialNet, "body"), (VisionTransformer, "encoder.layers")]
)
def test_the_only_candidate_is_found(make, name):
    model = make()
    blocks = find_blocks(model)

    assert blocks.name == name and len(blocks) == 4
    assert list(blocks.modules) == list(model.get_submodule(name))
    assert find_blocks(model, name) == blocks


def test_the_clearly_largest_candidate_is_found():
    model = nn.ModuleDict({"small": linear_list(2), "large": linear_list(8)})
    assert find_blocks(model).name == "large"


def test_a_named_list_may_have_blocks_of_several_types_and_any_size():
    model = nn.ModuleDict({"mixed": nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), "l": linear_list(8)})
    assert len(find_blocks(model, "mixed")) == 3


def test_candidates_of_like_size_are_listed():
    model = nn.ModuleDict({"encoder": linear_list(4), "decoder": linear_list(4, 3)})
    with pytest.raises(ValueError, match=r"several.*'encoder' \(2 × Linear, 40 parameters\), 'decoder' \(3 × .*Name"):
        find_blocks(model)


def test_no_candidate_is_said_so():
    with pytest.raises(ValueError, match="finds no nn.Sequential or nn.ModuleList .* in Linear"):
        find_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("transformer.x", "'transformer.x' is not a module of GPT; lists of blocks are: 'transformer.h'"),
        ("transformer.wte", "is a Embedding: it must be"),
        ("transformer.single", "has 1 blocks: at least two"),
        ("transformer.same", "contains the same block more than once"),
    ],
)
def test_a_wrong_name_is_refused(name, reason):
    model, linear = GPT(), nn.Linear(2, 2)
    model.transformer["single"] = nn.ModuleList([linear])
    model.transformer["same"] = nn.ModuleList([linear, linear])
    with pytest.raises(ValueError, match=reason):
        find_blocks(model, name)
