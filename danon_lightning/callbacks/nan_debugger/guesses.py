"""What can be said without running a step again: from gradients, and from what the optimizer keeps."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danon_lightning.callbacks.nan_debugger.origin import Origin


def from_gradients(module: nn.Module, bad_gradients: Sequence[str], losses: Iterable[float]) -> Origin:
    """The module nearest to the fault, as far as gradients tell.

    Backward runs from the loss to the first layer, and what is bad stays so on its way. Of the modules with bad
    gradients, the last one (in the order in which they were defined) is therefore where it began, or right before it.

    Args:
        module: The LightningModule.
        bad_gradients: Names of the parameters whose gradient is not finite.
        losses: Of the step.
    """
    how = "This is told from gradients alone, module by module."
    if not all(map(math.isfinite, losses)):
        return Origin("forward", phase="forward", exact=False, note=f"The loss itself was not finite. {how}")
    bad = set(bad_gradients)
    names = [name for name, _ in module.named_parameters() if name in bad]
    if not names:
        return Origin("backward", phase="backward", exact=False, note="No parameter has a gradient that tells more.")
    parameter = names[-1]
    owner = parameter.rpartition(".")[0]
    return Origin(
        "backward",
        module=owner,
        module_type=type(module.get_submodule(owner)).__name__,
        parameter=parameter,
        phase="backward",
        exact=False,
        note=f"{how} It began in this module, or between it and the next one.",
    )


def blame_of_optimizer(
    optimizers: Iterable[Optimizer], parameters: Iterable[Tensor], last_norm: float = math.nan
) -> str:
    """Why the last update must have spoilt these parameters; empty if nothing speaks for it.

    Args:
        optimizers: All there are.
        parameters: Those that are not finite.
        last_norm: Norm of all gradients in the last step.
    """
    bad = {id(parameter): parameter for parameter in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            own = [parameter for parameter in group["params"] if id(parameter) in bad]
            reason = next(filter(None, (_reason(optimizer, group, one, last_norm) for one in own)), "")
            if reason:
                return f"{type(optimizer).__name__}: {reason}"
    return ""


def _reason(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, last_norm: float) -> str:
    for name, value in group.items():
        if isinstance(value, (float, Tensor)) and not math.isfinite(float(value)):
            return f"its {name} is {float(value)}"
    state = optimizer.state.get(parameter, {})
    bad = ~torch.isfinite(_local(parameter.detach()))
    if not state:
        update = float(group.get("lr", 0.0)) * last_norm
        largest = torch.finfo(parameter.dtype).max
        return f"its step was as large as {update:.3g}" if update > largest else ""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(_local(value)).all():
            return f"its {name} is not finite"
    if "exp_avg_sq" in state and "exp_avg" in state:
        first, second = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
        step = first / (second.sqrt() + float(group.get("eps", 0.0)))
        if first.shape == bad.shape and (~torch.isfinite(step) & bad).any():
            return f"exp_avg / (sqrt(exp_avg_sq) + eps) is not finite (eps={group.get('eps')})"
    return ""


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
