"""The fault zoo: what is wrong is named, and what is not raises no alarm."""

import pytest
import torch
from fault_zoo import BENIGN, FAULTS, Benign, Fault

from danon_lightning.callbacks.nan_debugger.random_state import random_state
from danon_lightning.callbacks.nan_debugger.replay import Replay, replay_step


def run(fault: Fault) -> Replay:
    """Run the micro-batches of a fault once, and then replay the one that has failed."""
    torch.manual_seed(1)
    model = fault.make()
    for index, batch in enumerate(fault.batches()):
        rng = random_state()
        with fault.context():
            loss = model.training_step(batch, index)
        loss.backward()
        gradients = [one.grad for one in model.parameters() if one.grad is not None]
        if not all(bool(one.isfinite().all()) for one in [loss, *gradients]):
            return replay_step(model, batch, index, rng=rng, context=fault.context, micro_batch=index)
    raise AssertionError("nothing went wrong")


def right(fault: Fault, replay: Replay) -> bool:
    """Whether all that is known about a fault was found."""
    origin = replay.origin
    if origin is None or not origin.exact:
        return False
    found = (origin.cause, origin.module, origin.phase, origin.micro_batch)
    if found != (fault.cause, fault.module, fault.phase, fault.micro_batch):
        return False
    subject = origin.leaf if fault.cause == "input" else origin.parameter
    return subject == fault.subject if fault.subject else fault.op in origin.name


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named(fault):
    replay = run(fault)
    assert right(fault, replay), replay
    assert replay.origin.sample == fault.sample or fault.sample is None
    assert "fault_zoo.py" in replay.origin.location


@pytest.mark.parametrize("benign", BENIGN, ids=lambda benign: benign.name)
def test_no_false_alarm(benign: Benign):
    torch.manual_seed(1)
    replay = replay_step(benign.make(), benign.batch(), 0, loss_scale=benign.loss_scale)
    assert replay.origin is None, replay.origin
    assert replay.complete
    assert replay.finite != replay.scale_only
