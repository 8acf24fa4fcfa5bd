"""Steps that each replica takes by itself, and their mean every now and then."""

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from danon_lightning.strategies.process_groups import GroupReference
from danon_lightning.strategies.sync.settings import PeriodicSync


class LocalSteps:
    """Counts the steps of a round, and synchronises the replicas at its end (see :class:`PeriodicSync`).

    Attributes:
        steps: Those of this round so far.
        dropped: Rounds whose result was not finite, so that all replicas have gone back to its beginning.
    """

    def __init__(
        self,
        settings: PeriodicSync,
        parameters: Mapping[str, nn.Parameter],
        buffers: Iterable[Tensor],
        average: Callable[[list[nn.Parameter]], bool],
        group: dist.ProcessGroup,
    ) -> None:
        """Begin a round. The weights of all replicas are the same.

        Args:
            settings: How long rounds are, and what happens at their ends.
            parameters: What is trained, by name.
            buffers: Running statistics and the like. Of those that are numbers with fractions the mean is taken.
            average: Averages ``.grad`` over the replicas. Returns whether all was finite, the same on all ranks.
            group: The replicas.
        """
        self._settings, self._average = settings, average
        self._parameters = dict(parameters)
        self._buffers = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._group = GroupReference(group)
        self._outer = {name: nn.Parameter(p.detach().clone()) for name, p in self._parameters.items()}
        momentum = settings.outer_momentum
        self._optimizer = SGD(
            self._outer.values(), lr=settings.outer_learning_rate, momentum=momentum, nesterov=momentum > 0
        )
        self.steps = self.dropped = 0

    @property
    def staleness(self) -> float:
        """For how many optimizer steps the replicas have not heard of one another."""
        return float(self.steps)

    def after_step(self, optimizer: Optimizer) -> None:
        """Count a step of the optimizer; at the end of a round, synchronise. Collective then."""
        self.steps += 1
        if self.steps >= self._settings.every_n_steps:
            self.synchronize(optimizer)

    @torch.no_grad()
    def synchronize(self, optimizer: Optimizer) -> None:
        """End the round. Collective.

        If the result of a replica is not finite, all of them go back to the weights of its beginning, and the optimizer
        of that one starts anew.

        Args:
            optimizer: Which has moved the weights.
        """
        if not self.steps:
            return
        kept = {name: parameter.grad for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.grad = self._outer[name] - parameter
        if not all_finite(parameter.grad for parameter in self._parameters.values()):
            optimizer.state.clear()
        if self._average(list(self._parameters.values())):
            for outer, parameter in zip(self._outer.values(), self._parameters.values(), strict=True):
                outer.grad = parameter.grad
            self._optimizer.step()
            self._optimizer.zero_grad()
        else:
            self.dropped += 1
        for name, parameter in self._parameters.items():
            parameter.copy_(self._outer[name])
            parameter.grad = kept[name]
        for buffer in self._buffers:
            self._average_buffer(buffer)
        self.steps = 0

    def _average_buffer(self, buffer: Tensor) -> None:
        """Over the replicas where it is finite; where it is on none, nothing changes."""
        counts = buffer.isfinite().all().to(buffer.dtype)
        total = torch.where(counts.bool(), buffer, torch.zeros_like(buffer))
        for tensor in (total, counts):
            dist.all_reduce(tensor, group=self._group())
        if counts:
            buffer.copy_(total / counts)

    def release(self, released: Container[Tensor]) -> None:
        """Have nothing more to do with parameters that this rank does not hold any longer."""
        for name in [name for name, parameter in self._parameters.items() if parameter in released]:
            outer = self._outer.pop(name)
            del self._parameters[name]
            self._optimizer.state.pop(outer, None)
        self._optimizer.param_groups[0]["params"] = list(self._outer.values())

    @torch.no_grad()
    def mean_weights(self) -> dict[str, Tensor]:
        """What the replicas have found so far, in the mean. Collective."""
        means = {}
        for name, parameter in self._parameters.items():
            means[name] = parameter.detach().clone()
            if self.steps:
                dist.all_reduce(means[name], group=self._group())
                means[name] /= dist.get_world_size(self._group())
        return means

    def state_dict(self) -> dict[str, Any]:
        """Where the round has begun, and the momentum: the same on all replicas."""
        momenta = {name: self._optimizer.state[p].get("momentum_buffer") for name, p in self._outer.items()}
        return {
            "outer": {name: outer.detach() for name, outer in self._outer.items()},
            "momentum": {name: momentum for name, momentum in momenta.items() if momentum is not None},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], steps: int) -> None:
        """Go on from a checkpoint.

        Args:
            state: Of :meth:`state_dict`, with all parameters of this rank or more.
            steps: Those of the round.
        """
        for name, outer in self._outer.items():
            outer.copy_(state["outer"][name])
            if name in state["momentum"]:
                self._optimizer.state[outer]["momentum_buffer"] = state["momentum"][name].to(outer, copy=True)
        self.steps = steps


def all_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Whether no element is infinite or no number. Reads the device once."""
    given = [tensor for tensor in tensors if tensor is not None]
    return bool(torch.stack([norm.double() for norm in torch._foreach_norm(given)]).isfinite().all()) if given else True
