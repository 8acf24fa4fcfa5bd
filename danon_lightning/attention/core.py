"""What the shared block expects of an attention variant, and what streaming states are made of."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from danon_lightning.attention.config import AttentionConfig

__all__ = ["AttentionCore", "State", "detach_state", "map_state", "observing"]

# Plain dicts and lists of tensors, numbers and strings only: torch.save writes them, and
# torch.load(weights_only=True) reads them back.
State: TypeAlias = dict[str, Any]


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Return a copy of ``state`` with ``function`` applied to every tensor in it.

    Args:
        function: For instance ``lambda tensor: tensor.to("cuda")``.
        state: A streaming state, or any nest of dicts, lists and tuples, named ones too.
    """
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {name: map_state(function, item) for name, item in state.items()}
    if isinstance(state, (list, tuple)):
        items = [map_state(function, item) for item in state]
        return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)
    return state


def detach_state(state: State) -> State:
    """Return ``state`` cut off from the graph, for backpropagation truncated at a chunk border."""
    detached: State = map_state(Tensor.detach, state)
    return detached


class AttentionCore(nn.Module, ABC):
    """The part of a block that mixes tokens: one subclass a variant.

    Subclasses are constructed from their config alone. Every parameter must receive a gradient at every sequence
    length, zero if need be (``danon_lightning.attention.layers.keep_in_graph``), and rotation by position happens
    inside the core.

    Args:
        config: The settings of the model.
    """

    def __init__(self, config: AttentionConfig) -> None:
        """Keep the settings."""
        super().__init__()
        self.config = config
        self._observers: list[dict[str, Tensor | None]] = []

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """Attend.

        Args:
            x: Normalised input of the block ``[b, n, D]``, for gates and biases.
            q: Queries ``[b, H, n, d]``, neither rotated nor scaled.
            k: Keys ``[b, G, n, d]``.
            v: Values ``[b, G, n, d]``.
            key_padding_mask: True for real tokens ``[b, n]``, boolean; ``None`` means that all are.
            state: ``None`` for the parallel form. Otherwise ``x`` and the others continue the sequence that the state
                has seen; the state itself is not changed.

        Returns:
            The output ``[b, H, n, d]``, zero in rows that see no real token, and the new state if one was given.
        """

    @abstractmethod
    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Return the state before the first token.

        Args:
            batch_size: Number of sequences b.
            device: Where the state lives.
            dtype: Dtype of its keys, values and the like.
        """

    def finish_step(self, training_step: int) -> None:
        """Move on what follows the course of training, such as schedules and running means.

        Not the forward pass does this: checkpointed activations repeat it and must then find everything as it was.

        Args:
            training_step: Optimizer steps so far.
        """

    def _observe(self, name: str, measure: Callable[[], Tensor]) -> None:
        """Measure something, if ``observing`` asks for it by this name."""
        asking = [values for values in self._observers if name in values]
        if not asking:
            return
        # What is measured only once must not be part of what a checkpoint computes twice.
        twice = self.training and (self.config.gradient_checkpointing or self.config.memory_efficient)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not twice):
            measured = measure()
        for values in asking:
            values[name] = measured

    @property
    def dropout_p(self) -> float:
        """Probability of dropping an attention weight now."""
        return self.config.attention_dropout if self.training else 0.0

    @property
    def streams_without_end(self) -> bool:
        """Whether the streaming form may go on beyond ``max_sequence_length``."""
        return False


@contextmanager
def observing(cores: Iterable[AttentionCore], names: Iterable[str]) -> Iterator[list[dict[str, Tensor | None]]]:
    """Ask cores for what they measure on their way, for the time of the context.

    Args:
        cores: The cores.
        names: What is asked for; the docstring of a core names what it offers.

    Yields:
        For each core the values of its newest forward pass by name, in the graph unless gradients are checkpointed;
        ``None`` for what it has not measured.
    """
    cores, names = list(cores), list(names)
    observed: list[dict[str, Tensor | None]] = [dict.fromkeys(names) for _ in cores]
    for core, values in zip(cores, observed, strict=True):
        core._observers.append(values)
    try:
        yield observed
    finally:
        for core in cores:
            core._observers.pop()
