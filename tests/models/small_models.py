"""LightningModules of every variant, small enough for short texts to reach every part of it."""

import sys
from pathlib import Path

import torch

from danon_lightning.attention import AttentionModel, get_variant
from danon_lightning.models import LanguageModel

sys.path.insert(0, str(Path(__file__).parents[1] / "attention"))
from variants import SETTINGS  # noqa: E402

SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}


def config_of(variant, **settings):
    return {**SIZES, **SETTINGS.get(variant, {}), **settings}


def language_model(variant, *, chunk_length=None, **settings):
    """The same one at each call; wild, and in float64, so that rounding does not matter."""
    given = {"model_class": AttentionModel, "config_class": get_variant(variant).config_class}
    cls = type("Model", (LanguageModel,), given)
    torch.manual_seed(0)
    optimizer = {"learning_rate": 1e-2, "warmup_steps": 2}
    return scrambled(cls(config_of(variant, **settings), optimizer, chunk_length))


def scrambled(module, amount=0.2):
    """Move every parameter away from its neutral start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=amount)
    return module.double()
