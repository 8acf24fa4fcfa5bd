"""Adam with a frozen variance, alone and with its momentum compressed."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn

from danon_lightning.optim import OneBitAdam
from danon_lightning.strategies import DanonHybridStrategy, ErrorFeedback, Mesh
from danon_lightning.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "strategies"))
from plain_module import SHAPES, Given, PlainModule, exchange, give, given_gradients, loader  # noqa: E402

OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
FREEZE = 5


@pytest.fixture
def alone(tmp_path):
    """This process as the only rank of a job."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    return Mesh(1, 1, 0)


def two_groups(model):
    """Two groups, of which one differs in everything."""
    return [
        {"params": [model.first, model.bias]},
        {"params": [model.table], "lr": 0.005, "betas": (0.5, 0.9), "weight_decay": 0.0, "eps": 1e-3},
    ]


def train(optimizer, model, steps, first=0):
    for step in range(first, first + steps):
        for name, gradient in given_gradients(step, 0).items():
            getattr(model, name).grad = gradient.clone()
        optimizer.step()


def assert_close(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


# ---- alone


def test_the_first_phase_is_adamw():
    ours, theirs = Given(), Given()
    optimizer = OneBitAdam(two_groups(ours), **OPTIONS, freeze_step=FREEZE)
    train(optimizer, ours, FREEZE)
    train(torch.optim.AdamW(two_groups(theirs), **OPTIONS), theirs, FREEZE)
    assert_close(ours, theirs)
    assert optimizer.frozen
    train(torch.optim.AdamW(two_groups(theirs), **OPTIONS), theirs, 1)
    train(optimizer, ours, 1)
    assert (ours.first - theirs.first).abs().max() > 1e-5


def test_the_second_phase_follows_the_formula_with_the_variance_as_it_was():
    model = Given()
    optimizer = OneBitAdam(model.parameters(), **OPTIONS, freeze_step=FREEZE)
    lr, (beta1, beta2), eps, decay = OPTIONS.values()
    weights = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    v = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, 13):
        assert optimizer.frozen == (step > FREEZE)
        for name, gradient in given_gradients(step, 0).items():
            m[name] = beta1 * m[name] + (1 - beta1) * gradient.double()
            if step <= FREEZE:
                v[name] = beta2 * v[name] + (1 - beta2) * gradient.double().square()
            corrected = v[name] / (1 - beta2 ** min(step, FREEZE))
            weights[name] *= 1 - lr * decay
            change = m[name] / (1 - beta1**step) / (corrected.sqrt() + eps)
            bound = max(1.0, (1 - beta1) / (1 - beta2) ** 0.5)
            weights[name] -= lr * (change.clamp(-bound, bound) if step > FREEZE else change)
        train(optimizer, model, 1, first=step)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.double(), weights[name], rtol=1e-5, atol=1e-5)


def test_a_saved_optimizer_goes_on_to_the_bit():
    whole, pieces = Given(), Given()
    first = OneBitAdam(whole.parameters(), **OPTIONS, freeze_step=FREEZE)
    train(first, whole, 9)
    early = OneBitAdam(pieces.parameters(), **OPTIONS, freeze_step=FREEZE)
    train(early, pieces, 7)
    late = OneBitAdam(pieces.parameters(), **OPTIONS, freeze_step=FREEZE)
    late.load_state_dict(early.state_dict())
    assert late.frozen
    train(late, pieces, 2, first=7)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), pieces.parameters(), strict=True))


def test_a_closure_gives_the_loss_and_missing_gradients_leave_weights_alone():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = OneBitAdam([used, unused], lr=0.1, freeze_step=1)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses[0] == 3 and losses[2] < losses[1] < losses[0]
    assert torch.equal(unused, torch.ones(3)) and not optimizer.state[unused]


def test_a_parameter_that_comes_late_takes_no_wild_step():
    """As where layers are unfrozen in the course of training: it has no variance to divide by."""
    early, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = OneBitAdam([early, late], lr=0.01, freeze_step=3)
    for step in range(8):
        early.grad = torch.full((3,), 2.0)
        late.grad = torch.full((3,), 2.0) if step > 4 else None
        optimizer.step()
    assert (late - 1).abs().max() < 0.1, late


