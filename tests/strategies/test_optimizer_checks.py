"""Compressions that would spoil training with an optimizer are refused, with what to use in their place."""

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import optim

from danon_lightning.optim import OneBitAdam
from danon_lightning.strategies import DanonHybridStrategy, ErrorFeedback, TopKCompressor
from danon_lightning.strategies.communication import get_compressor
from danon_lightning.strategies.optimizer_checks import check_optimizer
from danon_lightning.testing import run_distributed

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbour with it
from plain_module import PlainModule, loader  # noqa: E402

ADAPTIVE = ["Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop"]
DGC = ErrorFeedback(momentum=0.9)


def weights():
    return [torch.nn.Parameter(torch.zeros(3, 3))]


def check(optimizer, compression, feedback=None, clips=False):
    check_optimizer(optimizer, get_compressor(compression), feedback, clips=clips)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_one_bit_gradients_are_refused_with_adaptive_optimizers(name):
    message = rf"compression='sign' cannot be used with {name}.*OneBitAdam.*or compression='int4', or SGD"
    with pytest.raises(ValueError, match=message):
        check(getattr(optim, name)(weights()), "sign", ErrorFeedback())


@pytest.mark.parametrize("optimizer", [optim.SGD, optim.Rprop, optim.ASGD])
def test_one_bit_gradients_are_accepted_with_others(optimizer):
    check(optimizer(weights(), lr=0.1), "sign", ErrorFeedback(), clips=True)


@pytest.mark.parametrize("compression", ["topk", "randomk"])
def test_very_sparse_gradients_with_adaptive_optimizers_are_warned_of(compression):
    with pytest.warns(UserWarning, match=f"compression='{compression}' with AdamW.*Consider .*(warmup_steps|int4)"):
        check(optim.AdamW(weights()), compression, ErrorFeedback())


@pytest.mark.parametrize("compression", ["fp16", "bf16", "int8", "int4", "powersgd", TopKCompressor(warmup_steps=100)])
def test_other_compressions_go_with_adaptive_optimizers(compression):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(optim.AdamW(weights()), compression, clips=True)


def test_momentum_correction_needs_sgd_without_momentum_and_without_clipping():
    plain = optim.SGD(weights(), lr=0.1)
    check(plain, "topk", DGC)
    for optimizer in (optim.AdamW(weights()), OneBitAdam(weights(), freeze_step=3)):
        with pytest.raises(ValueError, match=r"ErrorFeedback\(momentum=0.9\) needs SGD, but .*Leave momentum at None"):
            check(optimizer, "topk", DGC)
    for options in ({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}):
        with pytest.raises(ValueError, match=r"would be applied twice: use SGD\(…, momentum=0\)"):
            check(optim.SGD(weights(), lr=0.1, **options), "topk", DGC)
    groups = [{"params": weights()}, {"params": weights(), "momentum": 0.5}]
    with pytest.raises(ValueError, match="would be applied twice"):
        check(optim.SGD(groups, lr=0.1), "topk", DGC)
    with pytest.raises(ValueError, match=r"gradient_clip_val cannot be used .* Use ErrorFeedback\(clip_norm=…\)"):
        check(plain, "topk", DGC, clips=True)


def test_momentum_is_not_clipped():
    onebit = OneBitAdam(weights(), freeze_step=3)
    check(onebit, "sign", ErrorFeedback())
    message = r"gradient_clip_val cannot be used with OneBitAdam.*Use ErrorFeedback\(clip_norm=…\)"
    with pytest.raises(ValueError, match=message):
        check(onebit, "sign", ErrorFeedback(), clips=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compression": "zip"}, "compression='zip' is not known; choose None .* 'bf16', 'fp16', 'int4', 'int8'"),
        ({"error_feedback": "always"}, "error_feedback='always' must be True, False, 'auto' or an ErrorFeedback"),
        ({"error_feedback": True}, "error_feedback needs a compression.*Leave it at 'auto'"),
        ({"residual_checkpoint": "all"}, "residual_checkpoint='all' must be 'mean' or 'per_rank'"),
        ({"hierarchical": "always"}, "hierarchical='always' must be True, False or 'auto'"),
    ],
)
def test_the_strategy_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DanonHybridStrategy(**arguments)


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan")])
def test_the_density_is_a_share(density):
    with pytest.raises(ValueError, match=rf"density={density} must lie in \(0, 1\]: it is the share of elements"):
        TopKCompressor(density)


class WithOptimizer(PlainModule):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        return self.make(self)


def refused_in_a_trainer():
    """Each on all ranks, before the first step; then a sound one trains in the same processes."""
    rank = int(os.environ["RANK"])
    refusals = [
        ("sign", "auto", lambda m: optim.AdamW(m.parameters()), None, "compression='sign' cannot be used with AdamW"),
        ("topk", DGC, lambda m: optim.AdamW(m.parameters()), None, "needs SGD, but the optimizer is AdamW"),
        ("topk", DGC, lambda m: optim.SGD(m.parameters(), 0.1, momentum=0.5), None, "would be applied twice"),
        ("topk", DGC, lambda m: optim.SGD(m.parameters(), 0.1), 1.0, r"Use ErrorFeedback\(clip_norm=…\)"),
        ("sign", "auto", lambda m: OneBitAdam(m.parameters(), freeze_step=2), 1.0, "what is clipped .* is momentum"),
        (
            "sign", "auto",
            lambda m: [OneBitAdam(m.layers[i].parameters(), freeze_step=2) for i in (0, 3)], None,
            "OneBitAdam can be used with a compression only as the only optimizer",
        ),
        (None, "auto", lambda m: optim.AdamW(m.parameters()), 1.0, None),
        ("topk", DGC, lambda m: optim.SGD(m.parameters(), 0.1), None, None),
    ]  # fmt: skip
    for compression, feedback, make, clip, message in refusals:
        trainer = pl.Trainer(
            strategy=DanonHybridStrategy(compression=compression, error_feedback=feedback),
            accelerator="cpu",
            devices=2,
            max_steps=2,
            gradient_clip_val=clip,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        module = WithOptimizer(make)
        module.automatic_optimization = "only optimizer" not in (message or "")
        if message is None:
            trainer.fit(module, loader(4, rank=rank, ranks=2))
            assert trainer.global_step == 2
            continue
        with pytest.raises(ValueError, match=message):
            trainer.fit(module, loader(4, rank=rank, ranks=2))
        assert trainer.global_step == 0
    return True


def test_a_trainer_refuses_on_every_rank_and_does_not_hang():
    assert run_distributed(refused_in_a_trainer, 2, timeout=120) == [True] * 2
