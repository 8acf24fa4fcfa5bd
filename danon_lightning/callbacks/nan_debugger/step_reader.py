"""What is read in an optimizer step, and from where."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from danon_lightning.callbacks.nan_debugger.batches import StepBatches, floating_leaves
from danon_lightning.callbacks.nan_debugger.check import Named, Reading, read


@dataclass(frozen=True)
class StepReader:
    """Gathers what a step is judged by, for one read from the device.

    Attributes:
        inputs_every: In which steps batches are read, too: every n-th; 0 for none.
        weights_every: The same for weights.
    """

    inputs_every: int = 0
    weights_every: int = 0

    def read(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        optimizer: Optimizer,
        gradients: Sequence[Named],
        batches: StepBatches,
    ) -> tuple[Reading, float | None]:
        """Read it.

        Returns:
            Gradients and losses without the scale of a gradient scaler, and that scale, None without one.
        """
        step, scaler, losses = trainer.global_step, scaler_of(trainer), batches.losses()
        if scaler is not None:
            device = losses[0].device if losses else trainer.strategy.root_device
            losses.append(scaler.scale(torch.ones((), device=device)))
        inputs = []
        if _is_due(step, self.inputs_every):
            inputs = [(f"{one.number}: {path}", leaf) for one in batches for path, leaf in floating_leaves(one.batch)]
        weights = weights_of(module) if _is_due(step, self.weights_every) else []
        reading = read(gradients, losses, inputs=inputs, weights=weights)
        if scaler is None:
            return reading, None
        *values, scale = reading.losses
        norms = reading.norms / scale if unscales_by_itself(optimizer) else reading.norms
        return replace(reading, norms=norms, losses=tuple(value / scale for value in values)), scale


class ParameterNames:
    """Names of parameters, which optimizers do not know."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._names: dict[int, str] = {}

    def gradients(self, module: pl.LightningModule, optimizer: Optimizer) -> list[Named]:
        """The gradients of the parameters of an optimizer, by name."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(id(parameter) not in self._names for parameter in parameters):
            self._names = {id(parameter): name for name, parameter in module.named_parameters()}
            self._names |= {id(p): f"parameter {i}" for i, p in enumerate(parameters) if id(p) not in self._names}
        return [(self._names[id(p)], p.grad) for p in parameters]


def weights_of(module: pl.LightningModule) -> list[Named]:
    """The parameters that lie here; other stages of a pipeline hold theirs."""
    return [
        (name, p)
        for name, p in module.named_parameters()
        if p.is_floating_point() and not p.is_meta and (type(p.data) is Tensor or hasattr(p, "to_local"))
    ]


def scaler_of(trainer: pl.Trainer) -> "torch.amp.GradScaler | None":
    """The gradient scaler, if there is one at work."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def unscales_by_itself(optimizer: Optimizer) -> bool:
    """Whether gradients still carry the scale when the optimizer begins: a fused one removes it, and skips, itself."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def learning_rate(optimizer: Optimizer) -> float:
    """The largest of all groups; NaN if it lies on a device, which is not waited for."""
    rates = [group.get("lr", 0.0) for group in optimizer.param_groups]
    on_host = [float(rate) for rate in rates if not isinstance(rate, Tensor) or rate.device.type == "cpu"]
    return max(on_host, default=float("nan"))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
