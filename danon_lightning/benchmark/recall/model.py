"""The models that are trained, with equal numbers of parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from danon_lightning.attention import AttentionConfig, AttentionModel, get_variant
from danon_lightning.benchmark.recall.settings import FULL, Sizes, Task, fields_of, trained_settings

# How far the number of parameters may be from that of full attention.
TOLERANCE = 0.03


class LanguageModel(nn.Module):
    """An attention model and a linear map to the logits of each token.

    Args:
        config: The settings of the attention model.
    """

    def __init__(self, config: AttentionConfig) -> None:
        """Create the layers."""
        super().__init__()
        self.model = AttentionModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=config.initializer_range)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[b, n, vocabulary]`` of ``tokens [b, n]``."""
        logits: Tensor = self.head(self.model(tokens, output_details=()).last_hidden_state)
        return logits


@dataclass(frozen=True)
class Matched:
    """A config whose model has as many parameters as that of full attention, or nearly so.

    Attributes:
        config: The config, its MLP adjusted.
        parameters: Parameters of the model.
        reference: Parameters of the model with full attention.
    """

    config: AttentionConfig
    parameters: int
    reference: int

    @property
    def deviation(self) -> float:
        """By which share it has more parameters than full attention, or fewer."""
        return self.parameters / self.reference - 1


def matched(
    label: str,
    task: Task,
    sizes: Sizes,
    vocabulary: int,
    changed: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Matched:
    """Adjust the width of the MLP until the number of parameters is that of full attention.

    Args:
        label: A line of the tables.
        task: Which settings it gets.
        sizes: Sizes that all have in common.
        vocabulary: Number of tokens.
        changed: Fields of configs that are set otherwise than for this task, by line of the tables.

    Raises:
        TypeError: If a config has no such field.
        ValueError: If a config refuses a field, or no width of the MLP comes within :data:`TOLERANCE`.
    """
    reference = count_parameters(_config(FULL, task, sizes, vocabulary, changed))
    config = _config(label, task, sizes, vocabulary, changed)
    excess = count_parameters(config) - reference
    # Each unit of the MLP has a row, a column and a bias.
    width = config.mlp_size - round(excess / (sizes.layers * (2 * sizes.hidden + 1)))
    parameters = -1
    if width >= 1:
        config = replace(config, intermediate_size=width)
        parameters = count_parameters(config)
    result = Matched(config, parameters, reference)
    if abs(result.deviation) > TOLERANCE:
        raise ValueError(
            f"{label} has {excess:+,} parameters against full attention's {reference:,}, which its MLP of "
            f"{config.mlp_size} units a layer cannot make up for; make the model larger, or leave it out"
        )
    return result


def count_parameters(config: AttentionConfig) -> int:
    """Parameters of the model, which is not allocated."""
    with torch.device("meta"):
        model = LanguageModel(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _config(
    label: str, task: Task, sizes: Sizes, vocabulary: int, changed: Mapping[str, Mapping[str, Any]]
) -> AttentionConfig:
    return get_variant(trained_settings()[label].variant).config_class(
        vocab_size=vocabulary,
        hidden_size=sizes.hidden,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        max_sequence_length=sizes.length,
        **fields_of(label, task, changed),
    )
