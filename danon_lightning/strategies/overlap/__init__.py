"""Gradients that are exchanged beside the next forward pass, without any weight moving late."""

from danon_lightning.strategies.overlap.forward import ForwardOverlap
from danon_lightning.strategies.overlap.refusals import check_overlap, check_trainer
from danon_lightning.strategies.overlap.synchronization import Synchronization

__all__ = ["ForwardOverlap", "Synchronization", "check_overlap", "check_trainer"]
