"""The settings that every attention variant shares."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

__all__ = ["AttentionConfig"]

ACTIVATIONS = ("gelu", "relu", "swish")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes and switches of an attention model, checked when they are set.

    A variant subclasses it and adds its own settings; it calls ``super().__post_init__()`` before its own checks, and
    adds to ``outside_state`` the names of settings that its streaming state does not depend on.

    Args:
        vocab_size: Number of token ids; 256 fits plain bytes.
        hidden_size: Model width D.
        num_layers: Number of blocks.
        num_heads: Query heads H; ``hidden_size`` must divide by it.
        num_kv_heads: Key and value heads G, shared by groups of query heads (grouped-query attention, Ainslie et al.
            2023); ``None`` means as many as query heads.
        intermediate_size: Inner width of the MLP; ``None`` means ``4 * hidden_size``.
        activation: Nonlinearity of the MLP: ``"gelu"``, ``"relu"`` or ``"swish"``.
        dropout: Probability of dropping entries of the embeddings and of each residual branch while training.
        attention_dropout: Probability of dropping attention weights while training.
        layer_norm_eps: Added to the mean square inside each RMSNorm.
        initializer_range: Standard deviation of the initial weights of linear layers and embeddings.
        max_sequence_length: Longest sequence, in tokens, that the model takes.
        type_vocab_size: Number of token types, each with a learned embedding; 0 leaves token types out.
        learned_positions: Whether a learned embedding of the absolute position is added to the token embedding.
        rope_base: Base of the rotary position embedding inside the attention core; ``None`` means no rotation.
        causal: Whether a token sees the past only; ``False`` lets it see both sides.
        stability_factor: Share, from 0 to 1, of queries and keys divided by their root mean square: 0 leaves them as
            they are, 1 is the norm of queries and keys (Henry et al. 2020).
        calibration_factor: How far the attention branch of a token is drawn back to its usual scale where it leaves it,
            from 0, which leaves this out, to 1; see ``StabilityEnhancer``.
        gradient_checkpointing: Whether blocks recompute their activations in the backward pass to save memory.
        memory_efficient: Whether only the attention cores do, which costs less time and saves most of what long
            sequences take.

    Raises:
        ValueError: If a setting is out of range or does not fit another one.
    """

    outside_state: ClassVar[frozenset[str]] = frozenset(
        {"dropout", "attention_dropout", "initializer_range", "gradient_checkpointing", "memory_efficient"}
    )

    vocab_size: int = 256
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    intermediate_size: int | None = None
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_sequence_length: int = 2048
    type_vocab_size: int = 0
    learned_positions: bool = False
    rope_base: float | None = 10000.0
    causal: bool = True
    stability_factor: float = 0.0
    calibration_factor: float = 0.0
    gradient_checkpointing: bool = False
    memory_efficient: bool = False

    def __post_init__(self) -> None:
        """Check every setting."""
        self._require_types()
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_sequence_length"):
            self._require_integer(name, minimum=1)
        for name in ("num_kv_heads", "intermediate_size"):
            if getattr(self, name) is not None:
                self._require_integer(name, minimum=1)
        self._require_integer("type_vocab_size", minimum=0)
        self._require_choice("activation", ACTIVATIONS)
        for name in ("dropout", "attention_dropout"):
            self._require(0.0 <= getattr(self, name) < 1.0, name, "must lie in [0, 1)")
        for name in ("stability_factor", "calibration_factor"):
            self._require(0.0 <= getattr(self, name) <= 1.0, name, "must lie in [0, 1]")
        for name in ("layer_norm_eps", "initializer_range"):
            self._require(getattr(self, name) > 0, name, "must be positive")
        self._require(self.rope_base is None or self.rope_base > 1, "rope_base", "must be above 1, or None for none")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}; "
                f"use hidden_size={self.num_heads * max(1, round(self.hidden_size / self.num_heads))}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.kv_heads}; "
                f"use one of {[g for g in range(1, self.num_heads + 1) if self.num_heads % g == 0]}"
            )
        if self.rope_base is not None and self.head_dim % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} over num_heads={self.num_heads} gives heads of odd width "
                f"{self.head_dim}, which cannot be rotated in pairs; change one of them, or set rope_base=None"
            )

    @property
    def head_dim(self) -> int:
        """Width d of one head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number G of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def mlp_size(self) -> int:
        """Inner width of the MLP."""
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size

    def shared_settings(self) -> dict[str, Any]:
        """Return the settings that all variants share, by name."""
        return {field.name: getattr(self, field.name) for field in fields(AttentionConfig)}

    def for_layer(self, index: int) -> "AttentionConfig":
        """Return the settings of one layer: these, unless a variant mixes layers of several kinds.

        Args:
            index: From 0 on.
        """
        return self

    def state_signature(self) -> dict[str, Any]:
        """Return the settings that a streaming state depends on, by name.

        A state made under one signature is refused under another.
        """
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in settings.items() if name not in self.outside_state}

    def _require(self, condition: bool, name: str, remedy: str) -> None:
        if not condition:
            raise ValueError(f"{name}={getattr(self, name)!r} {remedy}")

    def _require_types(self) -> None:
        """Require switches to be booleans, and numbers that may be broken to be numbers."""
        for field in fields(self):
            value, optional = getattr(self, field.name), field.type == float | None
            if field.type is bool:
                self._require(isinstance(value, bool), field.name, "must be True or False")
            elif field.type is float or (optional and value is not None):
                valid = isinstance(value, Real) and not isinstance(value, bool)
                self._require(valid, field.name, "must be a number or None" if optional else "must be a number")

    def _require_integer(self, name: str, *, minimum: int) -> None:
        value = getattr(self, name)
        valid = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
        self._require(valid, name, f"must be an integer of at least {minimum}")

    def _require_choice(self, name: str, choices: Sequence[str]) -> None:
        self._require(getattr(self, name) in choices, name, f"must be one of {', '.join(map(repr, choices))}")
