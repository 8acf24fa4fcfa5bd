"""Every attention variant in a size for tests."""

import torch

from danon_lightning.attention import AttentionModel, get_variant

SIZES = {"vocab_size": 11, "hidden_size": 16, "num_layers": 2, "max_sequence_length": 64}
# Small enough for a few dozen tokens to reach every part of a variant.
SETTINGS = {
    "full": {},
    "msra": {"block_size": 4, "compression_factor": 2},
    "dala": {"block_size": 4, "memory_size": 6},
    "ucsa": {
        "block_size": 4,
        "local_window_size": 4,
        "global_tokens": 2,
        "sparsity_factor": 0.15,
        "tree_factor": 2,
        "max_flat_blocks": 8,
        "chunk_size": 8,
    },
    "infinite": {"local_window": 8, "sliding_window": 16, "compression_ratio": 0.5, "chunk_size": 8},
}
SETTINGS["super_hybrid"] = {
    "components": "msra+dala+ucsa,infinite",
    "settings": {name: SETTINGS[name] for name in ("msra", "dala", "ucsa", "infinite")},
}
VARIANTS = list(SETTINGS)
BIDIRECTIONAL = ["full", "msra", "ucsa"]
ENDLESS = ["dala", "infinite"]


def make_config(variant: str, **settings):
    return get_variant(variant).config_class(**{**SIZES, **SETTINGS[variant], **settings})


def build(variant: str, **settings) -> AttentionModel:
    """Build a model, the same one at each call."""
    torch.manual_seed(0)
    return model_class(variant)(make_config(variant, **settings))


def model_class(variant: str) -> type[AttentionModel]:
    """Return the model of the variant itself, which has the output and the methods of its own."""
    config_class = get_variant(variant).config_class
    return next(model for model in AttentionModel.__subclasses__() if model.config_class is config_class)


def scramble(model: AttentionModel) -> AttentionModel:
    """Move every parameter away from its neutral start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model
