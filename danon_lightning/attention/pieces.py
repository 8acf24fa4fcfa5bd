"""How much of a sequence is worked on at once."""

import torch

__all__ = ["tokens_at_once"]

# Few enough for the logits to stay in the cache of a processor core, enough to hide what a call costs.
TOKENS_AT_ONCE = 1024
# An accelerator wants large products instead.
TOKENS_AT_ONCE_ON_ACCELERATORS = 16384


def tokens_at_once(device: torch.device) -> int:
    """Return the number of tokens of a piece, to be rounded to whole blocks."""
    return TOKENS_AT_ONCE if device.type == "cpu" else TOKENS_AT_ONCE_ON_ACCELERATORS
