"""Several ranks: which of them is to blame, and all of them decide alike."""

import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from debugger_modules import FEATURES, Faulty, batches, debugger, trainer

from danon_lightning.callbacks import NonFiniteError
from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import run_distributed


class Hook(pl.Callback):
    """Registers a communication hook."""

    def __init__(self, hook):
        self.hook = hook

    def on_train_start(self, trainer, pl_module):
        trainer.strategy.model.register_comm_hook([0], self.hook)


def half_sum(state, bucket):
    """Sums in half precision."""
    work = dist.all_reduce(bucket.buffer().half(), async_op=True).get_future()
    return work.then(lambda done: done.value()[0].float() / dist.get_world_size())


def struck_once(state, bucket):
    """An exchange that gives a NaN in the third step, as no one knows why."""
    state[0] += bucket.is_last()
    buffer = bucket.buffer().div_(dist.get_world_size())
    work = dist.all_reduce(buffer, async_op=True).get_future()
    return work.then(lambda done: done.value()[0] * (float("nan") if state[0] == 3 else 1.0))


class Large(Faulty):
    """Gradients of 4e4 in the third step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + 4e4 * self.last.bias.sum() if batch_idx == 2 else loss


def raised(module, *callbacks, **options):
    """What the report says that ends the training."""
    watching = debugger("raise")
    with pytest.raises(NonFiniteError) as error:
        trainer(watching, *callbacks, strategy="ddp", devices=2, **options).fit(module, batches(rank=dist.get_rank()))
    report = watching.reports[0]
    assert str(error.value) == report.text()
    return report


def skip(strategy, fault, without=()):
    """Weights, state of Adam and residuals after a training that skips what is bad."""
    module = Faulty(fault, at=(2, 4), rank=1, optimizer="adam", width=1024)
    kept = [batch for index, batch in enumerate(batches(6, dist.get_rank())) if index not in without]
    watching = debugger("skip")
    one = trainer(watching, strategy=strategy() if callable(strategy) else strategy, devices=2)
    one.fit(module, torch.utils.data.DataLoader(kept, batch_size=None))
    state = {key: value.clone() for key, value in module.named_parameters()}
    stats = getattr(one.strategy, "communication_stats", dict)()
    residual, skipped = stats.get("residual_norm"), stats.get("skipped_steps")
    return (state, one.optimizers[0].state_dict()["state"], residual), (skipped, watching.bad_steps, watching.printed())


def int8():
    return DanonHybridStrategy(compression="int8", error_feedback=True)


def everything():
    found = {}
    warnings.simplefilter("ignore")
    for fault in ("forward", "backward"):
        report = raised(Faulty(fault, at=(2,), rank=1))
        found[fault] = report.step, report.cause, report.ranks, report.origin.op, report.text()
    report = raised(Faulty("forward", at=(3,), rank=1), accumulate_grad_batches=2)
    found["accumulated"] = report.step, report.finding.batch_number, report.ranks
    report = raised(Large(), Hook(half_sum))
    found["reduction"] = report.step, report.cause, report.origin.parameter, report.ranks, report.text()
    report = raised(Faulty(), Hook(struck_once))
    found["transient"] = report.step, report.cause, report.ranks

    watching = debugger("raise")
    trainer(watching, strategy="ddp", devices=2).fit(Faulty("detached", rank=1), batches(rank=dist.get_rank()))
    found["alone"] = [(one.step, one.origin.op) for one in watching.reports]

    for name, strategy in (("ddp", "ddp"), ("int8", int8)):
        found[name] = skip(strategy, "forward"), skip(strategy, "", without=(2, 4))
    return found


@pytest.fixture(scope="module")
def found():
    return run_distributed(everything, 2, timeout=150)


def test_the_rank_is_named_on_all_ranks(found):
    for one in found:
        assert one["forward"][:4] == (2, "forward", (1,), "aten.log.default")
        assert one["backward"][:4] == (2, "backward", (1,), "aten.div.Tensor")
        assert "rank 1, of 2 ranks" in one["forward"][4]
        assert one["accumulated"] == (1, 1, (1,))
    assert found[0]["forward"] == found[1]["forward"]


def test_a_sum_that_overflows_is_told_from_a_fault_of_the_hardware(found):
    for one in found:
        step, cause, parameter, ranks, text = one["reduction"]
        assert (step, cause, parameter, ranks) == (2, "reduction", "last.bias", ())
        assert "8e+04" in text and "half_sum" in text and "bfloat16" in text
        assert one["transient"] == (2, "transient", ())


def test_a_loss_that_spoils_no_gradient_is_reported_where_it_is(found):
    assert found[0]["alone"] == [] and found[1]["alone"] == [(2, "aten.full.default")]


@pytest.mark.parametrize("strategy", ["ddp", "int8"])
def test_all_ranks_skip_together_and_nothing_remains_of_the_step(found, strategy):
    for rank, one in enumerate(found):
        (disturbed, (skipped, bad_steps, printed)), (undisturbed, (_, none, _)) = one[strategy]
        torch.testing.assert_close(disturbed, undisturbed, rtol=0, atol=0)
        torch.testing.assert_close(disturbed[0], found[0][strategy][0][0][0], rtol=0, atol=0)
        assert bad_steps == [2, 4] and none == []
        assert bool(printed) == (rank == 0)
        if strategy == "int8":
            assert skipped == 2 and disturbed[2] > 0
    assert "rank 1, of 2 ranks" in found[0][strategy][0][1][2]


# ---- pipeline


class Block(nn.Module):
    """A layer that divides by zero in one sample, when it is told to."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.is_bad = False

    def forward(self, x):
        x = torch.tanh(self.linear(x))
        return x / (x[:, :1] * 0).where(x[:, :1] > 5, torch.ones(())) if not self.is_bad else x + (x[:, :1] - 9).log()


class Staged(pl.LightningModule):
    """Four blocks; one of them fails at a batch whose samples say so."""

    def __init__(self, bad, at):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(FEATURES, 1)
        self.bad, self.at = bad, at

    def training_step(self, batch, batch_idx):
        x = batch["x"]
        for index, block in enumerate(self.blocks):
            block.is_bad = index == self.bad and batch_idx == self.at
            x = block(x)
        return (self.head(x) - batch["y"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pipelined():
    found = {}
    warnings.simplefilter("ignore")
    for bad in (0, 2):
        watching, module = debugger("skip"), Staged(bad, at=3)
        strategy = DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=2, pipeline_layers="blocks")
        one = trainer(watching, strategy=strategy, devices=2, accumulate_grad_batches=2)
        one.fit(module, batches(6))
        (report,) = watching.reports
        finite = all(
            bool(torch.isfinite(p).all()) for p in module.parameters() if type(p.data) is torch.Tensor and not p.is_meta
        )
        found[bad] = (
            (
                watching.bad_steps,
                report.cause,
                report.ranks,
                report.origin.stage,
                report.origin.op,
                report.origin.module,
                report.finding.batch_number,
                finite,
            ),
            watching.printed(),
        )
    return found


def test_the_stage_of_a_pipeline_is_named():
    for rank, one in enumerate(run_distributed(pipelined, 2, timeout=150)):
        for bad, stage in ((0, 0), (2, 1)):
            found, printed = one[bad]
            assert found == ([1], "forward", (stage,), stage, "aten.log.default", f"blocks.{bad}", 1, True)
            assert (f"stage {stage}" in printed and "micro-batch 0" in printed) == (rank == 0)
