"""What cannot be cut into stages is refused with the reason and the line of code, and nothing else is."""

import inspect
import re

import pytest
import torch
from staged_models import GPT, Block, MixtureGPT
from staged_runs import make_batch, plain_step, prepare
from torch.utils.checkpoint import checkpoint

from danon_lightning.strategies.pipeline.blocks import find_blocks
from danon_lightning.strategies.pipeline.dry_run import dry_run
from danon_lightning.strategies.pipeline.errors import UnsupportedStepError
from danon_lightning.strategies.pipeline.passage import MicroBatch
from danon_lightning.strategies.pipeline.recording import Cuts


def line_with(function, text):
    """The one line of a function that contains ``text``, as errors name it."""
    lines, first = inspect.getsourcelines(function)
    (offset,) = [index for index, line in enumerate(lines) if text in line]
    return rf"{re.escape(inspect.getsourcefile(function))}:{first + offset} in "


def refusal(model, step=plain_step, batch=None):
    batch = batch or make_batch()
    with pytest.raises(UnsupportedStepError) as caught:
        dry_run(model, find_blocks(model), lambda: step(model, batch))
    return str(caught.value)


def obstacles(model, step=plain_step):
    """Why the step cannot be cut, by block."""
    batch = make_batch()
    recording = dry_run(model, find_blocks(model), lambda: step(model, batch))
    return {index: block.obstacle for index, block in enumerate(recording.blocks) if block.obstacle}


class CalledTwice(GPT):
    def body(self, x, tokens):
        h = self.transformer.h
        x = h[1](h[0](x))
        x = h[1](x)  # again
        return h[3](h[2](x))


class Skipping(GPT):
    def body(self, x, tokens):
        for index, block in enumerate(self.transformer.h):
            if index != 2:
                x = block(x)  # not all
        return x


class OutOfOrder(GPT):
    def body(self, x, tokens):
        for block in reversed(self.transformer.h):
            x = block(x)  # backwards
        return x


class EndingEarly(GPT):
    def body(self, x, tokens):
        return self.transformer.h[1](self.transformer.h[0](x))


class Reading(GPT):
    def body(self, x, tokens):
        for index, block in enumerate(self.transformer.h):
            if index == 2 and x.abs().mean() > 1e9:  # read
                x = x / 2
            x = block(x)
        return x


class ReadingItem(GPT):
    def body(self, x, tokens):
        self.size = x.mean().item()  # read
        return super().body(x, tokens)


class ReadingAsNumpy(GPT):
    def body(self, x, tokens):
        self.values = x.detach().numpy()  # read
        return super().body(x, tokens)


class ReadingAndCatching(GPT):
    def body(self, x, tokens):
        try:
            self.size = float(x.mean())  # read
        except Exception:
            self.size = 0.0
        return super().body(x, tokens)


class SelectingByValue(GPT):
    def body(self, x, tokens):
        x[x > 0].sum()  # read
        return super().body(x, tokens)


class WritingInPlace(GPT):
    def body(self, x, tokens):
        padded = torch.zeros(len(x), x.shape[1] + 1, x.shape[2])
        padded[:, 1:] = x  # write
        return super().body(padded, tokens)[:, 1:]


class LongSkip(GPT):
    def body(self, x, tokens):
        h = self.transformer.h
        kept = h[0](x) * 2  # made
        x = h[2](h[1](kept + 1))
        return h[3](x + kept)  # used


class SideChannelBlock(Block):
    def forward(self, x, mask=None):
        x = super().forward(x, mask)
        self.penalty = x.pow(2).mean()  # made
        return x


class SideChannel(GPT):
    block = SideChannelBlock

    def loss(self, logits, labels):
        return super().loss(logits, labels) + sum(block.penalty for block in self.transformer.h)


class Reentrant(GPT):
    def body(self, x, tokens):
        for block in self.transformer.h:
            x = checkpoint(block, x, use_reentrant=True)  # reentrant
        return x


class CheckpointedInPairs(GPT):
    def body(self, x, tokens):
        h = self.transformer.h
        for first in (0, 2):
            x = checkpoint(lambda x, first=first: h[first + 1](h[first](x)), x, use_reentrant=False)
        return x


class Opaque:
    def __init__(self, hidden):
        self.hidden = hidden


class OpaqueBlock(Block):
    def forward(self, x, mask=None):
        return Opaque(super().forward(x, mask))


class OpaqueResults(GPT):
    block = OpaqueBlock

    def body(self, x, tokens):
        for block in self.transformer.h:
            x = block(x).hidden
        return x


