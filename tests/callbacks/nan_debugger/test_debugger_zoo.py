"""The callback in a Trainer, against all planted faults, and against steps that only look as if they had one."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import Precision

sys.path.insert(0, str(Path(__file__).parent))
from debugger_modules import debugger, trainer
from fault_zoo import BENIGN, FAULTS

from danon_lightning.callbacks import NonFiniteError


class InContext(Precision):
    """Runs steps in a given context."""

    def __init__(self, context):
        super().__init__()
        self.context = context

    def forward_context(self):
        return self.context()


def fit(watching, module, data, context):
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    trainer(watching, plugins=[InContext(context)], accumulate_grad_batches=len(data)).fit(module, loader)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_named(fault):
    torch.manual_seed(0)
    watching = debugger()
    with pytest.raises(NonFiniteError):
        fit(watching, fault.make(), fault.batches(), fault.context)
    (report,) = watching.reports
    origin = report.origin
    assert (report.cause, report.finding.reproduced) == (fault.cause, True)
    assert (report.finding.batch_number, origin.micro_batch) == (fault.micro_batch, fault.micro_batch)
    if fault.subject:
        assert fault.subject in (origin.parameter, origin.leaf)
    else:
        assert fault.op in origin.name and (origin.module, origin.phase) == (fault.module, fault.phase)
    assert report.advice


@pytest.mark.parametrize("benign", BENIGN, ids=lambda benign: benign.name)
def test_what_only_looks_like_a_fault_raises_no_alarm(benign):
    torch.manual_seed(0)
    watching = debugger()
    fit(watching, benign.make(), [benign.batch()], trainer().precision_plugin.forward_context)
    assert not watching.bad_steps and not watching.reports
