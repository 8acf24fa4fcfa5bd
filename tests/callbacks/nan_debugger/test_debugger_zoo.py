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

# What the advice for each fault has to say.
ADVICE = {
    "log of negatives": ["torch.log(x.clamp_min(1e-6))", "the smallest argument was -2.891"],
    "sqrt of negatives": ["torch.sqrt(x.clamp_min(0)", "the smallest argument was -2.891"],
    "0 / 0": ["a / b.clamp_min(1e-6)", "the divisors lie in [0, 0]"],
    "exp overflows": ["subtracting the maximum", "the largest argument was 100", "88.72 in float32"],
    "exp overflows, inf - inf": ["subtracting the maximum", "torch.logsumexp"],
    "a product overflows in fp16": ["float16 ends at 65504", "bf16-mixed", "as large as 3564"],
    "autocast to fp16 overflows": ["float16 ends at 65504", "bf16-mixed", "autocast", "as large as 1e+04"],
    "log in place": ["torch.log(x.clamp_min(1e-6))"],
    "a row hidden as a whole": ["masked out as a whole", "leave one key", "sample 1 of the batch"],
    "constants in LayerNorm without eps": ["Give tried.norm (LayerNorm) a larger eps", "constant"],
    "constants in a norm by hand": ["a / b.clamp_min", "(std + eps)"],
    "dropout leaves nothing": ["a / b.clamp_min", "[0, 12]", "sample"],
    "no label counts": ["ignore_index", 'labels in batch["label"]', ".clamp_min(1)"],
    "log of zero in the training step": ["in training_step, write torch.log(x.clamp_min", "smallest argument was 0."],
    "in a nested module": ["torch.log(x.clamp_min"],
    "in micro-batch 3 of 4": ["in shifted_log, write torch.log(x.clamp_min"],
    "derivative of sqrt at 0": ["torch.sqrt(x + 1e-6)", "torch.linalg.vector_norm", "torch.where inside"],
    "derivative of x ** 0.5 at 0": ["x.clamp_min(1e-6) ** p"],
    "derivative of a norm at 0 by hand": ["torch.linalg.vector_norm", "F.normalize(x, dim=-1, eps=1e-6)"],
    "derivative of acos at 1": ["torch.acos(x.clamp(-1 + 1e-6, 1 - 1e-6))"],
    "where does not shield log in backward": ["torch.where(ok, torch.log(torch.where(ok, x, 1)), 0)"],
    "where does not shield a bad sqrt": ["torch.sqrt(x.clamp_min(0)", "torch.where inside as well"],
    "derivative of a custom function": ["in backward, which divides by what is 0 itself", "gradcheck(Straight.apply"],
    "derivative of log(sum(exp)) of nothing": ["torch.log(x.clamp_min", "torch.logsumexp"],
    "in a checkpoint": ["torch.sqrt(x + 1e-6)"],
    "in a reentrant checkpoint": ["torch.log(x.clamp_min"],
    "NaN in the batch": ['sample 5 of batch["x"]', "1 NaN of 128", "nan_to_num"],
    "infinity in the batch": ['sample 2 of batch["x"]', "1 infinite of 128"],
    "NaN in a weight": ["tried.weight was not finite before the first step, 1 NaN of 256", "initialisation"],
    "NaN in an embedding's row": ["tried.rows.weight", "16 NaN of 128"],
    "NaN in a running variance": ["tried.running_var", "reset_running_stats"],
}


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
    advice = " ".join(report.advice)
    assert [words for words in ADVICE[fault.name] if words not in advice] == [], advice
    assert len(report.advice) <= 3
    if report.cause in ("forward", "backward") and "LayerNorm" not in fault.name:
        assert origin.location in advice


@pytest.mark.parametrize("benign", BENIGN, ids=lambda benign: benign.name)
def test_what_only_looks_like_a_fault_raises_no_alarm(benign):
    torch.manual_seed(0)
    watching = debugger()
    fit(watching, benign.make(), [benign.batch()], trainer().precision_plugin.forward_context)
    assert not watching.bad_steps and not watching.reports
