"""Runs all stages of a module one after another in this process."""

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from staged_models import LENGTH, VOCABULARY

from danon_lightning.strategies.pipeline.absent import Absent
from danon_lightning.strategies.pipeline.blocks import find_blocks
from danon_lightning.strategies.pipeline.dry_run import batch_signature, dry_run
from danon_lightning.strategies.pipeline.loss_weights import loss_factors
from danon_lightning.strategies.pipeline.ownership import find_owners
from danon_lightning.strategies.pipeline.passage import MicroBatch
from danon_lightning.strategies.pipeline.recording import Cuts
from danon_lightning.strategies.pipeline.stage import StagedModule


@dataclass
class Outcome:
    """Of a step: the loss, gradients by parameter name, and per stage the module."""

    loss: float
    gradients: dict[str, torch.Tensor]
    modules: list[torch.nn.Module] = field(default_factory=list)
    owners: dict[str, tuple[int, ...]] = field(default_factory=dict)
    recordings: list = field(default_factory=list)


def make_batch(size=6, ignored=False, padded=False, seed=1):
    """Tokens and labels; with ``ignored`` every sample has fewer labels than the one before, the last none."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (size, LENGTH), generator=generator)
    labels = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)
    if ignored:
        for sample in range(size):
            labels[sample, LENGTH - sample * LENGTH // (size - 1) :] = -100
    if padded:
        tokens[size // 2 :, LENGTH - 3 :] = 0
    return tokens, labels


def plain_step(model, batch):
    return model(*batch)


def run_plainly(model, batch, step=plain_step):
    """The step on the whole batch, as if there were no stages."""
    model = copy.deepcopy(model)
    loss = step(model, batch)
    loss.backward()
    return Outcome(float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def split(batch, micro_batches):
    parts = [torch.tensor_split(tensor, micro_batches) for tensor in batch]
    return list(zip(*parts, strict=True))


def prepare(model, batch, bounds, *, name=None, step=plain_step):
    """A staged module that holds all of its stages, and the recording of the batch."""
    blocks = find_blocks(model, name)
    recording = dry_run(model, blocks, lambda: step(model, batch))
    cuts = Cuts.checked(bounds, len(blocks))
    return StagedModule(model, blocks, cuts, find_owners(model, blocks, cuts, [recording])), recording


def run_staged(model, batch, bounds, *, micro_batches=3, name=None, step=plain_step, seed=0, count=True, hosts=None):
    """The step on micro-batches, through all stages forward and then back.

    Args:
        hosts: For each stage the number of its process, each of which has its own copy of the model.
    """
    blocks = find_blocks(model, name)
    cuts = Cuts.checked(bounds, len(blocks))
    parts = split(batch, micro_batches)
    recordings = {}
    for part in parts:
        key = batch_signature(model, part)
        if key not in recordings:
            recordings[key] = dry_run(model, blocks, lambda part=part: step(model, part))
    owners = find_owners(model, blocks, cuts, recordings.values())
    hosts = hosts or list(range(cuts.stages))
    processes = []
    for host in range(max(hosts) + 1):
        held = copy.deepcopy(model)
        processes.append(StagedModule(held, find_blocks(held, blocks.name), cuts, owners))
        processes[-1].release([stage for stage, where in enumerate(hosts) if where == host])
    stages = [processes[host] for host in hosts]
    weights = [len(part[0]) / len(batch[0]) for part in parts]

    def micro_batch(stage, index):
        part = parts[index]
        run = lambda: step(stages[stage].root, part)  # noqa: E731
        return MicroBatch(run, index, seed, recordings[batch_signature(model, part)])

    last = cuts.stages - 1
    loss, in_flight = 0.0, []
    with ExitStack() as stack:
        for process in processes:
            stack.enter_context(process.attached())
        counts = stages[last].count_losses(micro_batch(last, index) for index in range(micro_batches))
        factors = loss_factors(counts, weights) if count else [None] * micro_batches
        for index in range(micro_batches):
            received, passed = (), []
            for stage in range(last):
                sent = stages[stage].forward(stage, micro_batch(stage, index), received)
                passed.append((received, sent))
                received = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in sent)
            result = stages[last].forward(last, micro_batch(last, index), received, factors[index])
            loss += float(result.detach()) * weights[index]
            in_flight.append([*passed, (received, (result * weights[index],))])
        for passed in in_flight:
            gradients = (None,)
            for received, sent in reversed(passed):
                pairs = [(t, g) for t, g in zip(sent, gradients, strict=True) if t.requires_grad]
                if pairs:
                    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
                gradients = [torch.zeros_like(t) if t.grad is None and t.requires_grad else t.grad for t in received]
    summed = {}
    for process in processes:
        for parameter_name, parameter in process.root.named_parameters():
            if not isinstance(parameter, Absent) and parameter.grad is not None:
                summed[parameter_name] = summed.get(parameter_name, 0) + parameter.grad
    return Outcome(loss, summed, [process.root for process in processes], owners, list(recordings.values()))


def largest_difference(one, other):
    """Of two outcomes: that of the loss and that of any gradient. The same parameters must have one."""
    assert one.gradients.keys() == other.gradients.keys()
    differences = [(one.gradients[name] - other.gradients[name]).abs().max() for name in one.gradients]
    return abs(one.loss - other.loss), float(max(differences))
