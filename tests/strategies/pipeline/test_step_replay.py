"""A step of a pipeline can be run again, to find out what has gone wrong in it."""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from lightning_modules import VOCABULARY, WIDTH, Tied, loader, losses_of, make_trainer

from danon_lightning.strategies import DanonHybridStrategy
from danon_lightning.testing import run_distributed


class Untied(Tied):
    """With dropout, and nothing that several stages share."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    @staticmethod
    def layer():
        return nn.Sequential(Tied.layer(), nn.Dropout(0.3))


class Passes:
    def __init__(self):
        self.seen = Counter()

    @contextmanager
    def measuring(self, stage, kind, micro_batch):
        self.seen[stage, kind, micro_batch] += 1
        yield

    def mark(self, stage, kind, micro_batch):
        pass


class Replay(pl.Callback):
    """Runs both batches of an optimizer step again, and sees whether they give its gradients."""

    def __init__(self):
        self.difference, self.passes = 0.0, []

    def on_fit_start(self, trainer, pl_module):
        trainer.strategy.keep_batches()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        observer = Passes()
        again = [trainer.strategy.replay_training_step(observer, index) for index in (0, 1)]
        found = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        assert found and set(found) == set(again[0]) == set(again[1])
        for name, gradient in found.items():
            self.difference = max(self.difference, float((gradient - again[0][name] - again[1][name]).abs().max()))
        self.passes.append(observer.seen)


def train(replays):
    strategy = DanonHybridStrategy(pipeline_parallel_size=2, num_microbatches=4)
    trainer = make_trainer(strategy, 2, max_epochs=1, accumulate_grad_batches=2)
    replay = Replay()
    if replays:
        trainer.callbacks.append(replay)
    module = Untied()
    trainer.fit(module, loader())
    with pytest.raises(RuntimeError, match="keep_batches"):
        strategy.replay_training_step(Passes())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return losses_of(trainer), metrics, replay.difference, replay.passes


def train_with_and_without():
    torch.manual_seed(0)
    plain = train(False)
    torch.manual_seed(0)
    return plain, train(True)


def test_a_replay_gives_the_same_gradients_and_changes_nothing():
    for rank, ((losses, metrics, *_), (losses_again, metrics_again, difference, passes)) in enumerate(
        run_distributed(train_with_and_without, 2, timeout=150)
    ):
        assert losses == losses_again and metrics == metrics_again
        assert difference < 1e-12
        assert len(passes) == 3
        for seen in passes:
            for kind in ("forward", "backward"):
                assert all(seen[rank, kind, micro_batch] == 2 for micro_batch in range(4))
