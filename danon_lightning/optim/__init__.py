"""Optimizers that work together with the gradient exchange."""

from danon_lightning.optim.onebit_adam import OneBitAdam

__all__ = ["OneBitAdam"]