class PickyBlock(Block):
    def forward(self, x, mask=None):
        if x.abs().max() < 1e9:  # read
            raise ValueError("too small")
        return super().forward(x, mask)


class Picky(GPT):
    block = PickyBlock


def backward_step(model, batch):
    loss = model(*batch)
    loss.backward()  # backward
    return loss


def two_passes_step(model, batch):
    return model(*batch) + model(*batch)


@pytest.mark.parametrize(
    ("make", "function", "text", "reason"),
    [
        (CalledTwice, CalledTwice.body, "# again", "block 1 of 'transformer.h' is called more than once"),
        (Skipping, Skipping.body, "# not all", "block 3 of 'transformer.h' is called where block 2 was expected"),
        (OutOfOrder, OutOfOrder.body, "# backwards", "block 3 of 'transformer.h' is called where block 0 was expected"),
        (Reading, Reading.body, "# read", "value of a tensor that depends on parameters is read before the last block"),
        (ReadingItem, ReadingItem.body, "# read", "is read before the last block"),
        (ReadingAsNumpy, ReadingAsNumpy.body, "# read", "is read before the last block"),
        (ReadingAndCatching, ReadingAndCatching.body, "# read", "is read before the last block"),
        (SelectingByValue, SelectingByValue.body, "# read", "cannot be run on shapes alone"),
        (WritingInPlace, WritingInPlace.body, "# write", "writes data that depends on parameters into an ordinary"),
        (Reentrant, Reentrant.body, "# reentrant", "use_reentrant=False"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_step_that_no_cut_allows_is_refused(make, function, text, reason):
    message = refusal(make())

    assert reason in message
    assert re.search(line_with(function, text), message), message


def test_a_step_that_calls_backward_is_refused():
    message = refusal(GPT(), backward_step)
    assert "automatic optimization" in message and re.search(line_with(backward_step, "# backward"), message)


def test_two_passes_in_a_step_are_refused():
    assert "block 0 of 'transformer.h' is called more than once" in refusal(GPT(), two_passes_step)


def test_a_step_that_leaves_the_last_blocks_out_is_refused():
    assert "calls 2 of the 4 blocks" in refusal(EndingEarly())


def test_results_in_which_tensors_cannot_be_found_are_refused():
    assert "returns a Opaque, in which tensors cannot be found" in refusal(OpaqueResults())


def test_a_block_that_runs_on_no_made_up_values_is_refused():
    message = refusal(Picky())
    assert "block 0 of 'transformer.h' can be run neither on shapes alone" in message
    assert "nor on random values (ValueError: too small)" in message
    assert re.search(line_with(PickyBlock.forward, "# read"), message)


def test_a_long_skip_stands_in_the_way_of_the_cuts_that_it_crosses():
    found = obstacles(LongSkip())

    assert found.keys() == {1, 2}  # the sum of both is an argument of block 3
    assert re.search("made after block 0, at " + line_with(LongSkip.body, "# made"), found[2])
    assert re.search("used after block 2, at " + line_with(LongSkip.body, "# used"), found[2])
    assert "not an argument of block 2" in found[2]


def test_what_blocks_leave_behind_for_the_loss_stands_in_the_way():
    found = obstacles(SideChannel())

    assert found.keys() == {1, 2, 3}
    assert re.search("made in block 0, at " + line_with(SideChannelBlock.forward, "# made"), found[1])
    assert "used after the last block" in found[1]


def test_a_checkpoint_around_several_blocks_cannot_be_cut():
    found = obstacles(CheckpointedInPairs())

    assert found.keys() == {1, 3}
    assert "checkpoint each block by itself" in found[1]


def test_a_stage_does_not_start_behind_an_obstacle():
    model, batch = LongSkip(), make_batch()
    staged, recording = prepare(model, batch, (0, 2, 4))
    with staged.attached(), pytest.raises(UnsupportedStepError, match="cannot be cut before block 2: a tensor made"):
        staged.forward(1, MicroBatch(lambda: model(*batch), 0, 0, recording), [])


def test_errors_of_the_user_before_the_last_block_come_through():
    with pytest.raises(ZeroDivisionError):
        dry_run(GPT(), find_blocks(GPT()), lambda: 1 / 0)


@pytest.mark.parametrize("bounds", [(0, 2), (1, 4), (0, 2, 2, 4), (0, 3, 2, 4), (4,)])
def test_cuts_that_do_not_ascend_over_all_blocks_are_refused(bounds):
    with pytest.raises(ValueError, match="must ascend from 0 to 4"):
        Cuts.checked(bounds, 4)


def test_blocks_that_look_at_values_are_not_refused():
    assert not obstacles(MixtureGPT())
