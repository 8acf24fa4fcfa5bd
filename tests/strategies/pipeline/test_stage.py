"""All stages together do what the plain step does: loss and every gradient."""

import gc
import weakref

import pytest
import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from staged_models import (
    GPT,
    BetweenGPT,
    BiasFromFirst,
    CheckpointedGPT,
    CrossAttending,
    CrossBlock,
    MaskedGPT,
    MixtureGPT,
    ReadingTailGPT,
    SequentialNet,
    TwoLossesGPT,
    VisionTransformer,
)
from staged_runs import Outcome, largest_difference, make_batch, prepare, run_plainly, run_staged

from danon_lightning.strategies.pipeline.absent import Absent
from danon_lightning.strategies.pipeline.blocks import find_blocks
from danon_lightning.strategies.pipeline.dry_run import dry_run
from danon_lightning.strategies.pipeline.errors import AbsentDataError, UnsupportedStepError
from danon_lightning.strategies.pipeline.ownership import find_owners
from danon_lightning.strategies.pipeline.passage import MicroBatch
from danon_lightning.strategies.pipeline.recording import Cuts
from danon_lightning.strategies.pipeline.stage import StagedModule

EXACT = 1e-12
CUTS = [(0, 4), (0, 2, 4), (0, 1, 2, 3, 4)]
MODELS = {
    "tied": lambda: GPT(),
    "untied": lambda: GPT(tied=False),
    "tuples, mask and rotary table": MaskedGPT,
    "sequential": SequentialNet,
    "vision transformer": VisionTransformer,
    "encoder in the head": CrossAttending,
    "bias made by the first block": BiasFromFirst,
    "modules between blocks": BetweenGPT,
    "checkpointing in user code": CheckpointedGPT,
    "experts chosen by value": MixtureGPT,
    "tail that reads values": ReadingTailGPT,
}


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


@pytest.mark.parametrize("bounds", CUTS, ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_stages_together_do_what_the_plain_step_does(make, bounds):
    model = make().double()
    batch = make_batch(padded=isinstance(model, MaskedGPT))

    staged = run_staged(model, batch, bounds)

    assert max(largest_difference(staged, run_plainly(model, batch))) <= EXACT


@pytest.mark.parametrize("make", [GPT, TwoLossesGPT, SequentialNet], ids=lambda make: make.__name__)
@pytest.mark.parametrize("micro_batches", [1, 4, 6])
def test_means_over_unevenly_many_labels_are_those_of_the_batch(make, micro_batches):
    model = make().double()
    batch = make_batch(7, ignored=make is not SequentialNet)  # micro-batches of 2 and 1; the last label is ignored

    staged = run_staged(model, batch, (0, 1, 4), micro_batches=micro_batches)

    assert max(largest_difference(staged, run_plainly(model, batch))) <= EXACT


def test_without_counting_the_labels_the_gradients_would_be_wrong():
    model = GPT().double()
    batch = tuple(tensor[:5] for tensor in make_batch(6, ignored=True))
    plain = run_plainly(model, batch)

    assert max(largest_difference(run_staged(model, batch, (0, 2, 4), micro_batches=5), plain)) <= EXACT
    assert max(largest_difference(run_staged(model, batch, (0, 2, 4), micro_batches=5, count=False), plain)) > 1e-3


@pytest.mark.parametrize("make", [GPT, BetweenGPT, CheckpointedGPT], ids=lambda make: make.__name__)
def test_dropout_draws_the_same_for_every_cut(make):
    model, batch = make(dropout=0.2).double(), make_batch()

    whole = run_staged(model, batch, (0, 4))

    assert max(largest_difference(whole, run_plainly(model, batch))) > 1e-3
    assert max(largest_difference(whole, run_staged(model, batch, (0, 4), seed=1))) > 1e-3
    for bounds in [(0, 1, 4), (0, 2, 4), (0, 3, 4), (0, 1, 2, 3, 4)]:
        assert max(largest_difference(whole, run_staged(model, batch, bounds))) <= EXACT


class Drawing(GPT):
    """Draws numbers itself: a table for all blocks after a dropout of absent data, and a decision for each block."""

    def body(self, x, tokens):
        mask = torch.randn(x.shape[1], x.shape[1], dtype=x.dtype)
        for block in self.transformer.h:
            x = block(-x if torch.rand(()) < 0.5 else x, mask=mask)
        return x


def test_what_the_step_draws_itself_is_the_same_on_every_stage():
    model, batch = Drawing(dropout=0.2).double(), make_batch()

    whole = run_staged(model, batch, (0, 4))

    assert max(largest_difference(whole, run_staged(model, batch, (0, 1, 3, 4)))) <= EXACT


def test_generators_go_on_as_if_no_stage_had_run():
    model, batch = GPT(dropout=0.1).double(), make_batch()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)

    run_staged(model, batch, (0, 2, 4))

    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    "frozen", [("transformer.w", "transformer.h.0", "transformer.h.1"), ("lm_head", "transformer.h.3")]
)
def test_frozen_parameters_get_no_gradient(frozen):
    model, batch = GPT(tied=False).double(), make_batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))

    staged = run_staged(model, batch, (0, 1, 2, 4))

    assert max(largest_difference(staged, run_plainly(model, batch))) <= EXACT
    assert not any(name.startswith(frozen) for name in staged.gradients)


