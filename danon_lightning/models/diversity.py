"""A reward for hybrids that weigh all of their components, so that training gives none of them up early."""

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import Tensor

from danon_lightning.attention import AttentionConfig, AttentionModel, SuperHybridConfig, observing


def check_diversity(config: AttentionConfig, chunk_length: int | None = None) -> None:
    """Raise a ValueError if ``diversity_weight`` is set together with what leaves no gradient to the weights."""
    if not isinstance(config, SuperHybridConfig) or not config.diversity_weight:
        return
    if chunk_length is not None or config.gradient_checkpointing or config.memory_efficient:
        raise ValueError(
            f"diversity_weight={config.diversity_weight} needs the weights of the whole batch in the graph: "
            "leave out chunk_length, gradient_checkpointing and memory_efficient, or set it to 0"
        )


def less_diversity(
    module: pl.LightningModule, model: AttentionModel, loss: Callable[[], Tensor], real: Tensor | None = None
) -> Tensor:
    """Compute a loss, less ``diversity_weight`` times the mean entropy (nats) of the weights of the components.

    The entropy is logged as ``train/component_entropy``. Of models that are no hybrids the loss stays as it is.

    Args:
        module: Logs the entropy.
        model: Whose weights count.
        loss: Called once; calls ``model`` and returns a scalar.
        real: 1 for real tokens, 0 for padding, which does not count ``[b, n]``; None: all are.

    Raises:
        ValueError: If layers of the model are on other ranks, as in a pipeline.
    """
    config = model.config
    if not isinstance(config, SuperHybridConfig) or not config.diversity_weight:
        return loss()
    with observing([block.core for block in model.blocks()], ["component_weights"]) as observed:
        value = loss()
    weights = [values["component_weights"] for values in observed]
    entropies = [_mean_entropy(layer, real) for layer in weights if layer is not None]
    if len(entropies) < len(weights):
        raise ValueError("diversity_weight needs all layers on one rank; set it to 0 in a pipeline")
    entropy = torch.stack(entropies).mean()
    module.log("train/component_entropy", entropy.detach())
    return value - config.diversity_weight * entropy


def _mean_entropy(weights: Tensor, real: Tensor | None) -> Tensor:
    """Of the weights ``[b, components, H, n]`` of one layer, over heads and real tokens, a scalar."""
    entropies = torch.special.entr(weights).sum(dim=1).mean(dim=1)
    if real is None:
        return entropies.mean()
    counted = real.bool()
    return entropies.masked_fill(~counted, 0.0).sum() / counted.sum().clamp_min(1)
