"""A stack of attention blocks between token embeddings and a final norm."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danon_lightning.attention.block import AttentionBlock
from danon_lightning.attention.checks import check_like, check_range
from danon_lightning.attention.config import AttentionConfig
from danon_lightning.attention.core import State, observing
from danon_lightning.attention.layers import NormalEmbedding
from danon_lightning.attention.registry import variant_of

__all__ = ["AttentionModel", "AttentionModelOutput", "evaluating"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for the time of the context; then every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass
class AttentionModelOutput:
    """What a model returns.

    Attributes:
        last_hidden_state: Output of the final norm ``[b, n, D]``, zero at padded positions.
        state: The streaming state after the input, if one was given.
        all_hidden_states: The embeddings and the output of every block, each ``[b, n, D]``, if asked for.

    A subclass adds what the cores of its variant measure, one entry a layer, under the names by which they offer it;
    ``details`` are those that are given without being asked for.
    """

    details: ClassVar[tuple[str, ...]] = ()

    last_hidden_state: Tensor
    state: State | None = None
    all_hidden_states: tuple[Tensor, ...] | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not ``None``, in order."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if value is not None)

    @classmethod
    def all_details(cls) -> tuple[str, ...]:
        """Return the names of all that cores of the variant can be asked for."""
        shared = {field.name for field in fields(AttentionModelOutput)}
        return tuple(field.name for field in fields(cls) if field.name not in shared)


class AttentionModel(nn.Module):
    """Token embedding, blocks called in order, final norm.

    The variant follows from the class of the config, so ``AttentionModel(MSRAConfig())`` equals ``MSRAModel()``.

    Args:
        config: The settings; ``None`` means the defaults of the subclass.
        **overrides: Settings that replace those of ``config``.

    Raises:
        TypeError: If ``config`` has the wrong class, or an override is not a setting.
        ValueError: If a setting is invalid, or no variant is registered for the class of the config.
    """

    config_class: ClassVar[type[AttentionConfig]] = AttentionConfig
    output_class: ClassVar[type[AttentionModelOutput]] = AttentionModelOutput

    def __init__(self, config: AttentionConfig | None = None, **overrides: Any) -> None:
        """Create the layers."""
        super().__init__()
        self.config = config = self._resolve_config(config, overrides)
        width, std = config.hidden_size, config.initializer_range
        self.token_embedding = NormalEmbedding(config.vocab_size, width, std=std)
        self.type_embedding = (
            NormalEmbedding(config.type_vocab_size, width, std=std) if config.type_vocab_size else None
        )
        self.position_embedding = (
            NormalEmbedding(config.max_sequence_length, width, std=std) if config.learned_positions else None
        )
        self.layers = nn.ModuleList(
            AttentionBlock(layer_config, variant_of(layer_config).attention_class(layer_config))
            for layer_config in map(config.for_layer, range(config.num_layers))
        )
        self.final_norm = nn.RMSNorm(width, eps=config.layer_norm_eps)

    def init_state(self, batch_size: int) -> State:
        """Return the streaming state before the first token.

        It consists of dicts, lists, tensors and numbers only, so ``torch.save`` writes it and
        ``torch.load(weights_only=True)`` reads it back; ``map_state`` moves it to another device.

        Args:
            batch_size: Number of sequences b.

        Raises:
            ValueError: If the model is not causal.
        """
        if not self.config.causal:
            raise ValueError("causal=False has no streaming form: tokens would wait for those on their right")
        return {
            "signature": self._signature(),
            "batch_size": batch_size,
            "position": 0,
            "layers": [layer.init_state(batch_size) for layer in self.blocks()],
        }

    def finish_step(self, training_step: int) -> None:
        """Move on what follows the course of training; call it after each step, as the LightningModules do.

        Args:
            training_step: Optimizer steps so far.
        """
        for block in self.blocks():
            block.core.finish_step(training_step)

    @property
    def streams_without_end(self) -> bool:
        """Whether the streaming form may go on beyond ``max_sequence_length``."""
        return self.position_embedding is None and all(layer.core.streams_without_end for layer in self.blocks())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        state: State | None = None,
        output_hidden_states: bool = False,
        output_details: Sequence[str] | None = None,
        return_dict: bool = True,
    ) -> AttentionModelOutput | tuple[Any, ...]:
        """Compute the hidden states of a batch of sequences, or of their next chunk.

        Args:
            input_ids: Token ids ``[b, n]``, int64 or int32, below ``vocab_size``.
            attention_mask: 1 for real tokens, 0 for padding ``[b, n]``, boolean or integer; ``None``: all are real.
            token_type_ids: Token types ``[b, n]``, integer; ``None``: all are 0. Needs ``type_vocab_size``.
            position_ids: Rows of the learned position embedding ``[b, n]`` or ``[n]``, integer; ``None``: counted from
                the start of the sequence. Needs ``learned_positions``. Rotary positions are always counted.
            state: A state from ``init_state`` or an earlier output; the input then continues that sequence. The given
                state itself is not changed.
            output_hidden_states: Whether the hidden states between the blocks are returned too.
            output_details: Which of the fields that the output class of this variant adds are wanted; ``None``: its
                ``details``.
            return_dict: ``False`` returns a tuple of those results that are not ``None``.

        Returns:
            An ``AttentionModelOutput``, or its values as a tuple.

        Raises:
            ValueError: If an argument has the wrong shape or dtype, or does not fit the configuration; if the sequence
                is empty or too long; if the state comes from another configuration or batch size. On CPUs also if an
                id is out of range.
        """
        self._check_inputs(input_ids, attention_mask, token_type_ids, position_ids, state)
        first = 0 if state is None else state["position"]
        mask = None if attention_mask is None else attention_mask.bool()
        hidden = self._embed(input_ids, token_type_ids, position_ids, first)
        all_hidden = [hidden]
        layer_states: list[State | None] = []
        wanted = self._wanted(output_details)
        with observing([block.core for block in self.blocks()] if wanted else [], wanted) as observed:
            for index, layer in enumerate(self.layers):
                layer_state = None if state is None else state["layers"][index]
                if self.config.gradient_checkpointing and self.training and torch.is_grad_enabled():
                    hidden, layer_state = checkpoint(layer, hidden, mask, layer_state, use_reentrant=False)
                else:
                    hidden, layer_state = layer(hidden, mask, layer_state)
                all_hidden.append(hidden)
                layer_states.append(layer_state)
        last = self.final_norm(hidden)
        if mask is not None:
            last = last.masked_fill(~mask.unsqueeze(-1), 0.0)
        new_state = None
        if state is not None:
            new_state = {**state, "position": first + input_ids.shape[1], "layers": layer_states}
        details = {name: tuple(values[name] for values in observed) for name in wanted}
        output = self.output_class(
            last,
            new_state,
            tuple(all_hidden) if output_hidden_states else None,
            **{name: None if None in values else values for name, values in details.items()},
        )
        return output if return_dict else output.to_tuple()

    @classmethod
    def _resolve_config(cls, config: AttentionConfig | None, overrides: dict[str, Any]) -> AttentionConfig:
        if config is not None and not isinstance(config, cls.config_class):
            raise TypeError(f"config={config!r} must be an instance of {cls.config_class.__name__}")
        known = [field.name for field in fields(cls.config_class if config is None else config)]
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise TypeError(f"{', '.join(unknown)}: not a setting of this model; use one of {', '.join(known)}")
        return cls.config_class(**overrides) if config is None else replace(config, **overrides)

    def blocks(self) -> list[AttentionBlock]:
        """Return the blocks in order."""
        return [layer for layer in self.layers if isinstance(layer, AttentionBlock)]

    def _wanted(self, details: Sequence[str] | None) -> Sequence[str]:
        if details is None:
            return self.output_class.details
        known = self.output_class.all_details()
        if unknown := sorted(set(details) - set(known)):
            raise ValueError(
                f"output_details: {', '.join(unknown)} is not among {', '.join(known) or 'the (no) details'}"
            )
        return details

    def _signature(self) -> dict[str, Any]:
        return {"config_class": type(self.config).__name__, **self.config.state_signature()}

    def _embed(
        self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None, first: int
    ) -> Tensor:
        hidden: Tensor = self.token_embedding(input_ids)
        if self.type_embedding is not None:
            hidden = hidden + self.type_embedding(
                torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids.long()
            )
        if self.position_embedding is not None:
            if position_ids is None:
                position_ids = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
            hidden = hidden + self.position_embedding(position_ids.long())
        return F.dropout(hidden, self.config.dropout, self.training)

    def _check_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        state: State | None,
    ) -> None:
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}; it must be [batch, tokens], neither zero")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids has dtype {input_ids.dtype}; it must be torch.int64 or torch.int32")
        check_range("input_ids", input_ids, "vocab_size", self.config.vocab_size)
        check_like("attention_mask", attention_mask, input_ids)
        check_like("token_type_ids", token_type_ids, input_ids)
        check_like("position_ids", position_ids, input_ids, may_lack_batch=True)
        if token_type_ids is not None and self.type_embedding is None:
            raise ValueError("token_type_ids was given, but type_vocab_size=0; set it to the number of token types")
        if position_ids is not None and self.position_embedding is None:
            raise ValueError("position_ids was given, but learned_positions=False; rotary positions are always counted")
        if token_type_ids is not None:
            check_range("token_type_ids", token_type_ids, "type_vocab_size", self.config.type_vocab_size)
        if position_ids is not None:
            check_range("position_ids", position_ids, "max_sequence_length", self.config.max_sequence_length)
        if state is not None:
            self._check_state(state, input_ids)
        self._check_length(input_ids.shape[1], 0 if state is None else state["position"], state is not None)

    def _check_length(self, tokens: int, first: int, streaming: bool) -> None:
        limit = self.config.max_sequence_length
        if first + tokens <= limit:
            return
        if streaming and self.streams_without_end:
            return
        seen = f" after the {first} that the state has seen" if first else ""
        raise ValueError(
            f"input_ids has {tokens} tokens{seen}, more than max_sequence_length={limit}; shorten the input or build "
            "the model with a larger max_sequence_length"
        )

    def _check_state(self, state: State, input_ids: Tensor) -> None:
        missing = {"signature", "batch_size", "position", "layers"} - set(state)
        if missing:
            raise ValueError(f"state lacks {', '.join(sorted(missing))}; start from model.init_state(batch_size)")
        ours, theirs = self._signature(), state["signature"]
        differing = [
            f"{name}: {theirs.get(name)!r} there, {ours[name]!r} here"
            for name in sorted(ours)
            if ours[name] != theirs.get(name)
        ]
        if differing:
            raise ValueError(
                f"state comes from another configuration ({'; '.join(differing)}); start from "
                "model.init_state(batch_size), or build the model as it was"
            )
        if state["batch_size"] != input_ids.shape[0]:
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)}, but state was made for batches of "
                f"{state['batch_size']}; start another one with model.init_state({input_ids.shape[0]})"
            )
