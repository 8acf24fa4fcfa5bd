"""What the shared block expects of an attention variant, and what streaming states are made of."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from danon_lightning.attention.config import AttentionConfig
from danon_lightning.attention.statistics import LONGEST_MAP, has_past, visible_keys

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

    def _is_observed(self, name: str) -> bool:
        """Tell whether ``observing`` asks for something by this name."""
        return any(name in values for values in self._observers)

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

    @torch.no_grad()
    def attention_statistics(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        state: State | None = None,
    ) -> dict[str, Any]:
        """Measure what ``forward`` attends to with these arguments, without dropout.

        Args:
            x: As in ``forward``, like all others.
            q: Queries.
            k: Keys.
            v: Values.
            key_padding_mask: True for real tokens.
            state: A state that has seen tokens leaves little to be told: ``cache_hit_rate`` where there is a cache.

        Returns:
            ``visible_keys``: how many tokens a query may see ``[b, 1, n]``; and what of this the variant has:
            ``tokens_read``, how many of them it reads one by one, and ``keys_read``, how many keys it reads, summaries
            included, of a shape that broadcasts with ``[b, H, n]``; ``route/<name>``, the share of what it reads by
            that way ``[b, H, n]``; ``weights``, the share of each token ``[b, H, m, m]``, of the first m = 1,024 tokens
            (of a longer sequence only if causal), rows of real queries adding up to one; or under the name of a part
            the same things of that part.
        """
        if state is not None and has_past(state):
            return self._stream_statistics(q, k, v, key_padding_mask, state)
        seen = visible_keys(q, causal=self.config.causal, key_padding_mask=key_padding_mask)
        found: dict[str, Any] = {"visible_keys": seen, **self._statistics(x, q, k, v, key_padding_mask)}
        if q.shape[-2] > LONGEST_MAP:
            if not self.config.causal:
                return found
            # The past of the first tokens is the same in a shorter sequence.
            x, q, k, v = x[:, :LONGEST_MAP], q[..., :LONGEST_MAP, :], k[..., :LONGEST_MAP, :], v[..., :LONGEST_MAP, :]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[:, :LONGEST_MAP]
        weights = self._token_weights(x, q, k, v, key_padding_mask)
        return found if weights is None else {**found, "weights": weights}

    def _statistics(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> dict[str, Any]:
        """Return all of ``attention_statistics`` but ``visible_keys`` and ``weights``, for a whole sequence."""
        return {}

    def _token_weights(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Return ``weights``, if they have a meaning for this variant; see ``attention_statistics``."""
        return None

    def _stream_statistics(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, state: State
    ) -> dict[str, Any]:
        """Return what can be told of a chunk that continues a sequence."""
        return {}

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
