"""The ranks of a pipeline together do what one process does, in every order of passes."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))  # each rank imports this file anew, and its neighbours with it
from staged_models import (
    GPT,
    BiasFromFirst,
    CheckpointedGPT,
    CrossAttending,
    MaskedGPT,
    MixtureGPT,
    TransposingGPT,
    VisionTransformer,
)
from staged_runs import make_batch, run_plainly, split

from danon_lightning.strategies.pipeline.blocks import find_blocks
from danon_lightning.strategies.pipeline.dry_run import batch_signature, dry_run
from danon_lightning.strategies.pipeline.errors import UnsupportedStepError
from danon_lightning.strategies.pipeline.ownership import find_owners
from danon_lightning.strategies.pipeline.passage import MicroBatch
from danon_lightning.strategies.pipeline.pipeline import Pipeline, loss_of
from danon_lightning.strategies.pipeline.recording import Cuts
from danon_lightning.strategies.pipeline.schedules import resolve_schedule
from danon_lightning.strategies.pipeline.stage import StagedModule
from danon_lightning.testing import RankFailedError, run_distributed

EXACT = 1e-12
LAYERS = {1: 4, 2: 8, 4: 8}
SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv"]
MODELS = {
    "tied": GPT,
    "tuples, mask and rotary table": MaskedGPT,
    "vision transformer": VisionTransformer,
    "encoder in the head": CrossAttending,
    "bias made by the first block": BiasFromFirst,
    "checkpointing in user code": CheckpointedGPT,
    "experts chosen by value": MixtureGPT,
    "dimensions in another order in memory": TransposingGPT,
}


class Job:
    """A model on the ranks of a pipeline."""

    def __init__(self, model, schedule, batches, micro_batches, step=lambda model, part: model(*part)):
        self.model, self.step = model, step
        blocks = find_blocks(model)
        self.recordings = {}
        self.parts = [split(batch, count) for batch, count in zip(batches, micro_batches, strict=True)]
        for train in (True, False):
            with torch.set_grad_enabled(train):
                for part in sum(self.parts, []):
                    key = batch_signature(model, part)
                    if key not in self.recordings:
                        self.recordings[key] = dry_run(model, blocks, lambda part=part: step(model, part))
        stages = schedule.stages
        bounds = [len(blocks) * stage // stages for stage in range(stages + 1)]
        cuts = Cuts.checked(bounds, len(blocks))
        owners = find_owners(model, blocks, cuts, self.recordings.values())
        self.staged = StagedModule(model, blocks, cuts, owners)
        self.pipeline = Pipeline(self.staged, schedule, dist.group.WORLD)

    def micro_batches(self, number):
        return [
            MicroBatch(
                lambda part=part: self.step(self.model, part),
                index,
                number,
                self.recordings[batch_signature(self.model, part)],
            )
            for index, part in enumerate(self.parts[number])
        ]

    def weights(self, number):
        sizes = [len(part[0]) for part in self.parts[number]]
        return [size / sum(sizes) for size in sizes]

    def compare(self, number, plain, scale=1.0):
        """Train on a batch, and compare the loss and the gradients of this rank with what they should be."""
        weights = self.weights(number)
        results = self.pipeline.train(self.micro_batches(number), weights, scale)
        self.pipeline.gather_shared_gradients()
        self.pipeline.spread_shared_gradients()
        assert len(results) == (len(weights) if self.pipeline.has_last else 0)
        if results:
            assert not any(loss_of(result).requires_grad for result in results)
            loss = sum(float(loss_of(result)) * weight for result, weight in zip(results, weights, strict=True))
            assert abs(loss - plain.loss) < EXACT
        held = {name for stage in self.pipeline.stages for name, at in self.staged.owners.items() if stage in at}
        compared = 0
        for name, gradient in plain.gradients.items():
            if name in held:
                parameter = self.staged.parameter(name)
                assert (parameter.grad - scale * gradient).abs().max() < EXACT * scale, name
                compared += 1
                parameter.grad = None
        assert compared


def resolve(name, stages_per_rank=None):
    return resolve_schedule(name, dist.get_world_size(), stages_per_rank)


def make(cls, **options):
    torch.manual_seed(0)
    return cls(**options).double()


def compare_schedules():
    """Two batches of a tied model, the second with fewer, uneven micro-batches, few of them with labels."""
    for name in SCHEDULES:
        schedule = resolve(name)
        batches = [make_batch(8, seed=1), make_batch(5, ignored=True, seed=2), make_batch(1, seed=3)]
        job = Job(make(GPT, layers=8), schedule, batches, [8, 3, 1])
        for number, batch in enumerate(batches):
            job.compare(number, run_plainly(make(GPT, layers=8), batch))
        job.compare(1, run_plainly(make(GPT, layers=8), batches[1]), scale=1024.0)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_schedule_gives_the_loss_and_gradients_of_one_process(ranks):
    run_distributed(compare_schedules, ranks, timeout=200)


def compare_models():
    for label, cls in MODELS.items():
        for name in ("1f1b", "zbv"):
            batch = make_batch(6, padded=cls is MaskedGPT)
            try:
                Job(make(cls), resolve(name), [batch], [4]).compare(0, run_plainly(make(cls), batch))
            except Exception as error:
                raise AssertionError(f"{label}, {name}: {error}") from error


def test_every_kind_of_model_goes_through():
    run_distributed(compare_models, 2, timeout=200)


def compare_evaluation():
    for name, cls in [*((name, GPT) for name in SCHEDULES), ("1f1b", TransposingGPT)]:
        batch = make_batch(7)
        plain = make(cls, layers=8)
        job = Job(make(cls, layers=8), resolve(name), [batch], [4], step=lambda model, part: {"out": model(*part)})
        with torch.no_grad():
            results = job.pipeline.evaluate(job.micro_batches(0), job.weights(0))
            expected = [plain(*part) for part in job.parts[0]]
        assert len(results) == (4 if job.pipeline.has_last else 0)
        for result, loss in zip(results, expected, strict=False):
            assert abs(result["out"] - loss) < EXACT, name


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_evaluation_gives_the_results_of_one_process(ranks):
    run_distributed(compare_evaluation, ranks, timeout=200)


def fail_in_a_stage():
    def step(model, part):
        if dist.get_rank() == 1:
            raise ZeroDivisionError("in the user's code")
        return model(*part)

    batch = make_batch(4)
    job = Job(make(GPT), resolve("1f1b"), [batch], [2])
    job.step = step
    job.pipeline.train(job.micro_batches(0), job.weights(0))


def test_an_error_of_the_user_is_raised_as_it_is():
    with pytest.raises(RankFailedError, match="ZeroDivisionError: in the user's code") as caught:
        run_distributed(fail_in_a_stage, 2, timeout=60)
    assert "failed to run forward" not in str(caught.value)


@pytest.mark.parametrize("result", [None, {"logits": torch.ones(1)}, torch.ones(2), 3.0])
def test_a_step_must_return_the_loss(result):
    with pytest.raises(UnsupportedStepError, match="must return the loss .* a step cannot be skipped"):
        loss_of(result)


def test_the_loss_may_be_in_a_dictionary():
    assert loss_of({"loss": torch.tensor(2.0), "logits": torch.ones(3)}) == 2