@pytest.mark.parametrize("make", [GPT, CheckpointedGPT, CrossAttending], ids=lambda make: make.__name__)
def test_a_process_may_have_several_stages(make):
    model, batch = make().double(), make_batch()

    staged = run_staged(model, batch, (0, 1, 2, 3, 4), hosts=[0, 1, 0, 1])

    assert max(largest_difference(staged, run_plainly(model, batch))) <= EXACT
    assert len(staged.modules) == 2


@pytest.mark.parametrize("make", [lambda: GPT(tied=True), lambda: GPT(tied=False), MaskedGPT])
def test_a_stage_holds_no_storage_for_what_others_own(make):
    model = make().double()
    staged = run_staged(model, make_batch(), (0, 1, 2, 4))

    for stage, module in enumerate(staged.modules):
        for name, parameter in module.named_parameters():
            assert isinstance(parameter, Absent) == (stage not in staged.owners[name]), (stage, name)
            assert isinstance(parameter, torch.nn.Parameter)
    tied = isinstance(model, GPT) and model.lm_head.weight is model.transformer.wte.weight
    assert staged.owners["transformer.wte.weight"] == ((0, 2) if tied else (0,))
    assert staged.owners["transformer.wpe.weight"] == (0,)
    assert staged.owners["transformer.ln_f.weight"] == (2,)
    assert staged.owners["transformer.h.1.norm1.weight"] == (1,)
    held = [sum(not isinstance(p, Absent) for p in m.transformer.h.parameters()) for m in staged.modules]
    per_block = len(list(model.transformer.h[0].parameters()))
    assert held == [per_block, per_block, 2 * per_block]


def test_what_is_released_is_freed():
    model = GPT(tied=False)
    staged, _ = prepare(model, make_batch(), (0, 2, 4))
    parameters = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}

    staged.release([1])
    gc.collect()

    kept = {name for name, parameter in parameters.items() if parameter() is not None}
    assert kept == {name for name in parameters if 1 in staged.owners[name]}
    assert "transformer.h.3.norm1.weight" in kept and "transformer.wte.weight" not in kept


class Normalized(GPT):
    """Batch statistics before the blocks, which only the first stage can keep."""

    def __init__(self):
        super().__init__()
        self.statistics = torch.nn.BatchNorm1d(16)

    def body(self, x, tokens):
        return super().body(self.statistics(x.transpose(1, 2)).transpose(1, 2), tokens)


def test_running_statistics_are_kept_where_the_data_are_and_by_no_dry_run():
    model, batch = Normalized().double(), make_batch()
    before = model.statistics.running_mean.clone()

    staged = run_staged(model, batch, (0, 2, 4), micro_batches=3)

    assert torch.equal(model.statistics.running_mean, before) and model.statistics.num_batches_tracked == 0
    first, last = staged.modules
    assert not torch.equal(first.statistics.running_mean, before) and first.statistics.num_batches_tracked == 3
    assert torch.equal(last.statistics.running_mean, before)
    assert staged.owners["statistics.running_mean"][0] == 0


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_validation_step_without_gradients(without_gradients):
    model, batch = GPT(dropout=0.3).double().eval(), make_batch()
    blocks = find_blocks(model)
    cuts = Cuts.checked((0, 2, 4), 4)
    with without_gradients():
        recording = dry_run(model, blocks, lambda: model(*batch))
        staged = StagedModule(model, blocks, cuts, find_owners(model, blocks, cuts, [recording]))
        micro_batch = MicroBatch(lambda: model(*batch), 0, 0, recording)
        with staged.attached():
            (sent,) = staged.forward(0, micro_batch)
            loss = staged.forward(1, micro_batch, [sent])
        assert not sent.requires_grad
        assert torch.equal(loss, model(*batch))


