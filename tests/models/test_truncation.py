"""Long batches in chunks, with gradients that end at their borders."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from danon_lightning.attention import available_variants
from danon_lightning.models import MSRALightning
from danon_lightning.models.truncation import sum_with_gradients
from danon_lightning.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parent))
from small_models import config_of, language_model, scrambled  # noqa: E402

MSRA = config_of("msra", max_sequence_length=64)
pytestmark = pytest.mark.filterwarnings("ignore:num_levels is fixed", "ignore:isinstance.treespec")


def build(variant="msra", chunk_length=None, **settings):
    return language_model(variant, chunk_length=chunk_length, **{"max_sequence_length": 64, **settings})


def tokens(length=51, batch=2, seed=0):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients_of(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def assert_equal(ours, theirs, atol=1e-10):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=atol, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("variant", available_variants())
@pytest.mark.parametrize("chunk_length", [1, 7, 50])
def test_the_loss_is_that_of_the_parallel_form(variant, chunk_length):
    batch = tokens()
    whole, chunked = build(variant), build(variant, chunk_length)
    torch.testing.assert_close(chunked.loss(batch), whole.loss(batch), rtol=0, atol=1e-10)
    with torch.no_grad():
        loss = chunked.loss(batch)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole.loss(batch), rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", available_variants())
def test_nothing_is_lost_where_nothing_is_cut(variant):
    batch, module = tokens(), build(variant)
    expected = gradients_of(module, module.loss(batch))
    assert_equal(gradients_of(module, sum(module.chunk_losses(batch, 13, detach=False))), expected)
    one_chunk = build(variant, 50)
    assert_equal(gradients_of(one_chunk, one_chunk.loss(batch)), expected)


@pytest.mark.parametrize("variant", available_variants())
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_end_at_the_borders_of_chunks(variant, gradient_checkpointing):
    batch, module = tokens(), build(variant, 13, gradient_checkpointing=gradient_checkpointing)
    # By definition: the state as a number, one chunk after the other.
    expected = gradients_of(module, sum(module.chunk_losses(batch, 13, detach=True)))
    ours = gradients_of(module, module.loss(batch))
    assert_equal(ours, expected)
    uncut = gradients_of(module, sum(module.chunk_losses(batch, 13, detach=False)))
    assert not torch.allclose(ours["model.token_embedding.weight"], uncut["model.token_embedding.weight"])
    assert all(gradient is not None for gradient in ours.values())


def test_one_chunk_is_held_at_a_time():
    """The activations alive at once, counted."""

    def most_alive(module):
        alive, most = 0, 0

        class Saved:
            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor = tensor
                self.count = 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
                alive += self.count
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.count

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            module.loss(tokens(61)).backward()
        assert alive == 0
        return most

    full = most_alive(build("full"))
    assert most_alive(build("full", 10)) < 0.4 * full
    assert most_alive(build("full", 60)) > 0.9 * full


def test_a_sum_behaves_like_a_plain_one():
    weight, other = nn.Parameter(torch.tensor([2.0, 3.0])), nn.Parameter(torch.ones(1))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    asked = []

    def losses():
        for factor in (1.0, 2.0, 5.0):
            asked.append(factor)
            yield factor * (weight.square() * frozen).sum()

    total = sum_with_gradients(losses(), [weight, other, frozen])
    assert total.item() == 8 * 13 and asked == [1.0, 2.0, 5.0]
    (0.5 * total + other.sum()).backward()
    assert weight.grad.tolist() == [16.0, 24.0] and other.grad.tolist() == [1.0] and frozen.grad is None
    sum_with_gradients(losses(), [weight, other]).backward()
    assert weight.grad.tolist() == [48.0, 72.0] and other.grad.tolist() == [1.0]
    assert not sum_with_gradients(losses(), [frozen]).requires_grad
    with pytest.raises(ValueError, match="losses is empty"):
        sum_with_gradients([], [weight])


def fit(module, **options):
    run = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **options},
    )
    data = DataLoader(list(tokens(33, batch=16)), batch_size=4)
    run.fit(module, data, data)
    return run.callback_metrics


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_training_is_the_same_where_nothing_is_cut(options):
    whole, chunked = build(), build(chunk_length=32)
    expected, measured = fit(whole, **options), fit(chunked, **options)
    for name in ("train/loss", "val/loss", "val/bits_per_byte"):
        torch.testing.assert_close(measured[name], expected[name], rtol=0, atol=1e-6)
    assert_equal(dict(chunked.named_parameters()), dict(whole.named_parameters()), atol=1e-7)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_learns_in_chunks(precision):
    module = build(chunk_length=16, num_layers=1).float()
    before = module.loss(tokens(33, batch=16)).item()
    fit(module, precision=precision, max_epochs=4, limit_val_batches=0)
    assert module.loss(tokens(33, batch=16)).item() < 0.95 * before


def test_a_model_that_streams_without_end_takes_long_batches():
    endless = scrambled(MSRALightning({**MSRA, "num_levels": 2, "max_sequence_length": 16}, chunk_length=8))
    loss = endless.loss(tokens(200))
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is not None for parameter in endless.parameters())
    with pytest.raises(ValueError, match="more than max_sequence_length=64"):
        build(chunk_length=8).loss(tokens(200))


def test_the_setting_is_checked_and_kept():
    assert build(chunk_length=9).hparams["chunk_length"] == 9
    for wrong in (0, 2.0):
        with pytest.raises(ValueError, match=f"chunk_length={wrong} must be an integer of at least 1"):
            MSRALightning(MSRA, chunk_length=wrong)


class Step(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.loss(batch)


def exchanged_gradients():
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    step = DistributedDataParallel(Step(build(chunk_length=13)))
    step(tokens(batch=4)[2 * dist.get_rank() :][:2]).backward()
    return {name: parameter.grad for name, parameter in step.module.module.named_parameters()}


def test_ranks_exchange_their_gradients():
    """The hooks of DistributedDataParallel find nothing unusual in it."""
    module = build(chunk_length=13)
    expected = gradients_of(module, module.loss(tokens(batch=4)))
    for gradients in run_distributed(exchanged_gradients, 2):
        assert_equal(gradients, expected)
