"""DALA as a variant of the model: its settings, its learned parts, its registration."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from danon_lightning.attention.checks import check_like, check_range
from danon_lightning.attention.components.importance import ImportanceNetwork
from danon_lightning.attention.components.recurrent import RecurrentState
from danon_lightning.attention.components.router import DynamicRouter
from danon_lightning.attention.config import AttentionConfig
from danon_lightning.attention.core import AttentionCore, State, observing
from danon_lightning.attention.dala.functional import dala_attention
from danon_lightning.attention.dala.memory import gumbel_noise
from danon_lightning.attention.dala.streaming import empty_state, stream_chunk
from danon_lightning.attention.layers import joint_linear, keep_in_graph
from danon_lightning.attention.model import AttentionModel, AttentionModelOutput, evaluating
from danon_lightning.attention.registry import register_variant
from danon_lightning.attention.statistics import count_real, token_weights

__all__ = ["DALAAttention", "DALAConfig", "DALAModel", "DALAOutput"]

NARROWEST_WINDOW = 4.0
# Beyond so many blocks a Gaussian is flat over the two blocks of the window.
WIDEST_WINDOW_IN_BLOCKS = 8.0


@dataclass(frozen=True, kw_only=True)
class DALAConfig(AttentionConfig):
    """Settings of dynamic adaptive long-range attention, beside those that all variants share.

    Args:
        block_size: Tokens B in a block; a query reads its own block and the one before token by token.
        memory_size: Tokens M of the older past that the importance memory holds.
        use_sparse_attention: Whether there is an importance memory; without it, only window and state are left.
        importance_threshold: Importance, from 0 to 1, below which a token is not remembered.
        recency: What a position adds to the score by which the memory chooses, in nats: of two tokens 1 / ``recency``
            positions apart the older one must be e times as important.
        use_recursive_state: Whether a recurrent state holds the whole past.
        state_decay_rate: Share of the state of the first head that is left after a token, at first; the other heads
            forget more slowly, the last one keeps 0.9975. All heads keep the same share if it is larger than that.
        state_update_frequency: Tokens that the state takes in at once; at most ``block_size``, for the window must read
            those that wait.
        use_adaptive_router: Whether each token weighs memory and state for each head; otherwise both count as they are.
        router_temperature: Divides the logits of the router.
        selection_noise: Scale of the Gumbel noise, in nats, on the scores by which the memory chooses in training. What
            is not remembered has no gradient: with noise it is remembered at times, and can show that it is worth it.
        memory_logit: What the router adds to the logits of the memory at first, in nats. Hundreds of remembered tokens,
            none of which is worth reading yet, would else outweigh the window.

    Raises:
        ValueError: If a setting is out of range or does not fit another one.
    """

    outside_state: ClassVar[frozenset[str]] = AttentionConfig.outside_state | {
        "max_sequence_length",
        "memory_logit",
        "selection_noise",
    }

    max_sequence_length: int = 1_000_000
    block_size: int = 64
    memory_size: int = 256
    use_sparse_attention: bool = True
    importance_threshold: float = 0.0
    recency: float = 1e-3
    selection_noise: float = 0.0
    use_recursive_state: bool = True
    state_decay_rate: float = 0.9
    state_update_frequency: int = 1
    use_adaptive_router: bool = True
    router_temperature: float = 1.0
    memory_logit: float = -4.0

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        for name in ("block_size", "memory_size", "state_update_frequency"):
            self._require_integer(name, minimum=1)
        self._require(0 <= self.importance_threshold <= 1, "importance_threshold", "must lie between 0 and 1")
        self._require(self.recency >= 0, "recency", "must not be negative: the memory would keep the oldest tokens")
        self._require(self.selection_noise >= 0, "selection_noise", "must not be negative; 0 means none")
        self._require(0 < self.state_decay_rate < 1, "state_decay_rate", "must lie between 0 and 1")
        self._require(self.router_temperature > 0, "router_temperature", "must be positive")
        self._require(math.isfinite(self.memory_logit), "memory_logit", "must be finite")
        self._require(self.causal, "causal", "is not possible with dala: its memory and state are of the past")
        if self.state_update_frequency > self.block_size:
            raise ValueError(
                f"state_update_frequency={self.state_update_frequency} exceeds block_size={self.block_size}: tokens "
                "that wait for the state would leave the window; make the block at least as long"
            )


@dataclass
class DALAOutput(AttentionModelOutput):
    """What a DALA model returns.

    Attributes:
        router_logits: For each layer, the logits of memory (first, where there is one) and state (last), not divided by
            the temperature ``[b, routes, H, n]``; ``None`` without a router.
        importance_scores: For each layer, the importance of each token, between 0 and 1 ``[b, n]``.
    """

    details: ClassVar[tuple[str, ...]] = ("router_logits", "importance_scores")

    router_logits: tuple[Tensor, ...] | None = None
    importance_scores: tuple[Tensor, ...] | None = None


class DALAAttention(AttentionCore):
    """The core of DALA: window and memory in one softmax, plus what is read from a recurrent state.

    It offers to ``observing``: ``router_logits``, ``importance_scores`` as in ``DALAOutput``, and ``route_outputs``,
    what memory and state contribute to the output ``[b, routes, H, n, d]`` (in the parallel form).

    Args:
        config: The settings.
    """

    config: DALAConfig

    def __init__(self, config: DALAConfig) -> None:
        """Create the learned parts."""
        super().__init__(config)
        self.importance = ImportanceNetwork(config.hidden_size, std=config.initializer_range)
        self.log_distance_decay = nn.Parameter(torch.empty(config.num_heads))
        self.window_scale = nn.Parameter(torch.empty(config.num_heads))
        self.recurrent: RecurrentState | None = None
        self.router: DynamicRouter | None = None
        if config.use_recursive_state:
            self.recurrent = RecurrentState(
                config.hidden_size,
                config.num_heads,
                config.head_dim,
                decay_rate=config.state_decay_rate,
                update_frequency=config.state_update_frequency,
                eps=config.layer_norm_eps,
            )
        routes = config.use_sparse_attention + config.use_recursive_state
        if config.use_adaptive_router and routes:
            start = (config.memory_logit,) * config.use_sparse_attention + (0.0,) * config.use_recursive_state
            self.router = DynamicRouter(
                config.hidden_size, config.num_heads, routes, temperature=config.router_temperature, start=start
            )
        self.memory_size = config.memory_size if config.use_sparse_attention else 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with a window that hardly falls off."""
        with torch.no_grad():
            self.log_distance_decay.fill_(-4.0)
            self.window_scale.fill_(9.0)

    @property
    def streams_without_end(self) -> bool:
        """True: the state does not grow."""
        return True

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Return the state before the first token; see ``AttentionCore.init_state``."""
        groups, width = self.config.kv_heads, self.config.head_dim
        state: State = {"softmax": empty_state(batch_size, groups, width, device=device, dtype=dtype)}
        if self.recurrent is not None:
            state["recurrent"] = self.recurrent.init_state(batch_size, groups, device=device, dtype=dtype)
        return state

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
        """Attend; see ``AttentionCore.forward``."""
        log_importance, logits, gates = self._project(x)
        self._observe("importance_scores", log_importance.exp)
        if self.router is not None and logits is not None:
            temperature = self.router.temperature
            self._observe("router_logits", lambda: logits * temperature)
        memory_bias = logits[:, 0] if logits is not None and self.memory_size else None
        first = 0 if state is None else state["softmax"]["position"]
        settings = self._settings(log_importance, first, key_padding_mask)
        noise = self.config.selection_noise if self.training else 0.0
        settings |= {"dropout_p": self.dropout_p, "selection_bias": gumbel_noise(log_importance, noise)}
        new_state: State = {}
        if state is None:
            output = dala_attention(q, k, v, memory_size=self.memory_size, memory_bias=memory_bias, **settings)
        else:
            output, new_state["softmax"] = stream_chunk(
                q, k, v, state["softmax"], memory_size=self.memory_size, memory_bias=memory_bias, **settings
            )
        if memory_bias is not None and (state is not None or q.shape[2] <= 2 * self.config.block_size):
            # Short sequences remember nothing.
            output = keep_in_graph(output, memory_bias)
        if self.recurrent is None:
            self._observe("route_outputs", lambda: self._routes(q, k, v, output, memory_bias, None, settings))
            return output, None if state is None else new_state
        # What is read is added to the rest piece by piece, unless somebody wants to see it by itself.
        apart = self._is_observed("route_outputs")
        result, new_state["recurrent"] = self.recurrent(
            x,
            q,
            k,
            v,
            weight=_state_weight(logits),
            onto=None if apart else output,
            gates=gates,
            key_padding_mask=key_padding_mask,
            state=None if state is None else state["recurrent"],
        )
        if apart:
            self._observe("route_outputs", lambda: self._routes(q, k, v, output, memory_bias, result, settings))
            result = output + result
        return result, None if state is None else new_state

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Sequence[Tensor] | None]:
        """Return log-importance, the logits of the router, and what the gates of the state are made of."""
        layers: list[nn.Linear] = [self.importance.inner]
        if self.router is not None:
            layers.append(self.router.projection)
        if self.recurrent is not None:
            layers += [self.recurrent.decay, self.recurrent.rate]
        inner, *rest = joint_linear(x, layers)
        logits = None if self.router is None else self.router.continued(rest.pop(0))
        return self.importance.continued(inner), logits, rest or None

    def _settings(self, log_importance: Tensor, first: int, key_padding_mask: Tensor | None) -> dict[str, Any]:
        """Return the arguments of the softmax part, beside queries, keys, values and memory."""
        return {
            "log_importance": log_importance,
            "block_size": self.config.block_size,
            "distance_decay": self.log_distance_decay.exp(),
            "window_width": self._window_width(first, log_importance.shape[1]),
            "importance_threshold": self.config.importance_threshold,
            "recency": self.config.recency,
            "rope_base": self.config.rope_base,
            "key_padding_mask": key_padding_mask,
        }

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> Callable[..., Any]:
        """Return the softmax part as a function of the values."""
        bias = self.router(x)[:, 0] if self.router is not None and self.memory_size else None
        settings = self._settings(self.importance(x), 0, key_padding_mask)
        return partial(dala_attention, q, k, memory_size=self.memory_size, memory_bias=bias, **settings)

    def _statistics(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> dict[str, Any]:
        """Count the tokens of window and memory, and tell the share of each route.

        That of the state is the norm of what is read from it over the sum of this and the norm of the softmax part.
        """
        output, stats = self._attend(x, q, k, key_padding_mask)(v, return_stats=True)
        size, queries = self.config.block_size, torch.arange(q.shape[-2], device=q.device)
        real = q.new_ones(q.shape[0], q.shape[-2], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        window = count_real((queries // size - 1).clamp(min=0) * size, queries + 1, real)
        memory = (stats.memory_tokens >= 0).sum(dim=-1)[:, queries // size]
        read = ((window + memory) * real).unsqueeze(1)
        routes = {"window": 1 - stats.memory_weight}
        if self.memory_size:
            routes["memory"] = stats.memory_weight
        if self.recurrent is not None:
            weight = _state_weight(None if self.router is None else self.router(x))
            recalled = self.recurrent(x, q, k, v, weight=weight, key_padding_mask=key_padding_mask)[0]
            precise = torch.promote_types(output.dtype, torch.float32)
            state, softmax = (part.to(precise).norm(dim=-1) for part in (recalled, output))
            share = state / (state + softmax).clamp(min=torch.finfo(state.dtype).tiny)
            routes = {name: part * (1 - share) for name, part in routes.items()} | {"state": share}
        return {"tokens_read": read, "keys_read": read, **{f"route/{name}": part for name, part in routes.items()}}

    def _token_weights(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Return the weights of the softmax of window and memory: what the state gives is no mean of tokens."""
        return token_weights(self._attend(x, q, k, key_padding_mask), v, at_once=v.shape[-1])

    def _window_width(self, first: int, count: int) -> Tensor:
        """Return the widths of the windows of the blocks that tokens belong to ``[H, blocks]``."""
        size = self.config.block_size
        blocks = torch.arange(first // size, -(-(first + count) // size), device=self.window_scale.device)
        widest = max(NARROWEST_WINDOW, WIDEST_WINDOW_IN_BLOCKS * size)
        growth = ((blocks + 1) * float(size)).log1p().to(self.window_scale.dtype)
        return (self.window_scale.clamp(min=1.0).unsqueeze(-1) * growth).clamp(NARROWEST_WINDOW, widest)

    def _routes(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        memory_bias: Tensor | None,
        read: Tensor | None,
        settings: dict[str, Any],
    ) -> Tensor:
        """Return what each route contributes to the output: the memory what the window alone does not give."""
        routes = []
        if self.memory_size:
            _, stats = dala_attention(
                q, k, v, memory_size=self.memory_size, memory_bias=memory_bias, return_stats=True, **settings
            )
            alone = dala_attention(q, k, v, memory_size=0, **settings)
            routes.append(output - (1 - stats.memory_weight).unsqueeze(-1).to(alone.dtype) * alone)
        if read is not None:
            routes.append(read)
        return torch.stack(routes, dim=1)


def _state_weight(logits: Tensor | None) -> Tensor | None:
    """Return what the logits of the router give the state ``[b, H, n]``: one where they are zero."""
    return None if logits is None else 2 * logits[:, -1].sigmoid()


class DALAModel(AttentionModel):
    """A model with dynamic adaptive long-range attention in every block.

    Args:
        config: The settings; ``None`` means the defaults.
        **overrides: Settings that replace those of ``config``.
    """

    config_class: ClassVar[type[AttentionConfig]] = DALAConfig
    output_class: ClassVar[type[AttentionModelOutput]] = DALAOutput

    def __init__(self, config: DALAConfig | None = None, **overrides: object) -> None:
        """Create the layers."""
        super().__init__(config, **overrides)

    @torch.no_grad()
    def get_importance_scores(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the importance of each token in each layer, between 0 and 1, in evaluation mode.

        Args:
            input_ids: Token ids ``[b, n]``.
            attention_mask: 1 for real tokens ``[b, n]``; the importance of others is 0.

        Returns:
            ``[layers, b, n]``.
        """
        with evaluating(self):
            output = self(input_ids, attention_mask, output_details=("importance_scores",))
        scores = torch.stack(output.importance_scores)
        return scores if attention_mask is None else scores * attention_mask.to(scores.dtype)

    @torch.no_grad()
    def update_router(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Turn each head towards the route, memory or state, that points to the labels: routing by agreement.

        The bias of a route grows by the mean cosine between what it contributes, seen through the output projection of
        its block, and the embedding of the label. This happens outside autograd and beside the optimizer, for instance
        every few hundred steps.

        Args:
            input_ids: Token ids ``[b, n]``.
            labels: What should follow each token ``[b, n]``, integer; negative ones do not count.
            attention_mask: 1 for real tokens ``[b, n]``.

        Returns:
            What was added ``[layers, routes, H]``.

        Raises:
            ValueError: If ``labels`` has another shape or dtype or is out of range, or there is no router.
        """
        cores: Sequence[DALAAttention] = [block.core for block in self.blocks()]  # type: ignore[misc]
        if any(core.router is None for core in cores):
            raise ValueError("update_router needs a router; build the model with use_adaptive_router=True")
        check_like("labels", labels, input_ids)
        counted, labels = labels >= 0, labels.long().clamp(min=0)
        check_range("labels", labels, "vocab_size", self.config.vocab_size)
        with evaluating(self), observing(cores, ("route_outputs",)) as observed:
            self(input_ids, attention_mask, output_details=())
        if attention_mask is not None:
            counted = counted & attention_mask.bool()
        targets = self.token_embedding(labels)
        added = []
        for block, core, values in zip(self.blocks(), cores, observed, strict=True):
            weight = block.output.weight.unflatten(1, (self.config.num_heads, -1))  # [D, H, d]
            predictions = torch.einsum("brhnd,Dhd->brhnD", values["route_outputs"], weight)
            assert core.router is not None
            added.append(core.router.reinforce(predictions, targets, counted))
        return torch.stack(added)


register_variant("dala", DALAConfig, DALAAttention)
