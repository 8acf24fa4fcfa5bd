"""What a dry run finds out, and that it leaves no trace."""

import copy
import random

import numpy
import torch
from staged_models import GPT, CrossAttending, MaskedGPT, ReadingTailGPT
from staged_runs import make_batch

from danon_lightning.strategies.pipeline.absent import Absent
from danon_lightning.strategies.pipeline.blocks import find_blocks
from danon_lightning.strategies.pipeline.dry_run import batch_signature, dry_run
from danon_lightning.strategies.pipeline.ownership import find_owners, shared
from danon_lightning.strategies.pipeline.recording import HEAD, Cuts, position_of


def record(model, batch=None):
    batch = batch or make_batch()
    return dry_run(model, find_blocks(model), lambda: model(*batch))


def test_parameters_are_found_where_they_are_used():
    uses = record(GPT(tied=True)).uses
    tail = position_of(3) + 1

    assert uses["transformer.wte.weight"] == {HEAD, tail}
    assert uses["transformer.wpe.weight"] == {HEAD}
    assert uses["transformer.h.2.norm1.weight"] == {position_of(2)}
    assert uses["transformer.ln_f.bias"] == {tail}


def test_buffers_are_found_where_they_are_used():
    assert record(MaskedGPT()).uses["frequencies"] == {HEAD}


def test_what_must_travel_is_what_the_next_block_gets_of_absent_data():
    batch = make_batch(size=2)
    plain, masked, crossing = record(GPT(), batch), record(MaskedGPT(), batch), record(CrossAttending(), batch)

    assert [list(block.arrives) for block in plain.blocks] == [["[0][0]"]] * 4
    travelling = plain.blocks[2].arrives["[0][0]"]
    assert travelling.meta.shape == (2, 8, 16) and travelling.requires_grad
    # The mask and the rotary table are made from the batch on every stage.
    assert list(masked.blocks[2].arrives) == ["[0][0]", "[1]['first']"]
    assert list(crossing.blocks[1].arrives) == ["[0][0]", "[1]['memory']"]


def test_what_is_frozen_below_a_cut_needs_no_gradient():
    model = GPT(tied=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("transformer.w", "transformer.h.0", "transformer.h.1")))

    blocks = record(model).blocks

    assert [block.arrives["[0][0]"].requires_grad for block in blocks] == [False, False, False, True]


class CountingGPT(ReadingTailGPT):
    """Changes attributes, a buffer, a list, a dictionary and hooks while it runs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.calls, self.cache = 0, {}

    def body(self, x, tokens):
        self.calls += 1
        self.steps += 1
        self.cache[len(self.cache)] = tokens
        self.new = "attribute"
        self.register_buffer("late", torch.ones(2))
        self.transformer.h[0].register_forward_hook(lambda module, args, output: None)
        return super().body(x, tokens)


def test_a_dry_run_leaves_no_trace():
    torch.manual_seed(0)
    model = CountingGPT()
    before = copy.deepcopy(model)
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    expected = random.random(), numpy.random.rand(), torch.rand(())
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)

    recording = record(model)

    assert (random.random(), numpy.random.rand(), torch.rand(())) == expected
    assert recording.tail_reads and recording.tail_problem is None
    assert model.__dict__.keys() == before.__dict__.keys()
    assert (model.calls, model.steps, model.seen, model.history, model.cache) == (0, 0, 0, [], {})
    assert not model.transformer.h[0]._forward_hooks
    assert model.state_dict().keys() == before.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]) and not isinstance(value, Absent)
    assert all(parameter.grad is None for parameter in model.parameters())


class FailingTailGPT(GPT):
    def loss(self, logits, labels):
        raise LookupError("no such metric")


def test_where_the_tail_cannot_be_followed_the_last_stage_holds_all_that_it_may_need():
    model = FailingTailGPT(tied=False)
    recording = record(model)
    owners = find_owners(model, find_blocks(model), Cuts((0, 2, 4)), [recording])

    assert recording.tail_problem == "LookupError: no such metric"
    assert owners["transformer.wpe.weight"] == (0, 1)
    assert owners["lm_head.weight"] == (1,)
    assert owners["transformer.h.0.norm1.weight"] == (0,)


def test_owners_are_all_stages_that_use_a_parameter():
    model = GPT(tied=True)
    owners = find_owners(model, find_blocks(model), Cuts((0, 1, 3, 4)), [record(model)])

    assert shared(owners) == {"transformer.wte.weight": (0, 2)}
    assert "lm_head.weight" not in owners  # the same parameter goes by its first name
    assert [owners[f"transformer.h.{index}.norm1.weight"] for index in range(4)] == [(0,), (1,), (1,), (2,)]


def test_a_dry_run_works_where_parameters_are_absent_already():
    model = GPT()
    full = record(model)
    for block in model.transformer.h[:2]:
        block.norm1._parameters["weight"] = Absent.like(block.norm1.weight, name="whatever")

    again = record(model)

    assert again.uses == full.uses
    assert isinstance(model.transformer.h[0].norm1.weight, Absent)


def test_batches_of_one_signature_share_a_recording():
    model = GPT(tied=False)
    signature = batch_signature(model, make_batch(seed=1))

    assert signature == batch_signature(model, make_batch(seed=2)) and hash(signature) is not None
    assert signature != batch_signature(model, make_batch(size=5))
    assert signature != batch_signature(model, {"tokens": make_batch()[0]})
    with torch.no_grad():
        assert signature != batch_signature(model, make_batch())
    model.lm_head.weight.requires_grad_(False)
    assert signature != batch_signature(model, make_batch())
    model.lm_head.weight.requires_grad_(True)
    model.eval()
    assert signature != batch_signature(model, make_batch())