@pytest.mark.parametrize(("betas", "bound"), [((0.9, 0.95), 1.0), ((0.9, 0.9999), 10.0)])
def test_an_element_without_variance_goes_no_further_than_in_adam(betas, bound):
    """As the embedding of a word that has not occurred before the variance was frozen."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = OneBitAdam([weight], lr=0.01, betas=betas, freeze_step=3)
    for step in range(6):
        before = weight.detach().clone()
        weight.grad = torch.tensor([1.0, 5.0 if step > 2 else 0.0])
        optimizer.step()
        if step > 2:
            torch.testing.assert_close(before[1] - weight[1], torch.tensor(0.01 * bound))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0, eps=.* and weight_decay=.* must not be negative"),
        ({"eps": -1.0}, "eps=-1.0 .*must not be negative"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must not be negative"),
        ({"betas": (1.0, 0.9)}, r"betas=\(1.0, 0.9\) must lie in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas=\(0.9, -0.1\) must lie in \[0, 1\)"),
        ({"freeze_step": 0}, "freeze_step=0 must be at least 1: the variance is learnt in these steps"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OneBitAdam([nn.Parameter(torch.ones(3))], **{"freeze_step": 3, **arguments})


# ---- with a communicator that compresses the momentum


def test_all_of_the_momentum_arrives_in_the_end(alone):
    """Σ of the momenta handed out + what is kept = Σ of β·m + (1 − β)·g."""
    model = Given()
    optimizer = OneBitAdam(model.parameters(), **OPTIONS, freeze_step=FREEZE)
    with exchange(alone, "sign", model=model) as (ddp, communicator):
        communicator.exchange_momentum_of(optimizer)
        due = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        given = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for step in range(FREEZE + 20):
            before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters() if step}
            delivered = give(ddp, given_gradients(step, 0))
            for name, gradient in given_gradients(step, 0).items():
                if step < FREEZE:
                    assert torch.equal(delivered[name], gradient)  # dense and as it is
                else:
                    due[name] += 0.8 * before[name] + 0.2 * gradient
                    given[name] += delivered[name]
            optimizer.step()
            if step >= FREEZE:
                assert all(torch.equal(optimizer.state[p]["exp_avg"], p.grad) for p in model.parameters())
        kept = communicator.state_dict()["mean"]["residual"]
    for name, total in given.items():
        if name in kept:
            assert len(delivered[name].abs().unique()) <= 13  # one bit an element
            total = total + kept[name].view_as(total)
        assert (total - due[name]).norm() <= 1e-5 * due[name].norm(), name


def test_a_bad_step_changes_neither_the_momentum_nor_what_is_kept(alone):
    results = []
    for bad in (False, True):
        model = Given()
        optimizer = OneBitAdam(model.parameters(), **OPTIONS, freeze_step=2)
        with exchange(alone, "sign", model=model) as (ddp, communicator):
            communicator.exchange_momentum_of(optimizer)
            for step in range(6):
                if bad and step in (1, 4):
                    gradients = given_gradients(50, 0)
                    gradients["table"][0, 0] = torch.inf
                    give(ddp, gradients)
                    assert not communicator.finite
                give(ddp, given_gradients(step, 0))
                optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_parameter_that_has_never_had_a_gradient_is_no_obstacle(alone):
    """It has no momentum yet."""

    class Partly(Given):
        def forward(self, batch):
            return sum((p * batch[name]).sum() for name, p in self.named_parameters() if name != "table")

    model = Partly()
    optimizer = OneBitAdam(model.parameters(), lr=0.01, freeze_step=2)
    with exchange(alone, "sign", model=model, ddp_options={"find_unused_parameters": True}) as (ddp, communicator):
        communicator.exchange_momentum_of(optimizer)
        for step in range(4):
            ddp.zero_grad()
            ddp(given_gradients(step, 0)).backward()
            optimizer.step()
    assert torch.equal(model.table, torch.ones(SHAPES["table"]))


# ---- in a Trainer


class Losses(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


class WithOneBit(PlainModule):
    def configure_optimizers(self):
        return OneBitAdam(self.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.01, freeze_step=12)


def fit(strategy, ranks, epochs, checkpoint=None):
    log, module = Losses(), WithOneBit()
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=ranks,
        max_epochs=epochs,
        callbacks=[log],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    share = loader(8 // ranks, rank=trainer.global_rank, ranks=ranks)
    trainer.fit(module, share, ckpt_path=checkpoint, weights_only=True)
    return trainer, module, log.losses


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def fit_on_two_ranks(folder):
    results = {}
    _, module, _ = fit(DanonHybridStrategy(), 2, 4)
    results["dense"] = weights(module)

    def one_bit():
        return DanonHybridStrategy(
            compression="sign", error_feedback=ErrorFeedback(), residual_checkpoint="per_rank"
        )  # fmt: skip

    trainer, module, losses = fit(one_bit(), 2, 12)
    results["whole"], results["losses"] = weights(module), losses
    results["ratio"] = trainer.strategy.communication_stats()["compression_ratio"]
    trainer, _, first = fit(one_bit(), 2, 5)  # the variance has been frozen for a while
    trainer.save_checkpoint(f"{folder}/half.ckpt")
    _, module, second = fit(one_bit(), 2, 12, f"{folder}/half.ckpt")
    results["pieces"], results["losses in pieces"] = weights(module), first + second
    return results


def test_one_bit_training_follows_dense_training_and_resumes_to_the_bit(tmp_path):
    one, two = run_distributed(fit_on_two_ranks, 2, str(tmp_path), timeout=150)
    for name in ("dense", "whole", "pieces"):
        assert torch.equal(one[name], two[name]), f"{name}: ranks differ"
    assert torch.equal(one["whole"], one["pieces"])
    assert one["losses"] == one["losses in pieces"]
    assert one["ratio"] > 1.5  # dense for 12 of 72 steps

    _, module, _ = fit("auto", 1, 4)
    torch.testing.assert_close(one["dense"], weights(module), rtol=1e-6, atol=1e-6)
    _, module, dense = fit("auto", 1, 12)
    mean = [(a + b) / 2 for a, b in zip(one["losses"], two["losses"], strict=True)]
    start, last, dense_last = sum(mean[:6]), sum(mean[-6:]), sum(dense[-6:])
    assert dense_last < 0.1 * start
    assert last < 1.5 * dense_last + 0.02 * start, (start, last, dense_last)
