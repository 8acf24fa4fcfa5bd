"""Trains one model with one seed to the end, in a process of its own."""

import importlib
import math
import time
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from danon_lightning.attention import AttentionConfig
from danon_lightning.benchmark.recall.model import LanguageModel
from danon_lightning.benchmark.recall.mqar import IGNORED, MQAR
from danon_lightning.benchmark.recall.settings import Sizes
from danon_lightning.benchmark.recall.tasks import Data, MQARData, TextData
from danon_lightning.benchmark.workers import Tell

# Evaluations of a run, beside the one before the first step.
_EVALUATIONS = 10
_WEIGHT_DECAY = 0.01
_BETAS = (0.9, 0.95)
_CLIP = 1.0
# Share of the steps, and least number of them, over which the learning rate rises; and what it ends at.
_WARM_UP = 0.1
_LEAST_WARM_UP = 10
_LAST_RATE = 0.1


@dataclass(frozen=True)
class TrainPlan:
    """What to train.

    Attributes:
        label: The line of the tables.
        config: The settings of the model.
        task: The recall task; None for text.
        sizes: Sizes of the run.
        seed: Of weights and data.
        device: "cpu" or "cuda".
        modules: Modules that register variants.
    """

    label: str
    config: AttentionConfig
    task: MQAR | None
    sizes: Sizes
    seed: int
    device: str = "cpu"
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Attributes:
        step: Steps so far.
        figure: Share of queries answered, or bits a byte.
        seconds: Time of training so far, without evaluations: of the processor on CPU, of the clock on CUDA.
    """

    step: int
    figure: float
    seconds: float


def train(plan: TrainPlan, tell: Tell) -> list[Point]:
    """Train to the last step, tell each evaluation, and return all of them."""
    if plan.device == "cpu":
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for module in plan.modules:
        importlib.import_module(module)
    data = _data(plan)
    torch.manual_seed(plan.seed)
    model = LanguageModel(plan.config).to(plan.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.sizes.learning_rate, weight_decay=_WEIGHT_DECAY, betas=_BETAS
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, plan.sizes.steps))
    steps, points, seconds = plan.sizes.steps, [], 0.0
    evaluated_at = {round(steps * i / _EVALUATIONS) for i in range(_EVALUATIONS + 1)}
    batches = data.training()
    for step in range(steps + 1):
        if step in evaluated_at:
            points.append(Point(step, _evaluate(model, data, plan.device), seconds))
            tell(points[-1])
        if step == steps:
            break
        tokens, labels = (tensor.to(plan.device) for tensor in next(batches))
        start = _clock(plan.device)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        scheduler.step()
        seconds += _clock(plan.device) - start
    return points


def rate_factor(step: int, steps: int) -> float:
    """Factor of the learning rate at a step: a linear rise times a cosine."""
    rise = min(1.0, (step + 1) / max(_LEAST_WARM_UP, _WARM_UP * steps))
    return rise * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _data(plan: TrainPlan) -> Data:
    if plan.task is not None:
        return MQARData(plan.task, plan.sizes.batch, plan.seed)
    return TextData(plan.sizes.length, plan.sizes.batch, plan.seed)


@torch.no_grad()
def _evaluate(model: LanguageModel, data: Data, device: str) -> float:
    model.eval()
    scores = [data.score(model(tokens.to(device)), labels.to(device)) for tokens, labels in data.evaluation()]
    model.train()
    return torch.cat(scores).mean().item()


def _clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
