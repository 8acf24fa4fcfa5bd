"""A step of an optimizer that is taken in parts."""

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class DueStep:
    """What an optimizer has been asked to do at some moment, to be done parameter by parameter.

    Together the parts are the step as it would have been then, to the bit, provided that the optimizer moves each
    parameter by its own gradient and state alone. Learning rates and other options are those of that moment, whatever
    schedulers have changed meanwhile; so are gradients: the tensors, that is, not yet what is in them.
    """

    def __init__(self, optimizer: Optimizer, step: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Take note of it.

        Args:
            optimizer: Whose step is due.
            step: Takes it.
            options: For ``step``.
        """
        self._step, self._options = step, dict(options)
        self._groups = [
            (group, {name: _kept(value) for name, value in group.items() if name != "params"}, list(group["params"]))
            for group in optimizer.param_groups
        ]
        self.gradients: dict[int, Tensor] = {
            id(p): p.grad for _, _, parameters in self._groups for p in parameters if p.grad is not None
        }

    def take(self, ids: Container[int]) -> None:
        """Move some parameters.

        Args:
            ids: The ``id`` of each. A parameter must not be moved twice.
        """
        now = [dict(group) for group, _, _ in self._groups]
        moved: list[tuple[Tensor, Tensor | None]] = []
        device = "cpu"
        try:
            for group, then, parameters in self._groups:
                chosen = [p for p in parameters if id(p) in ids and id(p) in self.gradients]
                group.update(then)
                group["params"] = chosen
                for parameter in chosen:
                    # Somebody may have set it to None in between, as before validation.
                    moved.append((parameter, parameter.grad))
                    parameter.grad = self.gradients[id(parameter)]
                    device = parameter.device.type
            # The forward pass may have modes of its own, which the state of an optimizer must not take over.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                self._step(**self._options)
        finally:
            for parameter, gradient in moved:
                parameter.grad = gradient
            for (group, _, _), values in zip(self._groups, now, strict=True):
                group.clear()
                group.update(values)


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