def test_hooks_of_blocks_run_once_and_compiled_blocks_stay_compiled():
    model, batch = GPT().double(), make_batch()
    calls = []
    for index, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda module, args, output, index=index: calls.append(index))
    model.transformer.h[1].compile(backend="eager")
    staged, recording = prepare(model, batch, (0, 2, 4))
    assert calls == [0, 1, 2, 3]
    calls.clear()

    with staged.attached():
        staged.forward(0, MicroBatch(lambda: model(*batch), 0, 0, recording))

    assert calls == [0, 1]
    assert model.transformer.h[1]._compiled_call_impl is not None
    assert "_call_impl" not in model.transformer.h[0].__dict__


def test_the_tail_runs_once_for_each_micro_batch_and_for_real():
    model, batch = ReadingTailGPT().double(), make_batch()

    first, last = run_staged(model, batch, (0, 2, 4), micro_batches=3).modules

    assert (len(model.history), len(first.history), len(last.history)) == (0, 0, 3)
    assert last.seen == batch[1].numel() and first.seen == 0
    assert float(last.last) != 1 and last.largest != 1


def test_fairscale_checkpoints_around_blocks():
    model, batch = GPT().double(), make_batch()
    plain = run_plainly(model, batch)
    for index, block in enumerate(model.transformer.h):
        model.transformer.h[index] = checkpoint_wrapper(block)
    staged, recording = prepare(model, batch, (0, 1, 4))
    micro_batch = MicroBatch(lambda: model(*batch), 0, 0, recording)

    with staged.attached():  # its wrapper cannot be copied, so one process has both stages
        (sent,) = staged.forward(0, micro_batch)
        received = sent.detach().requires_grad_()
        loss = staged.forward(1, micro_batch, [received])
        loss.backward()
        sent.backward(received.grad)

    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert max(largest_difference(Outcome(float(loss.detach()), gradients), plain)) <= EXACT


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class FunctionOfEarlierTensor(GPT):
    """Applies a function that torch does not look into to what all blocks have got."""

    block = CrossBlock
    copied = False

    def body(self, x, tokens):
        first = x
        for block in self.transformer.h:
            x = block(x, first)
        return x + Doubled.apply(first.clone() if self.copied else first)


def test_a_gradient_that_could_not_be_sent_back_is_an_error_and_not_lost():
    model, batch = FunctionOfEarlierTensor().double(), make_batch()
    with pytest.raises(AbsentDataError, match="give it a clone"):
        run_staged(model, batch, (0, 2, 4))

    model.copied = True
    assert max(largest_difference(run_staged(model, batch, (0, 2, 4)), run_plainly(model, batch))) <= EXACT


def autocast_step(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return model(*batch)


@pytest.mark.parametrize("make", [GPT, MaskedGPT, CheckpointedGPT], ids=lambda make: make.__name__)
def test_autocast_rounds_the_same_for_every_cut(make):
    model, batch = make(), make_batch()

    whole = run_staged(model, batch, (0, 4), step=autocast_step)

    assert max(largest_difference(whole, run_staged(model, batch, (0, 1, 3, 4), step=autocast_step))) <= 1e-6


class Swallowing(GPT):
    def forward(self, tokens, labels):
        try:
            return super().forward(tokens, labels)
        except BaseException:
            return torch.zeros(())


def test_a_step_that_catches_everything_is_told_so():
    model, batch = Swallowing(), make_batch()
    staged, recording = prepare(model, batch, (0, 2, 4))
    with staged.attached(), pytest.raises(UnsupportedStepError, match="must not catch every exception"):
        staged.forward(0, MicroBatch(lambda: model(*batch), 0, 0, recording))


class LengthByValue(GPT):
    """Gives blocks as many tokens as the batch has that are not 0."""

    def body(self, x, tokens):
        return super().body(x[:, : int((tokens != 0).sum(1).max())], tokens)

    def loss(self, logits, labels):
        return super().loss(logits, labels[:, : logits.shape[1]])


def test_a_micro_batch_that_goes_another_way_than_its_dry_run_is_refused():
    model, batch = LengthByValue(), make_batch(padded=True)
    staged, recording = prepare(model, batch, (0, 2, 4))
    shorter = tuple(tensor[3:] for tensor in batch)
    with staged.attached(), pytest.raises(UnsupportedStepError, match="takes another way through the step.*argument"):
        staged.forward(0, MicroBatch(lambda: model(*shorter), 2, 0, recording))
